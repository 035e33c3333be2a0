"""What a model file is and what is in it, as one frozen value.

Owns the report of `inspect` and its JSON. Reads the header, and values only where it must:
position_ids, a LoRA's alphas, and with `hashes` or `scan` everything. Must not know how the report is
shown. What the tensors of each kind say is for `adapters`, `embeddings`, `hypernetworks`, `controlnets`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_sd.architectures import Layout, Role, detect
from mergekit_sd.formats.hashing import OnBytes
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.inspection.adapters import Adapter, adapter_of
from mergekit_sd.inspection.controlnets import ControlNet, controlnet_of
from mergekit_sd.inspection.embeddings import Embedding, embedding_of
from mergekit_sd.inspection.hypernetworks import Hypernetwork, hypernetwork_of
from mergekit_sd.inspection.identity import Identity, identify, weights_hashes
from mergekit_sd.inspection.position_ids import PositionIds, position_ids
from mergekit_sd.inspection.scan import nonfinite_values
from mergekit_sd.inspection.training import About, about

_ENCODERS = {768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"}


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a file: the size of each of its tensors, by their stored names; how many have each dtype."""

    sizes: Mapping[str, int]
    dtypes: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """The size of them all."""
        return sum(self.sizes.values())

    @property
    def tensors(self) -> int:
        """How many tensors they are."""
        return len(self.sizes)

    def as_json(self) -> dict[str, object]:
        """Counts alone."""
        return {"tensors": self.tensors, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` tells of a file.

    `bytes` is the size of all tensors, `file_bytes` that of the file. `title` says the architecture
    in words, `encoders` those of text encoders without a UNet, `notes` what else the file holds. `unread`
    are the tensors of a checkpoint that lie beside its model (number, bytes). `adapter`, `embedding`,
    `hypernetwork` and `controlnet` are there for files of that kind, `weights_hashes` and `identity`
    only with hashes, `nonfinite` only with a scan.
    """

    path: str
    format: str
    kind: str
    architecture: str | None
    title: str | None
    prediction: str | None
    tensors: int
    bytes: int
    file_bytes: int
    dtypes: Mapping[str, int]
    components: Mapping[str, Share]
    roles: Mapping[Role, Share]
    unread: tuple[int, int]
    position_ids: PositionIds | None
    adapter: Adapter | None
    embedding: Embedding | None
    hypernetwork: Hypernetwork | None
    controlnet: ControlNet | None
    encoders: tuple[str, ...]
    about: About
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    weights_hashes: Mapping[str, str] | None
    identity: Identity | None
    nonfinite: Mapping[str, int] | None

    @property
    def ema(self) -> Share:
        """The EMA copies of the UNet."""
        return self.roles[Role.ema]

    @property
    def junk(self) -> Share:
        """What is no part of the architecture."""
        return self.roles[Role.junk]

    @property
    def prunable(self) -> int | None:
        """Bytes that `prune` takes off the file without changing a picture; None without an architecture.

        A compressed file shrinks by less than what goes, as what stays is unpacked: by nothing, at worst.
        """
        if self.architecture is None:
            return None
        gone = self.ema.bytes + self.junk.bytes
        return max(0, min(gone + self.unread[1], self.file_bytes - (self.bytes - gone)))

    def as_json(self) -> dict[str, object]:
        """The object that `inspect --json` prints: a contract."""
        hashes = self.weights_hashes or {}
        report: dict[str, object] = {
            "path": self.path,
            "format": self.format,
            "kind": self.kind,
            "architecture": self.architecture,
            "prediction": self.prediction,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "file_bytes": self.file_bytes,
            "dtypes": dict(self.dtypes),
            "components": {
                name: {**share.as_json(), "dtypes": dict(share.dtypes), "hash": hashes.get(name)}
                for name, share in self.components.items()
            },
            "encoders": list(self.encoders),
            "ema": self.ema.as_json(),
            "junk": {**self.junk.as_json(), "keys": list(self.junk.sizes)},
            "unread": dict(zip(("tensors", "bytes"), self.unread, strict=True)),
            "prunable": self.prunable,
            "position_ids": self.position_ids and self.position_ids.as_json(),
            "about": dict(self.about.facts),
            "metadata": dict(self.metadata),
            "notes": list(self.notes),
            "hashes": self.identity and self.identity.as_json(),
        }
        for name in ("adapter", "embedding", "hypernetwork", "controlnet"):
            if (details := getattr(self, name)) is not None:
                report[name] = details.as_json()
        return report if self.nonfinite is None else {**report, "nonfinite": dict(self.nonfinite)}


def inspect_file(
    path: str | os.PathLike[str], *, hashes: bool = False, scan: bool = False, on_bytes: OnBytes | None = None
) -> Inspection:
    """Look at a model file. Raises an InputError if it is none.

    `on_bytes` is called in this thread with the number of bytes read since the last call; about
    `bytes_to_read` in all.
    """
    # Here, not above: the planning room takes a quarter of a second to import.
    from mergekit_sd.planning.prediction import file_prediction

    model = open_model(path)
    layout = detect(model.tensors)
    architecture = layout.architecture
    return Inspection(
        path=str(path),
        format=model.format,
        kind=layout.kind,
        architecture=None if architecture is None else architecture.name,
        title=None if architecture is None else architecture.title,
        prediction=file_prediction(model, layout),
        tensors=len(model.tensors),
        bytes=sum(tensor.nbytes for tensor in model.tensors.values()),
        file_bytes=model.state.size,
        dtypes=_dtypes(model.tensors.values()),
        components=_components(model, layout),
        roles=_roles(model, layout),
        unread=(model.unread_tensors, model.unread_bytes),
        position_ids=position_ids(model, layout),
        adapter=adapter_of(model) if layout.kind in ("lora", "lycoris") else None,
        embedding=embedding_of(model) if layout.kind == "embedding" else None,
        hypernetwork=hypernetwork_of(model) if layout.kind == "hypernetwork" else None,
        controlnet=controlnet_of(model) if layout.kind == "controlnet" else None,
        encoders=_encoders(model) if layout.kind == "text_encoder" else (),
        about=about(model.metadata),
        metadata=dict(model.metadata),
        notes=model.notes,
        weights_hashes=weights_hashes(model, layout, on_bytes=on_bytes) if hashes else None,
        identity=identify(path, on_bytes) if hashes else None,
        nonfinite=nonfinite_values(model, on_bytes=on_bytes) if scan else None,
    )


def bytes_to_read(path: str | os.PathLike[str], *, hashes: bool, scan: bool) -> int:
    """About how many bytes an inspection goes through: file, content and weights hashes are a pass each."""
    return Path(path).stat().st_size * (3 * hashes + scan)


def _dtypes(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """How many tensors have each dtype, the most frequent first."""
    return dict(Counter(tensor.dtype.name for tensor in tensors).most_common())


def _encoders(model: ModelFile) -> tuple[str, ...]:
    """Which text encoders lie in a file of them alone: the width of their words tells."""
    widths = (tensor.shape[-1:] for name, tensor in model.tensors.items() if name.endswith("token_embedding.weight"))
    return tuple(_ENCODERS[width[0]] for width in widths if width and width[0] in _ENCODERS)


def _components(model: ModelFile, layout: Layout) -> dict[str, Share]:
    """The tensors of each component, position_ids included; the UNet first."""
    members: dict[str, list[TensorInfo]] = {name: [] for name in layout.prefixes}
    for stored, tensor in model.tensors.items():
        component = layout.places[layout.canonical[stored]].component
        if component is not None:
            members.setdefault(component, []).append(tensor)
    return {name: _share(tensors) for name, tensors in members.items() if tensors}


def _roles(model: ModelFile, layout: Layout) -> dict[Role, Share]:
    members: dict[Role, list[TensorInfo]] = {role: [] for role in Role}
    for stored, tensor in model.tensors.items():
        members[layout.places[layout.canonical[stored]].role].append(tensor)
    return {role: _share(tensors) for role, tensors in members.items()}


def _share(tensors: Sequence[TensorInfo]) -> Share:
    return Share({tensor.name: tensor.nbytes for tensor in tensors}, _dtypes(tensors))
