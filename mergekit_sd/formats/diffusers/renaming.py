"""A file in diffusers' names as one in LDM's: renamed, and put together where LDM keeps in one what diffusers splits.

Owns which component of diffusers a file is, and how its tensors become LDM's. Must not know folders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.diffusers.names import Part, Twin, to_ldm
from mergekit_sd.formats.tensor import ModelFile, TensorInfo, View
from mergekit_sd.formats.views import Joined, Strided
from mergekit_sd.text import listed

NEEDED = 0.9  # the share of its names that must be known for a file to be a component
OPENCLIP_WIDTHS = (1024, 1280)  # ViT-H, ViT-bigG; the other text encoder, CLIP ViT-L, has 768
ALIGNMENT = 64

_CLIP_WORDS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
# Names that diffusers' files of a component have, and neither LDM's nor ControlNets and LoRAs.
_MARKS: Mapping[Part, tuple[str, ...]] = {
    "unet": (
        "conv_in.weight",
        "conv_out.weight",
        "time_embedding.linear_1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
    ),
    "vae": ("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
}
_ATTENTION = (".attn_1.q.weight", ".attn_1.k.weight", ".attn_1.v.weight", ".attn_1.proj_out.weight")


def part_of(tensors: Mapping[str, TensorInfo], activation: str | None = None) -> Part | None:
    """Which of diffusers' components a file is, by its names; None for anything else.

    `activation`: the text encoder's `hidden_act`, where its configuration says one.
    """
    part = next((part for part, marks in _MARKS.items() if all(mark in tensors for mark in marks)), None)
    if part is None and any(name in tensors for name in _CLIP_WORDS):
        part = text_part(tensors, activation)
    return part if part and knows(part, tensors) else None


def text_part(tensors: Mapping[str, TensorInfo], activation: str | None) -> Part:
    """Whose text encoder it is: transformers has one layout for CLIP's and OpenCLIP's, which LDM has not."""
    if activation in ("gelu", "quick_gelu"):
        return "openclip" if activation == "gelu" else "clip"
    words = next((tensors[name] for name in _CLIP_WORDS if name in tensors), None)
    return "openclip" if words and words.shape and words.shape[-1] in OPENCLIP_WIDTHS else "clip"


def knows(part: Part, names: Collection[str]) -> bool:
    """Whether hardly any name is unknown."""
    return len(to_ldm(part, names)) >= NEEDED * len(names) > 0


def in_ldm_names(model: ModelFile, part: Part, prefix: str = "") -> ModelFile:
    """The component under LDM's names, with LDM's shapes; what has none keeps its own, and a note says so.

    Raises MalformedFile where two tensors are one of LDM's, or one is split into parts that do not fit.
    """
    twins = to_ldm(part, list(model.tensors))
    if all(twins.get(name, Twin(name)).name == name for name in model.tensors) and not prefix:
        return model
    making = _Making(model.path, _end(model))
    shares: dict[str, dict[int, TensorInfo]] = {}
    unknown = []
    for name, tensor in model.tensors.items():
        twin = twins.get(name)
        if twin is None:
            if part != "openclip" or not name.endswith(".position_ids"):  # OpenCLIP has none
                unknown.append(name)
                making.keep(prefix + name, tensor)
        elif twin.rows:
            rows = shares.setdefault(prefix + twin.name, {})
            if twin.rows[0] in rows:
                raise _twice(model.path, prefix + twin.name)
            rows[twin.rows[0]] = tensor
            if len(rows) == twin.rows[1]:
                making.join(prefix + twin.name, [rows[index] for index in sorted(rows)])
                del shares[prefix + twin.name]
        elif twin.transposed and len(tensor.shape) == 2:
            making.transpose(prefix + twin.name, tensor)
        else:
            making.keep(prefix + twin.name, tensor)
    for name, rows in shares.items():
        message = (
            f"Of the query, key and value of this layer it has only {listed(each.name for each in rows.values())}."
        )
        raise MalformedFile(message, file=model.path, key=name, hint="the file is damaged: download it again")
    what = (f"these have no LDM name, and keep diffusers': {listed(unknown)}",) if unknown else ()
    views = (*model.views, *making.views)
    return replace(model, tensors=making.tensors, views=views, notes=(*model.notes, *what))


@dataclass
class _Making:
    """LDM's tensors, one after the other; `views` are those that do not lie in the file as they are."""

    path: Path
    end: int

    def __post_init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.views: list[View] = []

    def keep(self, name: str, tensor: TensorInfo) -> None:
        """A tensor with another name; LDM's VAE has convolutions where diffusers' has linear layers."""
        as_convolution = name.endswith(_ATTENTION) and len(tensor.shape) == 2
        self._add(replace(tensor, name=name, shape=(*tensor.shape, 1, 1) if as_convolution else tensor.shape))

    def join(self, name: str, rows: list[TensorInfo]) -> None:
        """The rows of several tensors as those of one."""
        first = rows[0]
        if any((each.dtype, each.shape) != (first.dtype, first.shape) for each in rows) or not first.shape:
            message = "The query, key and value of this layer differ in dtype or shape."
            raise MalformedFile(message, file=self.path, key=name, details=[each.name for each in rows])
        nbytes = sum(each.nbytes for each in rows)
        start = self._reserve(nbytes)
        self.views.append(Joined(start, nbytes, tuple((each.offset, each.nbytes) for each in rows)))
        self._add(TensorInfo(name, first.dtype, (len(rows) * first.shape[0], *first.shape[1:]), start, nbytes))

    def transpose(self, name: str, tensor: TensorInfo) -> None:
        """A matrix with its rows as columns."""
        start, shape = self._reserve(tensor.nbytes), tensor.shape[::-1]
        self.views.append(transposed(tensor, start))
        self._add(TensorInfo(name, tensor.dtype, shape, start, tensor.nbytes))

    def _reserve(self, nbytes: int) -> int:
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.end = start + nbytes
        return start

    def _add(self, tensor: TensorInfo) -> None:
        if tensor.name in self.tensors:
            raise _twice(self.path, tensor.name)
        self.tensors[tensor.name] = tensor


def transposed(tensor: TensorInfo, start: int) -> View:
    """A matrix with its rows as columns, at an offset beyond the file's end."""
    rows, columns = tensor.shape
    return Strided(
        start, tensor.nbytes, tensor.offset, tensor.nbytes, (columns, rows), (1, columns), tensor.dtype.itemsize
    )


def _end(model: ModelFile) -> int:
    ends: Iterable[int] = (view.start + view.nbytes for view in model.views)
    return max((model.state.size, *ends))


def _twice(path: Path, name: str) -> MalformedFile:
    message = "Two tensors of the file are this one of LDM's."
    return MalformedFile(message, file=path, key=name, hint="the file is damaged or of another program")
