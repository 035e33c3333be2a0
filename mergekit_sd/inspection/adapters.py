"""What a LoRA-like file holds: modules by algorithm and part, their ranks and alphas, and the family it is for.

Owns the endings of names that tell the algorithms, and the counting. Reads no values but the alphas.
Must not know how a module changes a weight.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import ModelFile, TensorInfo
from mergekit_sd.formats.values import decode

# The width of the text that cross-attention looks at tells the family.
CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}

# What a name ends in behind its module. The group's name is the algorithm, its text what the tensor is there.
_ENDING = re.compile(
    r"""(?:
      [._]lora(?:_linear_layer)?[._](?P<lora>up|down|mid|A|B)(?:\.\w+)?(?:\.weight|\.bias)?
    | \.(?P<loha>hada_[wt][12](?:_[ab])?)
    | \.(?P<lokr>lokr_[wt][12](?:_[ab])?)
    | \.(?P<glora>[ab][12m])(?:\.weight)?
    | \.(?P<oft>oft_blocks|oft_diag)
    | \.(?P<ia3>on_input)
    | \.(?P<tlora>[qp]_layer|lambda_layer)(?:\.weight)?
    | \.(?P<norm>[wb]_norm)
    | \.(?P<full>diff_b|diff|set_weight)
    | (?:\.|[._]lora_)(?P<dora>dora_scale|magnitude_vector)(?:\.\w+)?(?:\.weight)?
    | \.(?P<beside>alpha|scale|rescale|weight)
    )$""",
    re.VERBOSE,
)
# A module with tensors of several is of the first: a LoRA may carry its bias's difference (`diff_b`) along.
_ALGORITHMS = ("tlora", "loha", "lokr", "glora", "oft", "ia3", "lora", "norm", "full")
# The tensors whose size gives the rank and whose width is the layer's input: both are (rank, in).
_DOWN = {
    "lora": ("down", "A"),
    "locon": ("down", "A"),
    "loha": ("hada_w1_b",),
    "lokr": ("lokr_w2_b", "lokr_w1_b"),
    "tlora": ("q_layer",),
}

_PARTS = (
    ("text_encoder_2", re.compile(r"^(base_model\.model\.)?(lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.)")),
    ("text_encoder", re.compile(r"^(base_model\.model\.)?(lora_te1?_|text_encoder\.|text_encoders\.|clip_l\.)")),
    ("unet", re.compile(r"^(base_model\.model\.)?((lora|oft)_unet_|unet\.|(model\.)?diffusion_model\.)")),
    ("text_encoder", re.compile(r"(^|[._])text_model[._]")),
    ("unet", re.compile(r"(^|[._])(((down|up)_blocks|mid_block|(in|out)put_blocks|middle_block)[._]|time_embed)")),
)
_STYLES = (
    ("kohya", re.compile(r"^(lora_(unet|te\d?)|oft_unet)_")),
    ("lycoris", re.compile(r"^lycoris_")),
    ("comfyui", re.compile(r"^((model\.)?diffusion_model|text_encoders)\.")),
    ("peft", re.compile(r"^base_model\.model\.")),
    (
        "diffusers",
        re.compile(r"^((unet|text_encoder(_2)?|transformer)\.|.*((_|\.)lora\.(up|down)|lora_linear_layer)\.)"),
    ),
    ("peft", re.compile(r"\.lora_([AB]|magnitude_vector)(\.|$)")),
)

_CONTEXT_LAYER = re.compile(r"attn2[._](processor\.)?to_[kv]$")
_CONV = re.compile(
    r"(conv[12]|conv_in|conv_out|[._]conv|in_layers[._]2|out_layers[._]3|[._]op|input_blocks[._]0[._]0|[._]out[._]2)$"
)
_SD_UNET = re.compile(r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]")
_ONLY_SDXL = re.compile(r"[._]transformer_blocks[._][1-9]")  # the others' have one block each
_NOT_SDXL = re.compile(r"(down_blocks|up_blocks)[._]3|(input|output)_blocks[._](9|1[01])[._]")
_ONLY_SD2 = re.compile(r"layers[._](1[2-9]|2\d)[._]")  # a text encoder of more than 12 layers
_BUNDLED = re.compile(r"^bundle_emb\.([^.]+)\.")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Ranks or alphas: how many modules have each, the most frequent first; those of convolutions apart.

    "Convolution" means a kernel larger than 1×1, as trainers count: a 1×1 one has the rank of the linear layers.
    """

    linear: Mapping[str, int]
    conv: Mapping[str, int]

    def as_json(self) -> dict[str, object]:
        """Two objects of counts by value."""
        return {"linear": dict(self.linear), "conv": dict(self.conv)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA-like file. `algorithms` and `parts` count modules; `dora` is how many of them are rescaled (DoRA).

    `family` is None where the names and widths do not tell. `embeddings` names textual inversions that are
    bundled with it, `stray` counts tensors that are of no module.
    """

    modules: int
    algorithms: Mapping[str, int]
    dora: int
    parts: Mapping[str, int]
    ranks: Sizes
    alphas: Sizes
    style: str | None
    family: str | None
    embeddings: tuple[str, ...]
    stray: int

    @property
    def usable(self) -> bool:
        """Whether it can be applied without what it was trained on: T-LoRA cannot."""
        return "tlora" not in self.algorithms

    def as_json(self) -> dict[str, object]:
        """As `inspect --json` has it."""
        return {
            "modules": self.modules,
            "algorithms": dict(self.algorithms),
            "dora": self.dora,
            "parts": dict(self.parts),
            "ranks": self.ranks.as_json(),
            "alphas": self.alphas.as_json(),
            "style": self.style,
            "family": self.family,
            "embeddings": list(self.embeddings),
            "stray": self.stray,
            "usable": self.usable,
        }


def adapter_of(model: ModelFile) -> Adapter:
    """What a LoRA or LyCORIS file holds. Raises InputChanged if the file is not as it was opened."""
    modules, stray = _modules(model.tensors.values())
    alphas = _alphas(model, modules)
    algorithms = {module.name: module.algorithm for module in modules}
    return Adapter(
        modules=len(modules),
        algorithms=_counted(algorithms.values()),
        dora=sum("dora" in module.kinds for module in modules),
        parts=_counted(part for module in modules if (part := part_of(module.name))),
        ranks=_sizes((module, module.rank) for module in modules),
        alphas=_sizes((module, alphas.get(module.name)) for module in modules),
        style=_style(modules),
        family=_family(modules),
        embeddings=tuple(sorted({match[1] for name in stray if (match := _BUNDLED.match(name))})),
        stray=sum(not _BUNDLED.match(name) for name in stray),
    )


# --- modules ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Module:
    """One adapted layer: its tensors by what they are there ("down", "alpha"); `kinds` are the endings' groups."""

    name: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)

    @property
    def algorithm(self) -> str:
        """The algorithm, in LyCORIS's words."""
        first = next(each for each in _ALGORITHMS if each in self.kinds)
        if first == "oft":
            blocks = self.tensors.get("oft_blocks") or self.tensors["oft_diag"]
            return "boft" if len(blocks.shape) == 4 else "oft" if self.name.startswith("oft_") else "diag-oft"
        return "locon" if first == "lora" and self.is_conv else first

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution of a kernel larger than 1×1: by its name, or by a kernel stored."""
        kernels = (self.tensors[part] for part in ("down", "mid", "diff") if part in self.tensors)
        return bool(_CONV.search(self.name)) or any(len(each.shape) == 4 and each.shape[-1] > 1 for each in kernels)

    @property
    def down(self) -> TensorInfo | None:
        """The tensor of shape (rank, in)."""
        names = _DOWN.get(self.algorithm, ())
        return next((self.tensors[name] for name in names if name in self.tensors), None)

    @property
    def rank(self) -> int | None:
        """The rank; None where the algorithm has none (full differences, norms, OFT, LoKr of two full factors)."""
        if self.algorithm == "glora":  # (out, r) and (r, in), or in its old form (r, in) and (out, r)
            shape = self.tensors["b1"].shape if "b1" in self.tensors else ()
            return min(shape[:2], default=None)
        return self.down.shape[0] if self.down is not None and self.down.shape else None

    @property
    def width(self) -> int | None:
        """The layer's input width, where a shape tells it."""
        match self.algorithm:
            case "lokr":
                factors = [
                    next((self.tensors[w] for w in (f"lokr_{f}", f"lokr_{f}_b") if w in self.tensors), None)
                    for f in ("w1", "w2")
                ]
                widths = [each.shape[1] for each in factors if each is not None and len(each.shape) > 1]
                return widths[0] * widths[1] if len(widths) == 2 else None
            case "glora":
                return max(self.tensors["a1"].shape, default=None) if "a1" in self.tensors else None
            case "full":
                tensor = self.tensors.get("diff")
            case _:
                tensor = self.down
        return tensor.shape[1] if tensor is not None and len(tensor.shape) > 1 else None


