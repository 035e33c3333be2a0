"""Pictures of models: networks from a plan's tensors, prompts, denoising, checks, and what is shown of it."""
