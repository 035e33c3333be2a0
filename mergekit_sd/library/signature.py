"""What is kept of a model to compare it with others: samples of its UNet, and what its attention makes of noise.

Owns the method and its form in bytes. Must not know the index.

*Samples*: of each block some two thousand weights at fixed places, scaled so that their cosine estimates that of
the whole block: what it lacks of 1 is right within a third or so, in the mean of all blocks within a tenth.

*Responses*: of ASimilarity (huggingface.co/JosephusCheung/ASimilarityCalculatior, which others have taken up). With
X a square of fixed noise and W_q, W_k, W_v the weights of a self-attention, row i is

    softmax((X W_qᵀ) (X W_kᵀ)ᵀ)_i · Σ_j (X W_vᵀ)_j    (element by element; no scale before the softmax)

in SD1 and SD2 of OUT03–OUT10. Nearly all of a row's length lies in a few elements: the largest are kept, which
at sizes of 640 and 1280 changes ASimilarity by 0.01 percentage points; more only where small weights make rows flat.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_sd.architectures import Layout, Role
from mergekit_sd.errors import MissingTensors
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.formats.values import decode
from mergekit_sd.inspection.streaming import as_tensor
from mergekit_sd.lazy import torch
from mergekit_sd.library.entry import Opened

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Floats: TypeAlias = npt.NDArray[np.float64]

METHOD = 1  # raise it when another signature would be made of the same file
SAMPLES = 2048  # of a block
RUN = 32  # samples that lie side by side: each run costs a read, and rows of a matrix differ
FEWEST = 8  # samples of a tensor
SEED = 114514  # ASimilarity's
KEPT = 32  # elements of a row
LEAST = 2.0**-11  # of a row's length: what is smaller is left out
_SD_BLOCKS = frozenset(f"OUT{n:02}" for n in range(3, 11))
_CHANNELS = 4  # of an inpainting model's first convolution those that every model has


@dataclass(frozen=True, slots=True)
class Sampled:
    """A block's samples, float16; `shapes` is a digest of its tensors' names and shapes."""

    shapes: bytes
    values: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Response:
    """The largest elements of a square response, its rows scaled to length 1: places in it, ascending, and values."""

    size: int
    places: npt.NDArray[Any]
    values: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Signature:
    """Both, by block. A block whose attention has values that are not finite has no response."""

    samples: Mapping[str, Sampled]
    responses: Mapping[str, Response]

    def to_bytes(self) -> bytes:
        """The signature as the index keeps it."""
        import numpy as np

        arrays: dict[str, npt.NDArray[Any]] = {}
        for block, sampled in self.samples.items():
            arrays[f"{block}/shapes"] = np.frombuffer(sampled.shapes, np.uint8)
            arrays[f"{block}/samples"] = sampled.values
        for block, response in self.responses.items():
            arrays[f"{block}/size"] = np.array(response.size)
            arrays[f"{block}/places"] = np.diff(response.places, prepend=0).astype(np.uint32)
            arrays[f"{block}/values"] = response.values
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return zlib.compress(buffer.getvalue(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Signature | None:
        """The signature that was kept; None if the bytes are none."""
        import numpy as np

        try:
            with np.load(io.BytesIO(zlib.decompress(data))) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            samples = {
                block: Sampled(found[f"{block}/shapes"].tobytes(), found[name])
                for block, name in _blocks(found, "samples")
            }
            responses = {
                block: Response(
                    int(found[f"{block}/size"]),
                    np.cumsum(found[f"{block}/places"], dtype=np.int64),
                    found[f"{block}/values"],
                )
                for block, name in _blocks(found, "size")
            }
        except (zlib.error, zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError):
            return None
        return cls(samples, responses)


def _blocks(arrays: Mapping[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    return ((name.split("/")[0], name) for name in arrays if name.endswith(f"/{kind}"))


def make_signature(opened: Opened) -> Signature:
    """A model's signature; some 40 MB are read of a float16 SD1 or SDXL model. Raises MissingTensors without a UNet."""
    places = opened.layout.places
    unet = [
        (opened.layout.canonical[stored], tensor)
        for stored, tensor in opened.model.tensors.items()
        if (place := places[opened.layout.canonical[stored]]).component == "unet"
        and place.role == Role.weight
        and place.block
        and tensor.dtype.is_float
        and tensor.numel
    ]
    if not unet or opened.layout.architecture is None:
        raise MissingTensors("This model has no UNet that could be compared.", file=opened.model.path)
    file = InputFile.of(opened.model)
    try:
        found = Signature(_sampled(file, opened.layout, dict(unet)), _responses(file, opened.layout, dict(unet)))
        file.check_unchanged()
    finally:
        file.close()
    return found


# --- samples -----------------------------------------------------------------------------------------


def _sampled(file: InputFile, layout: Layout, unet: Mapping[str, TensorInfo]) -> dict[str, Sampled]:
    import numpy as np

    blocks: dict[str, list[str]] = {block: [] for block in _order(layout)}
    for name in sorted(unet):
        blocks[layout.places[name].block or ""].append(name)
    found = {}
    for block, names in blocks.items():
        if not names:
            continue
        digest = blake2b(digest_size=8)
        roots = {name: unet[name].numel ** 0.5 for name in names}
        share = SAMPLES / sum(roots.values())
        values = []
        for name in names:
            tensor, first = unet[name], _is_first(layout, name)
            shape = (tensor.shape[0], _CHANNELS, *tensor.shape[2:]) if first else tensor.shape
            digest.update(f"{_bare(layout, name)}{shape}".encode("utf-8", "replace"))
            wanted = max(FEWEST, int(share * roots[name]))
            every = _first_channels(file, tensor) if first else None
            values.append(_samples(file, tensor, name, wanted) if every is None else every)
        with np.errstate(over="ignore"):
            found[block] = Sampled(digest.digest(), np.concatenate(values).astype(np.float16))
    return found


