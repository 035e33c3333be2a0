"""How the small family was made: drawings, training, packing. Not part of the installed package."""
