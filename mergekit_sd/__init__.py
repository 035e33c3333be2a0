"""mergekit-sd: merge and operate on Stable Diffusion models."""
