"""What sampling takes of memory: estimated before a weight is read, measured when it is over.

Owns the few numbers of the estimate, which were measured with networks of SD1's size.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from mergekit_sd.formats.dtypes import OUTPUT_DTYPES, Dtype
from mergekit_sd.lazy import torch
from mergekit_sd.planning.diffusers import LATENT_PIXELS, FolderPlan
from mergekit_sd.sampling.tensors import vae_dtype

PACKAGES = 450 << 20  # bytes of a process that has imported torch, diffusers and transformers
KERNELS = 100 << 20  # what torch's compiled kernels and their scratch take once a network has run
# Tensors as large as the widest at full size that are alive at once, on a CPU, with attention in pieces.
UNET_ALIVE = 35
VAE_ALIVE = 4.5


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes: of the weights, of what the UNet and the VAE hold while they compute, of the process besides.

    On a GPU `besides` is the host's; the rest is the GPU's, though each component passes through the host.
    """

    weights: int
    unet: int
    vae: int
    besides: int

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.besides + self.weights + max(self.unet, self.vae)


def memory_need(planned: FolderPlan, dtype: str, size: tuple[int, int], batch: int = 1) -> MemoryNeed:
    """What pictures of `size` (width, height) will take, `batch` at a time; each is guided, so the UNet sees it twice.

    `dtype`: what is sampled in, as for `load_networks`. Within 40 % of what was measured.
    """
    dtypes = {name: _dtype(name, dtype) for name in planned.outputs}
    weights = {
        name: sum(tensor.info.numel for tensor in output.tensors) * dtypes[name].itemsize
        for name, output in planned.outputs.items()
    }
    pixels = math.prod(size)
    unet = planned.files["unet/config.json"]["block_out_channels"][0] * pixels / LATENT_PIXELS**2
    # The decoder enlarges what its second level has made before it narrows it.
    vae = max(planned.files["vae/config.json"]["block_out_channels"][:2]) * pixels
    return MemoryNeed(
        weights=sum(weights.values()),
        unet=KERNELS + int(UNET_ALIVE * unet * 2 * batch * dtypes["unet"].itemsize),
        vae=KERNELS + int(VAE_ALIVE * vae * batch * dtypes["vae"].itemsize),
        besides=PACKAGES,
    )


def _dtype(component: str, dtype: str) -> Dtype:
    return OUTPUT_DTYPES[vae_dtype(dtype) if component == "vae" else dtype]


def peak_memory(device: str = "cpu") -> int | None:
    """The most bytes that this process has held so far on a device; None where the system does not tell."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if device != "cpu" or sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
