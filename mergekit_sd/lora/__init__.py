"""LoRA files: factors of changes, found, joined, made smaller."""
