"""A model's ancestry as its metadata tells it: our recipe, A1111's and supermerger's records, ModelSpec's names.

Owns the tree and its reading. Must not know the index or any other file. What is read was written by
strangers: whatever is wrong or endless in it is cut with a note, never an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from mergekit_sd.planning.metadata import A1111_METHODS, NO_CONTENT_HASH, NO_SHA256, RECIPE_KEY

RECORD_KEY, MODELS_KEY, MERGED_FROM_KEY = "sd_merge_recipe", "sd_merge_models", "modelspec.merged_from"

MOST = 500  # models and steps in a tree
DEEPEST = 50  # generations
LONGEST = 200  # characters kept of a name
LONGEST_VALUE = 40  # and of a parameter
MOST_PARAMETERS = 3  # that are told of one operation

DAMAGED = "its record is damaged"
LOOP = "a loop: it is said to be its own ancestor"
ABOVE = "its ancestors are told above"
CUT = "older ancestors are left out"

_DIGITS = {8: "autov1", 10: "autov2", 12: "autov3", 32: "content", 64: "sha256"}
_NAMED = re.compile(r"(?P<name>.*?)\s*\[(?P<hash>[0-9A-Fa-f]{8,64})\]", re.DOTALL)
_LORA = re.compile(r"<lora:([^:<>]+)")
_WORD = re.compile(r"""[^\W\d]\w*|'[^']*'|"[^"]*\"""")
_METHODS = {said: operation for operation, said in A1111_METHODS.items()}
_FACTORS = frozenset({"add_difference", "train_difference", "smooth_add"})  # alpha is what a difference is taken times
_NOT_TOLD = frozenset({"op", "extrapolate", "expr"})
_OF_ONE, _OF_THREE = ("self", "plus random"), ("trainDifference", "smoothAdd", "smoothAdd MT", "extract")


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A model and those that it was made of; or a step between them, which is no file (`step`).

    `role` is what the operation calls it ("a", "vae"), `hashes` are by kind: content, sha256, autov1 and so
    on, `made` tells the operation in a few words. `note` says why the tree ends here. `path` is where a
    library has it, `found_by` the kind of hash that it was found by, or "name".
    """

    name: str
    role: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    made: str = ""
    parents: tuple[Ancestor, ...] = ()
    note: str = ""
    step: bool = False
    path: Path | None = None
    found_by: str = ""

    def models(self) -> Iterator[Ancestor]:
        """The models that it was made of, through all steps between."""
        for parent in self.parents:
            if parent.step:
                yield from parent.models()
            else:
                yield parent

    def as_json(self) -> dict[str, object]:
        """The tree as plain data."""
        return {
            "name": self.name,
            "role": self.role or None,
            "step": self.step,
            "hashes": dict(self.hashes),
            "path": None if self.path is None else str(self.path),
            "found_by": self.found_by or None,
            "made": self.made or None,
            "note": self.note or None,
            "parents": [parent.as_json() for parent in self.parents],
        }


def read_lineage(metadata: Mapping[str, str], name: str) -> Ancestor:
    """The ancestry of a model of that name. Without a record it has no parents; nothing is raised."""
    known = _parsed(metadata.get(MODELS_KEY)) or {}
    reader = _Reader(known)
    if RECIPE_KEY in metadata:
        made = reader.of_recipe(_parsed(metadata[RECIPE_KEY]))
    elif RECORD_KEY in metadata:
        made = reader.of_record(_parsed(metadata[RECORD_KEY]), ())
    elif metadata.get(MERGED_FROM_KEY):
        names = [part.strip() for part in metadata[MERGED_FROM_KEY][: LONGEST * MOST].split(",") if part.strip()]
        parents = tuple(_named(each, "") for each in names[:MOST])
        made = _Made(f"a merge of {len(parents)}", parents, CUT if len(names) > MOST else "")
    else:
        made = _Made()
    return Ancestor(_short(name), made=made.how, parents=made.parents, note=made.note)


def named_parents(metadata: Mapping[str, str]) -> list[dict[str, str]]:
    """The models that one was made of, each once: its "name", and its hashes by kind."""
    found: list[dict[str, str]] = []
    for parent in read_lineage(metadata, "").models():
        named = {"name": parent.name, **parent.hashes}
        if named not in found:
            found.append(named)
    return found


@dataclass(frozen=True, slots=True)
class _Made:
    """How a model came about."""

    how: str = ""
    parents: tuple[Ancestor, ...] = ()
    note: str = ""


class _Reader:
    """Reads the records of one file. `known` are other tools' models by sha256."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known = {key.lower(): entry for key, entry in known.items() if isinstance(entry, dict)}
        self._left = MOST
        self._told: set[str] = set()  # of these the parents were told

    def _has_room(self) -> bool:
        self._left -= 1
        return self._left >= 0

    # --- our recipe ---

    def of_recipe(self, data: Any) -> _Made:
        """What the recipe of an output says."""
        recipe = _Recipe.of(data)
        if recipe is None:
            return _Made(note=DAMAGED)
        sources = [(role, name) for role in ("model", "vae") if isinstance(name := recipe.output.get(role), str)]
        if not sources:
            return _Made(note=DAMAGED)
        (_, model), rest = sources[0], sources[1:]
        if model in recipe.steps:
            self._told.add(model)
            made = self._of_step(recipe, model, (model,))
        else:
            made = _Made("a copy", (self._source(recipe, "", model, ()),))
        return replace(made, parents=(*made.parents, *(self._source(recipe, role, name, ()) for role, name in rest)))

    def _of_step(self, recipe: _Recipe, name: str, trail: tuple[str, ...]) -> _Made:
        step = recipe.steps[name]
        operands = list(recipe.operands(step))
        parents: list[Ancestor] = []
        for role, source in operands:
            if not self._has_room():
                return _Made(_told(step, len(operands)), tuple(parents), CUT)
            parents.append(self._source(recipe, role, source, trail))
        return _Made(_told(step, len(operands)), tuple(parents))

    def _source(self, recipe: _Recipe, role: str, name: str, trail: tuple[str, ...]) -> Ancestor:
        """A model or a step that a step names."""
        if name in recipe.models:
            return self._file(recipe.models[name], role, name)
        if name not in recipe.steps:
            return Ancestor(_short(name), role, note="its record does not say what this is")
        step = Ancestor(_short(name), role, step=True)
        if name in trail:
            return replace(step, note=LOOP)
        if len(trail) >= DEEPEST:
            return replace(step, note=CUT)
        if name in self._told:
            return replace(step, note=ABOVE)
        self._told.add(name)
        made = self._of_step(recipe, name, (*trail, name))
        return replace(step, made=made.how, parents=made.parents, note=made.note)

    def _file(self, entry: dict[str, Any], role: str, name: str) -> Ancestor:
        """A model of the recipe; with what another tool's record, where there is one, has of its file."""
        file = entry.get("file")
        file = file if isinstance(file, str) and file else name
        hashes = {kind: _hash(entry.get(kind), kind) for kind in ("content", "sha256")}
        leaf = Ancestor(_name(file), role, {kind: value for kind, value in hashes.items() if value})
        sha256 = next((key for key, each in self._known.items() if each.get("name") == file), None)
        if sha256 is None or hashes["sha256"] not in (None, sha256):
            return leaf
        also = self._model(sha256, role, ())
        return replace(also, name=leaf.name, hashes={**leaf.hashes, **also.hashes})

    # --- other tools' records ---

    def of_record(self, record: Any, trail: tuple[str, ...]) -> _Made:
        """What a record of A1111's form says; `trail`: the models that led here, by sha256."""
        if not isinstance(record, dict):
            return _Made(note=DAMAGED)
        by_supermerger = "supermerger" in str(record.get("type"))
        said = dict(_supermerger_models(record) if by_supermerger else _a1111_models(record))
        how = _supermerger_told(record, len(said)) if by_supermerger else _a1111_told(record, len(said))
        vae = record.get("bake_in_vae")
        if isinstance(vae, str) and vae not in ("", "None"):
            said["vae"] = vae
        parents: list[Ancestor] = []
        for role, what in said.items():
            if not self._has_room():
                return _Made(how, tuple(parents), CUT)
            parents.append(self._model(what, role, trail))
        return _Made(how, tuple(parents), "" if parents else DAMAGED)

    def _model(self, said: str, role: str, trail: tuple[str, ...]) -> Ancestor:
        """A model that a record names, by its sha256 or as `name [digits]`; with what is known of it."""
        sha256 = _hash(said, "sha256")
        if sha256 is None:
            return _named(said, role)
        entry = self._known.get(sha256, {})
        hashes = {"sha256": sha256} | ({"autov1": v1} if (v1 := _hash(entry.get("legacy_hash"), "autov1")) else {})
        name = entry.get("name")
        model = Ancestor(_name(name) if isinstance(name, str) and name else sha256[:10], role, hashes)
        record = entry.get("sd_merge_recipe")
        record = _parsed(record) if isinstance(record, str) else record
        if record is None:
            return model
        if sha256 in trail:
            return replace(model, note=LOOP)
        if len(trail) >= DEEPEST:
            return replace(model, note=CUT)
        if sha256 in self._told:
            return replace(model, note=ABOVE)
        self._told.add(sha256)
        made = self.of_record(record, (*trail, sha256))
        return replace(model, made=made.how, parents=made.parents, note=made.note)


