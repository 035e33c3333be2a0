"""The packed files."""