def _order(layout: Layout) -> tuple[str, ...]:
    return layout.architecture.blocks if layout.architecture else ()


def _bare(layout: Layout, name: str) -> str:
    return name.removeprefix(layout.prefix_of("unet") or "")


def _is_first(layout: Layout, name: str) -> bool:
    return layout.architecture is not None and name == layout.architecture.conv_in


def _samples(file: InputFile, tensor: TensorInfo, name: str, wanted: int) -> Floats:
    """Values of a tensor in runs, one from each part of it, times the root of how many each stands for."""
    import numpy as np

    if tensor.numel <= wanted:
        return _values(file, tensor, 0, tensor.numel)
    number = max(1, wanted // RUN)
    length = wanted // number
    room = tensor.numel - length
    # Places differ from tensor to tensor: some methods merge the same rows of every one.
    parts = [zlib.crc32(f"{name}:{run}".encode("utf-8", "replace")) / 2**32 for run in range(number)]
    runs = [_values(file, tensor, int((run + part) / number * room), length) for run, part in enumerate(parts)]
    scaled: Floats = np.concatenate(runs) * (tensor.numel / (number * length)) ** 0.5
    return scaled


def _first_channels(file: InputFile, tensor: TensorInfo) -> Floats:
    values = _values(file, tensor, 0, tensor.numel).reshape(tensor.shape)
    first: Floats = values[:, :_CHANNELS].reshape(-1)
    return first


def _values(file: InputFile, tensor: TensorInfo, start: int, count: int) -> Floats:
    import numpy as np

    data = bytearray(count * tensor.dtype.itemsize)
    file.read_into(memoryview(data), tensor.offset + start * tensor.dtype.itemsize)
    return np.array(decode(bytes(data), tensor.dtype), dtype=np.float64)


# --- responses ---------------------------------------------------------------------------------------


def attention_blocks(layout: Layout) -> tuple[str, ...]:
    """The blocks that ASimilarity looks at: OUT03–OUT10; of SDXL, which has others, all OUT blocks with attention."""
    architecture = layout.architecture
    if architecture is None:
        return ()
    there = dict.fromkeys(
        spec.block
        for name, spec in architecture.tensors.items()
        if spec.block and spec.block.startswith("OUT") and name.endswith(".transformer_blocks.0.attn1.to_q.weight")
    )
    ours = [block for block in there if block in _SD_BLOCKS or architecture.family not in ("sd1", "sd2")]
    return tuple(sorted(ours))


def _responses(file: InputFile, layout: Layout, unet: Mapping[str, TensorInfo]) -> dict[str, Response]:
    blocks = attention_blocks(layout)
    weights = {block: _attention(unet, layout, block) for block in blocks}
    whole = {block: three for block, three in weights.items() if three is not None}
    if len(whole) < len(blocks):  # the noise of each block is drawn after that of those before
        return {}
    sizes = tuple(three[0].shape[0] for three in whole.values())
    found = {}
    for block, three, noise in zip(blocks, whole.values(), _noise(sizes), strict=True):
        response = _respond(noise, *(_matrix(file, tensor) for tensor in three))
        if response is not None:
            found[block] = response
    return found


def _attention(unet: Mapping[str, TensorInfo], layout: Layout, block: str) -> list[TensorInfo] | None:
    """The weights of q, k and v in a block's first self-attention; None unless they are squares of one size."""
    ends = [f".transformer_blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    names = [[name for name in unet if name.endswith(end) and layout.places[name].block == block] for end in ends]
    if [len(each) for each in names] != [1, 1, 1]:
        return None
    found = [unet[each[0]] for each in names]
    shape = found[0].shape
    return found if len(shape) == 2 and shape[0] == shape[1] and all(t.shape == shape for t in found) else None


@lru_cache(maxsize=2)
def _noise(sizes: Sequence[int]) -> list[Tensor]:
    """The input of each block, as the calculator draws them."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn((size, size), generator=generator) for size in sizes]


def _matrix(file: InputFile, tensor: TensorInfo) -> Tensor:
    data = bytearray(tensor.nbytes)
    file.read_into(memoryview(data), tensor.offset)
    return as_tensor(memoryview(data), tensor.dtype).float().reshape(tensor.shape)


def _respond(noise: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Response | None:
    """The response of one self-attention, float32 as in the calculator; None if it is not finite."""
    import numpy as np

    size = noise.shape[0]
    attention = torch.softmax((noise @ q.T) @ (noise @ k.T).T, dim=-1)
    rows = torch.nn.functional.normalize(attention * (noise.sum(0) @ v.T), dim=-1)
    if not bool(torch.isfinite(rows).all()):
        return None
    values, columns = torch.topk(rows.abs(), min(KEPT, size), dim=-1)
    places = columns + torch.arange(size)[:, None] * size
    chosen = places[values >= LEAST].sort().values
    return Response(size, chosen.numpy(), rows.reshape(-1)[chosen].numpy().astype(np.float16))
