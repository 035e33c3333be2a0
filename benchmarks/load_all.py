"""What most tools do: load both models whole, loop over tensors, save. A B OUT."""

import os
import sys

import torch
from safetensors.torch import load_file, save_file

a, b = load_file(sys.argv[1]), load_file(sys.argv[2])
for key, value in a.items():
    if value.is_floating_point() and key in b:
        a[key] = torch.lerp(value.float(), b[key].float(), 0.3).half()
save_file(a, sys.argv[3], metadata={"format": "pt"})
descriptor = os.open(sys.argv[3], os.O_RDONLY)
os.fsync(descriptor)
