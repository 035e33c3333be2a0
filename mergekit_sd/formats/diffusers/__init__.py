"""Diffusers' folders and names."""