def _modules(tensors: Iterable[TensorInfo]) -> tuple[list[_Module], list[str]]:
    """The modules in the file's order, and the names that are of none."""
    found: dict[str, _Module] = {}
    stray: list[str] = []
    for tensor in tensors:
        match = _ENDING.search(tensor.name)
        if match is None or not match.start() or _BUNDLED.match(tensor.name):
            stray.append(tensor.name)
            continue
        kind = str(match.lastgroup)
        part = {"A": "down", "B": "up"}.get(match[kind], match[kind])
        module = found.setdefault(tensor.name[: match.start()], _Module(tensor.name[: match.start()]))
        module.tensors[part] = tensor
        module.kinds.add(kind)
    adapted = [module for module in found.values() if module.kinds & {*_ALGORITHMS}]
    others = (module for module in found.values() if not module.kinds & {*_ALGORITHMS})
    return adapted, [*stray, *(tensor.name for module in others for tensor in module.tensors.values())]


def part_of(module: str) -> str | None:
    """Which component a module is of, by its name; None where it does not say."""
    return next((part for part, pattern in _PARTS if pattern.search(module)), None)


def _style(modules: Iterable[_Module]) -> str | None:
    """Whose way of naming most of the modules have."""

    def of(module: _Module) -> str | None:
        name = next(iter(module.tensors.values())).name
        return next((style for style, pattern in _STYLES if pattern.search(name)), None)

    return next((style for style, _ in Counter(filter(None, map(of, modules))).most_common(1)), None)


