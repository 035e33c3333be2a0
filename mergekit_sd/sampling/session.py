"""Pictures of a recipe's models, steps and outputs: one model in memory at a time, parents before their children.

Owns the order and what is measured beside the pictures. Must not know where pictures are written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mergekit_sd.errors import InputError, MergekitError
from mergekit_sd.events import CancelToken, Listener, MemoryTold, Sampling
from mergekit_sd.inspection.position_ids import position_ids
from mergekit_sd.lazy import torch
from mergekit_sd.library import look_up
from mergekit_sd.machine import available_memory
from mergekit_sd.planning.build import PlanOptions
from mergekit_sd.planning.samples import plan_sampled
from mergekit_sd.planning.values import Input, Plan
from mergekit_sd.recipe.graph import reachable, spaces
from mergekit_sd.recipe.load import Recipe
from mergekit_sd.recipe.loras import LoraUse
from mergekit_sd.sampling.checks.measuring import Measured, measure
from mergekit_sd.sampling.checks.pictures import check_pictures
from mergekit_sd.sampling.checks.probes import Probes, load_probes, own_set
from mergekit_sd.sampling.checks.run import compare
from mergekit_sd.sampling.checks.soundness import Seen, check_file
from mergekit_sd.sampling.control import Control, load_control
from mergekit_sd.sampling.declared import picture_size, probe_set, usage_hint
from mergekit_sd.sampling.decoding import Decoded, decode
from mergekit_sd.sampling.denoise import denoise
from mergekit_sd.sampling.hypernetworks import applied
from mergekit_sd.sampling.memory import memory_need, peak_memory
from mergekit_sd.sampling.networks import load_networks
from mergekit_sd.sampling.packages import quiet
from mergekit_sd.sampling.prompts import encode
from mergekit_sd.sampling.shots import Shot, groups_of, hinted, settled, shots_of
from mergekit_sd.sampling.tensors import check_numbers, default_dtype, plan_networks
from mergekit_sd.sampling.values import Chart, Check, Picture, SamplingReport, Settings
from mergekit_sd.sampling.weights import made_of, weights_chart
from mergekit_sd.text import listed, shown

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_sd.sampling.conditions import Condition
    from mergekit_sd.sampling.networks import Networks

Checks = Literal["full", "quick", "none"]
Loras: TypeAlias = "tuple[tuple[LoraUse, Path | None], ...]"
OnPicture: TypeAlias = Callable[[Picture], None]


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How pictures are made, whatever the recipe asks for.

    `checks`: "full" measures every model and its parents on probes, "quick" looks at pictures and weights only.
    `probes`: a probes file, and the name of a set in it. `vae`: a file whose VAE all models get. `batch`: rows of
    one call of the UNet. `tiled`: None decides by size. `dtype`: None for what is fastest on the device.
    """

    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    batch: int = 8
    tiled: bool | None = None
    checks: Checks = "full"
    probes: Path | None = None
    probe_set: str | None = None
    vae: Path | None = None
    plan: PlanOptions | None = None


@dataclass(slots=True)
class _Seen:
    """What came of one model."""

    pictures: list[Picture] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    measured: Measured | None = None


