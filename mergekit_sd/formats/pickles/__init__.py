"""PyTorch checkpoints (.ckpt, .pt, .pth, .bin) as data: nothing in them is ever imported, called or run."""
