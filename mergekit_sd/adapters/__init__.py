"""LoRA-family files: their names, and what they change in a checkpoint.

This room knows names, shapes and formulas. It must not know recipes, plans or the run.
"""
