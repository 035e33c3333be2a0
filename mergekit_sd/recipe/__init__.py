"""The recipe language: text to checked values. See `load.load_recipe`; nothing here opens a model."""