class Session:
    """One run. `prepare` finds all that can be refused from headers and text alone."""

    def __init__(
        self,
        recipe: Recipe,
        options: SampleOptions,
        on_event: Listener,
        on_picture: OnPicture,
        cancel: CancelToken,
        written: Mapping[str, Path],
    ) -> None:
        self._recipe = recipe
        self._options = options
        self._on_event = on_event
        self._on_picture = on_picture
        self._cancel = cancel
        self._written = written  # outputs that are files already
        self._began = time.monotonic()
        self._done = 0
        self._notes: list[str] = []
        self._seen: dict[str, _Seen] = {}
        self.shots = shots_of(recipe)
        self.names = tuple(dict.fromkeys(name for shot in self.shots for name in shot.of))
        self.parents = {name: self._parents_of(name) for name in self.names}
        self._plans: dict[tuple[str, Loras], Plan] = {}
        self._plan_all()
        for plan in self.plans:
            check_numbers(self._dtype_of(plan), options.device)

    @cached_property
    def steps(self) -> int:
        """Steps of all pictures together."""
        return sum(
            len(shot.settings.seeds) * self._settled(shot, name).steps for shot in self.shots for name in shot.of
        )

    @property
    def plans(self) -> tuple[Plan, ...]:
        """A plan for each model that is loaded, with and without LoRAs."""
        return tuple(self._plans.values())

    def run(self) -> SamplingReport:
        """All of it."""
        probes = self._probes() if self._options.checks == "full" else None
        with quiet(), _threads(self._options.threads):
            self._tell_memory()
            for name in self._order():
                self._sample(name, probes)
        checks, charts = self._judged()
        weights = [weights_chart(self._recipe, name, self._plans[name, ()]) for name in self.names]
        recipe = self._recipe
        return SamplingReport(
            title=recipe.title or (recipe.path.stem if recipe.path else listed(self.names)),
            recipe=recipe.path.read_text(encoding="utf-8") if recipe.path else None,
            models=self.names,
            parents=tuple(dict.fromkeys(each for name in self.names for each in self.parents[name])),
            pictures=tuple(picture for name in self.names for picture in self._seen[name].pictures),
            checks=checks,
            charts=(*(each for each in weights if each), *charts),
            notes=tuple(self._notes),
            made={name: words for name in self.names if (words := made_of(self._recipe, name, self._plans[name, ()]))},
            machine=self._machine(),
        )

    # --- plans ------------------------------------------------------------------------------------------

    def _parents_of(self, name: str) -> tuple[str, ...]:
        """The models that a step or output is made of; a model has none."""
        if name in self._recipe.models and name not in self._recipe.outputs:
            return ()
        return tuple(each for each in reachable(self._recipe, [name]).models if each != name)

    def _order(self) -> list[str]:
        """Parents first, whether or not pictures of them are asked for."""
        measured = self._options.checks == "full"
        parents = [each for name in self.names for each in self.parents[name]] if measured else []
        first = [each for each in dict.fromkeys(parents) if ((each, ()) in self._plans)]
        return list(dict.fromkeys([*first, *(name for name in self.names if not self.parents[name]), *self.names]))

    def _plan_all(self) -> None:
        wanted = dict.fromkeys(self.names)
        for name, plan in self._planned(wanted).items():
            self._plans[name, ()] = plan
        for name in self.names:
            for loras, _ in groups_of(self.shots, name)[1:]:
                self._plans[name, loras] = self._planned([name], loras)[name]
        if self._options.checks == "full":
            for parent in dict.fromkeys(each for name in self.names for each in self.parents[name]):
                if (parent, ()) not in self._plans and (whole := self._whole(parent)):
                    self._plans[parent, ()] = whole

    def _planned(self, names: Iterable[str], loras: Loras = ()) -> dict[str, Plan]:
        options = self._options
        return plan_sampled(
            self._recipe, list(names), options.plan, vae=options.vae, loras=loras, written=self._written
        )

    def _whole(self, parent: str) -> Plan | None:
        """The plan of a parent that can be asked; a LoRA and a VAE, which are parents as well, cannot."""
        if spaces(self._recipe)[parent] != "weight":
            return None
        plan = self._planned([parent])[parent]
        if plan.inputs[0].layout.kind != "checkpoint":
            return None
        try:
            plan_networks(plan)
        except InputError as error:
            self._notes.append(f"nothing is compared with the parent {shown(parent)}: {error.message}")
            return None
        return plan

    def _dtype_of(self, plan: Plan) -> str:
        return self._options.dtype or default_dtype(plan_networks(plan), self._options.device)

    def _settled(self, shot: Shot, name: str) -> Settings:
        """What the sample leaves open is as the output declares, or as the files say that the model is made of."""
        plan, output = self._plans[name, ()], self._recipe.outputs.get(name)
        declared = output.sampling if output else None
        return settled(shot, hinted(usage_hint(plan)) if declared is None else declared, picture_size(plan))

    def _probes(self) -> Probes:
        """Those asked for, else those of the package that all the models say they understand."""
        options = self._options
        if options.probes or options.probe_set:
            return load_probes(options.probes, options.probe_set)
        said = {probe_set(plan) for plan in self.plans}
        return load_probes(None, own_set(said.pop() if len(said) == 1 else None))

    # --- one model --------------------------------------------------------------------------------------

    def _sample(self, name: str, probes: Probes | None) -> None:
        seen = self._seen[name] = _Seen()
        for loras, shots in groups_of(self.shots, name):
            plain = not loras
            if not shots and not (plain and probes):
                continue
            networks = self._loaded(name, loras)
            if plain:
                seen.nonfinite = dict(networks.nonfinite)
            for shot in shots:
                self._shoot(name, networks, shot, seen)
            if plain and probes:
                self._tell(name, "checks")
                seen.measured = self._measured(name, networks, probes)
            del networks

    def _loaded(self, name: str, loras: Loras) -> Networks:
        self._tell(name, "loading")
        options = self._options
        return load_networks(
            self._plans[name, loras],
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            on_event=self._on_event,
            cancel=self._cancel,
        )

    def _shoot(self, name: str, networks: Networks, shot: Shot, seen: _Seen) -> None:
        settings = self._settled(shot, name)
        assert settings.size
        guidance = encode(
            networks,
            shot.positive,
            shot.negative,
            settings.steps,
            clip_skip=settings.clip_skip,
            embeddings=shot.embeddings,
        )
        control = [
            Control(load_control(each.net, networks), each.picture, each.weight, each.start, each.end)
            for each in shot.control
        ]
        digits = self._model_hash(name)
        with applied(networks.unet, shot.hypernets):
            for seeds in _batches(settings.seeds, max(1, self._options.batch // 2)):
                before = self._done
                latents = denoise(
                    networks,
                    guidance,
                    settings=settings,
                    seeds=seeds,
                    size=settings.size,
                    batch=self._options.batch,
                    control=control,
                    on_step=partial(self._stepped, name, before, len(seeds)),
                    cancel=self._cancel,
                )
                self._done = before + len(seeds) * settings.steps
                for seed, decoded in zip(seeds, decode(networks.vae, latents, tiled=self._options.tiled), strict=True):
                    picture = Picture(name, settings, seed, decoded.pixels, digits)
                    seen.pictures.append(picture)
                    seen.decoded.append(decoded)
                    self._on_picture(picture)

    def _stepped(self, name: str, before: int, pictures: int, step: int, _steps: int, _latents: Tensor) -> None:
        self._done = before + step * pictures
        self._tell(name, "pictures")

    def _tell(self, name: str, stage: str) -> None:
        self._on_event(Sampling(name, stage, self._done, self.steps, time.monotonic() - self._began))

    def _tell_memory(self) -> None:
        """What the largest model will take, before any is loaded."""
        rows = max(1, self._options.batch // 2)
        needs = []
        for (name, _), plan in self._plans.items():
            planned, dtype = plan_networks(plan), self._dtype_of(plan)
            for shot in self.shots:
                if name in shot.of:
                    size = self._settled(shot, name).size or picture_size(plan)
                    needs.append(memory_need(planned, dtype, size, min(rows, len(shot.settings.seeds))))
        peak = max((need.peak for need in needs), default=0)
        free = available_memory()
        self._on_event(MemoryTold(peak, free[0] if free else None))

    # --- checks -----------------------------------------------------------------------------------------

    def _measured(self, name: str, networks: Networks, probes: Probes) -> Measured | None:
        def encoded(prompt: str) -> Condition:
            return encode(networks, prompt, "", 1).positive(0)[0][0]

        known = {each: self._seen[each].measured for each in self.parents.get(name, ()) if each in self._seen}
        return measure(
            networks, encoded, probes, against={each: found for each, found in known.items() if found is not None}
        )

    def _judged(self) -> tuple[tuple[Check, ...], tuple[Chart, ...]]:
        if self._options.checks == "none":
            return (), ()
        checks: list[Check] = []
        charts: list[Chart] = []
        for name in self.names:
            own = self._seen[name]
            parents = [each for each in self.parents[name] if each in self._seen]
            seen = Seen(
                nan_latents=any(each.nan_latents for each in own.decoded),
                nan_decode=any(each.nan_decode for each in own.decoded),
                in_fp32=any(each.in_fp32 for each in own.decoded),
                position_ids=self._position_ids(name),
                mixed_vae=self._mixes_vaes(name),
                only_models=all(each in self._seen for each in self.parents[name]),
            )
            if own.measured is not None:
                others = {each: known for each in parents if (known := self._seen[each].measured) is not None}
                found, drawn = compare(name, own.measured, others, seen)
                checks += found
                charts += drawn
            else:
                checks += check_file(name, own.nonfinite, seen)
            beside = [picture for each in parents for picture in self._seen[each].pictures]
            checks += check_pictures(name, own.pictures, beside, mixed_vae=seen.mixed_vae)
        return tuple(checks), tuple(charts)

    def _mixes_vaes(self, name: str) -> bool:
        """Whether the plan warns of it, of a step that this model is made by."""
        steps = [each for each in reachable(self._recipe, [name]).steps if self.parents[name]]
        return any(f'step "{step}" mixes' in each for each in self._plans[name, ()].warnings for step in steps)

    def _file(self, name: str) -> Input | None:
        """The file that is drawn with as it is; None for what is made here."""
        if name in self._recipe.outputs:
            return None
        return next((each for each in self._plans[name, ()].inputs if each.name == name), None)

    def _model_hash(self, name: str) -> str | None:
        """The file's first ten digits, where the library has its sha256: reading all of a model for it is too dear."""
        source = self._file(name)
        try:
            sha256 = source and look_up(source.file.path).hashes.get("sha256")
        except MergekitError:  # an index that cannot be read spoils no picture
            return None
        return sha256[:10] if sha256 else None

    def _position_ids(self, name: str) -> Any:
        """As the file that is sampled has them; what a run writes is reset, and a step is not written."""
        source = self._file(name)
        if source is None:
            return None
        found = position_ids(source.file, source.layout)
        return found.state if found else None

    def _machine(self) -> dict[str, Any]:
        return {
            "device": self._options.device,
            "dtype": self._options.dtype or "auto",
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
            "transformers": version("transformers"),
            "peak_memory": peak_memory(self._options.device),
            "seconds": round(time.monotonic() - self._began, 1),
        }


def _batches(seeds: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), most):
        yield seeds[start : start + most]


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if wanted:
            torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)