# --- our recipe as data ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The tables of a recipe, of each only what is a table itself."""

    models: Mapping[str, dict[str, Any]]
    steps: Mapping[str, dict[str, Any]]
    output: Mapping[str, Any]

    @classmethod
    def of(cls, data: Any) -> _Recipe | None:
        """The recipe in parsed data, if there is one."""
        if not isinstance(data, dict):
            return None
        models, steps, outputs = (_tables(data.get(key)) for key in ("models", "steps", "outputs"))
        return cls(models, steps, next(iter(outputs.values()))) if outputs else None

    def operands(self, step: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The models and steps that a step names, each with what the operation calls it."""
        for role, value in step.items():
            if role == "expr" and isinstance(value, str):
                words = dict.fromkeys(word.strip("'\"") for word in _WORD.findall(value))
                yield from (("", word) for word in words if self._has(word))
            elif role not in _NOT_TOLD:
                for each in value if isinstance(value, list) else [value]:
                    each = each.get("lora") if isinstance(each, dict) else each
                    if isinstance(each, str):
                        prompt = _LORA.match(each)
                        name = prompt[1] if prompt else each
                        if self._has(name):
                            yield role, name

    def _has(self, name: str) -> bool:
        return name in self.models or name in self.steps


def _tables(value: Any) -> dict[str, dict[str, Any]]:
    return {key: each for key, each in value.items() if isinstance(each, dict)} if isinstance(value, dict) else {}


def _told(step: Mapping[str, Any], operands: int) -> str:
    """An operation in a few words: "weighted_sum of 2, alpha 0.3"."""
    operation = _short(str(step.get("op") or "an operation"))
    alpha = step.get("alpha")
    if operation in _FACTORS and _is_number(alpha):
        return f"{operation} ×{_number(alpha)}"
    if isinstance(step.get("expr"), str):
        return f"{operation} {_cut(step['expr'], 2 * LONGEST_VALUE)}"
    told = [f"{operation} of {operands}"]
    for key, value in step.items():
        words = None if key in _NOT_TOLD else _value(value, weights=key in ("alpha", "beta"))
        if words is not None and len(told) <= MOST_PARAMETERS:
            told.append(f"{_cut(key)} {words}")
    return ", ".join(told)


def _value(value: Any, *, weights: bool) -> str | None:
    """A parameter's value, as far as it can be said shortly; None of what names models."""
    if _is_number(value):
        return _number(value)
    if isinstance(value, dict | list) and weights:
        preset = value.get("preset") if isinstance(value, dict) else None
        return f"by block ({_cut(preset)})" if isinstance(preset, str) else "by block"
    if isinstance(value, str) and weights:
        return "by block" if "," in value else f"by block ({_cut(value)})"
    return None


# --- other tools' records as data --------------------------------------------------------------------


def _a1111_models(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    number = {"No interpolation": 1, "Weighted sum": 2}.get(str(record.get("interp_method")), 3)
    for role, place in zip("abc"[:number], ("primary", "secondary", "tertiary"), strict=False):
        said = record.get(f"{place}_model_hash")
        if isinstance(said, str) and said:
            yield role, said


def _a1111_told(record: Mapping[str, Any], models: int) -> str:
    method = str(record.get("interp_method") or "a merge")
    if method == "No interpolation":
        return "a copy"
    step = {"op": _METHODS.get(method, method), "alpha": record.get("multiplier")}
    return _told(step, models)


def _supermerger_models(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    mode, calculation = str(record.get("mode")), record.get("calcmode")
    three = calculation in _OF_THREE or (calculation in (None, "normal") and "Weight" not in mode)
    for role in "abc"[: 1 if calculation in _OF_ONE else 3 if three else 2]:
        said = record.get(f"model_{role}")
        if isinstance(said, str) and said:
            yield role, said


def _supermerger_told(record: Mapping[str, Any], models: int) -> str:
    calculation = record.get("calcmode")
    how = f" ({_cut(str(calculation))})" if calculation not in (None, "", "normal") else ""
    alpha = "alpha by block" if record.get("mbw") else ""
    if not alpha and _is_number(record.get("base_alpha")):
        alpha = f"alpha {_number(record['base_alpha'])}"
    mode = _cut(str(record.get("mode") or "a merge"))
    return ", ".join(filter(None, (f"{mode}{how} of {models}, by supermerger", alpha)))


def _named(said: str, role: str) -> Ancestor:
    """A model as the WebUI names it: "name.safetensors [543bcbc212]"."""
    parsed = _NAMED.fullmatch(said[: 4 * LONGEST])
    if parsed is None:
        return Ancestor(_name(said), role)
    kind = _DIGITS.get(len(parsed["hash"]))
    return Ancestor(_name(parsed["name"]), role, {kind: parsed["hash"].lower()} if kind else {})


# --- values ------------------------------------------------------------------------------------------


def _parsed(text: Any) -> Any:
    """A JSON object, or None of what is none."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _hash(value: Any, kind: str) -> str | None:
    """A hash of a kind in lower case; None of what is none, nor of one that was never filled in."""
    if not isinstance(value, str) or _DIGITS.get(len(value)) != kind or not re.fullmatch("[0-9a-fA-F]+", value):
        return None
    return None if value in (NO_CONTENT_HASH, NO_SHA256, "0" * 8) else value.lower()


def _name(file: str) -> str:
    return _short(file.replace("\\", "/"))


def _short(text: str) -> str:
    return _cut(text, LONGEST)


def _cut(text: str, most: int = LONGEST_VALUE) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    try:
        return f"{value:g}" if math.isfinite(value) else str(value)
    except OverflowError:  # an integer beyond every float
        return "too large a number"