# --- ranks and alphas ------------------------------------------------------------------------------


def _alphas(model: ModelFile, modules: Iterable[_Module]) -> dict[str, float]:
    """The alpha of each module that has one: as stored, else as diffusers writes it into the metadata."""
    said = _configuration(model.metadata)
    found: dict[str, float] = {}
    file = InputFile.of(model)
    try:
        for module in modules:
            tensor = module.tensors.get("alpha")
            if tensor is not None and tensor.numel == 1:
                data = bytearray(tensor.nbytes)
                file.read_into(memoryview(data), tensor.offset)
                if module.algorithm != "lokr" or module.rank:  # two full factors: it is ignored, and says 10^5
                    found[module.name] = decode(bytes(data), tensor.dtype)[0]
            elif (alpha := _configured_alpha(said, module.name)) is not None:
                found[module.name] = alpha
    finally:
        file.close()
    return found


def _configuration(metadata: Mapping[str, str]) -> Mapping[str, object]:
    """PEFT's configuration, which newer versions of diffusers write beside the tensors."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _configured_alpha(said: Mapping[str, object], module: str) -> float | None:
    part = part_of(module)
    patterns = said.get(f"{part}.alpha_pattern")
    for ending, alpha in patterns.items() if isinstance(patterns, dict) else ():
        if f".{module}".endswith(f".{ending}") and isinstance(alpha, int | float):
            return alpha
    alpha = said.get(f"{part}.lora_alpha")
    return alpha if isinstance(alpha, int | float) else None


def _sizes(values: Iterable[tuple[_Module, float | None]]) -> Sizes:
    known = [(module.is_conv, f"{value:g}") for module, value in values if value is not None]
    return Sizes(_counted(v for conv, v in known if not conv), _counted(v for conv, v in known if conv))


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


# --- the family ------------------------------------------------------------------------------------


def _family(modules: list[_Module]) -> str | None:
    """The family by the width of the cross-attention's context, else by what only one family has."""
    contexts = Counter(module.width for module in modules if _CONTEXT_LAYER.search(module.name))
    for width, _ in contexts.most_common(1):
        if width is not None:
            return CONTEXTS.get(width)
    names: dict[str | None, list[_Module]] = {"unet": [], "text_encoder": [], "text_encoder_2": []}
    for module in modules:
        names.setdefault(part_of(module.name), []).append(module)
    unet = [module.name for module in names["unet"]]
    if unet and not any(map(_SD_UNET.search, unet)):  # another kind of model, which may have these text encoders
        return None
    if names["text_encoder_2"] or any(map(_ONLY_SDXL.search, unet)):
        return "sdxl"
    first = names["text_encoder"]
    if any(_ONLY_SD2.search(module.name) for module in first):
        return "sd2"
    widths = {module.width for module in first if re.search(r"[._][qkv]_proj$", module.name)}
    if widths == {1024}:
        return "sd2"
    # CLIP ViT-L is SD1's and SDXL's: it decides only beside a UNet that is not SDXL's.
    return "sd1" if widths == {768} and any(map(_NOT_SDXL.search, unet)) else None
