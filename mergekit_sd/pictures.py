"""Pictures of models: of files, of graphs that were never written, of a recipe's models, steps and outputs.

Owns how such a question becomes a recipe with samples. The room `sampling` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_sd.api import find_input, load
from mergekit_sd.errors import UsageError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.graph import Node, graph_data
from mergekit_sd.planning.build import PlanOptions
from mergekit_sd.recipe.load import Recipe, recipe_from_data
from mergekit_sd.recipe.sweep import read_sweep
from mergekit_sd.sampling.values import Picture, SamplingReport, joined
from mergekit_sd.text import did_you_mean, shown

if TYPE_CHECKING:
    from mergekit_sd.sampling.session import SampleOptions, Session

Source: TypeAlias = "str | Path | Node | Recipe"

__all__ = ["extraction_samples", "injection_samples", "prepare_samples", "sample", "samples_recipe", "sweep"]


def samples_recipe(
    sources: Source | Sequence[Source],
    *,
    of: Sequence[str] = (),
    set: Mapping[str, object] | None = None,
    **asked: Any,
) -> Recipe:
    """The recipe that `sample` makes the pictures of.

    A recipe, or its file (.toml), is taken with its own samples, those of `of` only; what is asked beside counts
    for all of them. With a prompt it is one sample instead, of `of` (the outputs, unless told). Model files and
    graphs become a recipe of those models. `asked` are a sample's keys: prompt, negative, seeds, steps, cfg, sampler,
    size, clip_skip, cfg_rescale, extras, control.
    """
    listed = [sources] if isinstance(sources, str | Path | Node | Recipe) else list(sources)
    entry = {key: value for key, value in asked.items() if value is not None}
    recipes = [each for each in listed if isinstance(each, Recipe) or _is_recipe(each)]
    if recipes:
        if len(listed) > 1:
            raise UsageError("A recipe is sampled alone.", hint="give one recipe, or model files")
        recipe = load(recipes[0], set)  # type: ignore[arg-type]
        return _asked_of(recipe, of, entry)
    if set:
        raise UsageError("Only a recipe's values can be set.", key="--set", hint="give a recipe, or leave it out")
    if "prompt" not in entry:
        raise UsageError("There is nothing to draw.", key="--prompt", hint='say what: --prompt "a lantern in the rain"')
    data = _of_models(listed)
    names = list(of) or [*data.get("outputs", data["models"])]
    return recipe_from_data({**data, "samples": [{"of": names, **entry}]}, folder=Path())


def sample(
    sources: Source | Sequence[Source],
    prompt: str | None = None,
    *,
    of: Sequence[str] = (),
    set: Mapping[str, object] | None = None,
    on_event: Listener = ignore,
    on_picture: Callable[[Picture], None] = lambda _: None,
    cancel: CancelToken | None = None,
    options: SampleOptions | None = None,
    **asked: Any,
) -> SamplingReport:
    """Pictures of models, in memory, and what was found of them; `write_samples` writes them.

    For `sources`, `of`, `set` and `asked` see `samples_recipe`. Raises RecipeError (exit code 2), InputError (3),
    EnvironmentFault (4; where diffusers is not installed, too), Cancelled (130).
    """
    recipe = samples_recipe(sources, of=of, set=set, prompt=prompt, **asked)
    return prepare_samples(recipe, options=options, on_event=on_event, on_picture=on_picture, cancel=cancel).run()


def prepare_samples(
    recipe: Recipe,
    *,
    options: SampleOptions | None = None,
    written: Mapping[str, Path] | None = None,
    on_event: Listener = ignore,
    on_picture: Callable[[Picture], None] = lambda _: None,
    cancel: CancelToken | None = None,
) -> Session:
    """A sampling run with everything found and checked that can be before a network is loaded; `run()` makes it.

    `written`: outputs that are files already, by name: these are read, not computed again.
    """
    from mergekit_sd.sampling.packages import need_packages
    from mergekit_sd.sampling.session import SampleOptions, Session

    need_packages()
    options = options or SampleOptions()
    options = replace(options, plan=options.plan or PlanOptions(find=find_input))
    return Session(recipe, options, on_event, on_picture, cancel or CancelToken(), written or {})


def sweep(
    path: str | Path,
    *,
    set: Mapping[str, object] | None = None,
    options: SampleOptions | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
    **asked: Any,
) -> SamplingReport:
    """Pictures of every variant of a recipe with `{ try = […] }`, nothing written; `asked` as for `samples_recipe`.

    The report's notes tell how each variant is run. Raises as `sample` does.
    """
    import shlex  # here: a run needs it not

    entry = {key: value for key, value in asked.items() if value is not None}
    variants = read_sweep(path, set)
    recipes = [_asked_of(each.recipe, (), entry) for each in variants]
    sessions = [prepare_samples(each, options=options, on_event=on_event, cancel=cancel) for each in recipes]
    made = joined([session.run() for session in sessions])
    notes = tuple(
        f"{each.name}: mergekit-sd run {shlex.join([str(path), *_settings(each.values)])}" for each in variants
    )
    return replace(made, notes=(*made.notes, *notes))


def extraction_samples(
    tuned: str | Path, base: str | Path, lora: str | Path, prompt: str, seeds: Sequence[int]
) -> Recipe:
    """The recipe that shows what an extracted LoRA keeps: pictures of tuned, of base with the LoRA, of base."""
    files = {"tuned": tuned, "base": base, "LoRA": lora}
    data = {
        "recipe": 1,
        "title": f"{Path(lora).stem}: what the LoRA keeps",
        "models": {name: str(Path(path).absolute()) for name, path in files.items()},
        "steps": {"base + LoRA": {"op": "inject_lora", "model": "base", "loras": ["LoRA"]}},
        "samples": [{"of": ["tuned", "base + LoRA", "base"], "prompt": prompt, "seeds": list(seeds)}],
    }
    return recipe_from_data(data, folder=Path.cwd())


def injection_samples(
    model: str | Path, baked: str | Path, loras: Mapping[Path, tuple[float, float]], prompt: str, seeds: Sequence[int]
) -> Recipe:
    """The recipe that shows an injection: the model without, baked, and with the LoRAs in the prompt.

    `loras`: by file, the strengths for text encoder and UNet.
    """
    tags = "".join(f" <lora:{path.stem}:{encoder:g}:{unet:g}>" for path, (encoder, unet) in loras.items())
    common = {"seeds": list(seeds), "extras": [str(path.absolute()) for path in loras]}
    data = {
        "recipe": 1,
        "title": f"{Path(baked).stem}: a LoRA baked in, and in the prompt",
        "models": {"model": str(Path(model).absolute()), "baked": str(Path(baked).absolute())},
        "samples": [
            {"of": ["model", "baked"], "prompt": prompt, **common},
            {"of": ["model"], "prompt": prompt + tags, **common},
        ],
    }
    return recipe_from_data(data, folder=Path.cwd())


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def _is_recipe(source: Source) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(".toml")


def _asked_of(recipe: Recipe, of: Sequence[str], entry: Mapping[str, Any]) -> Recipe:
    """A recipe with the samples that are asked for."""
    if "prompt" in entry:
        return _with_sample(recipe, of, entry)
    if not recipe.samples:
        hint = 'add [[samples]] to it, or say what to draw: --prompt "a lantern in the rain"'
        raise recipe.error("The recipe has no samples.", hint=hint)
    if not (of or entry):
        return recipe
    known = list(dict.fromkeys(name for sample in recipe.samples for name in sample.of))
    for name in of:
        if name not in known:
            message = f'No sample of the recipe is of "{shown(name)}".'
            raise UsageError(message, key="--of", hint=did_you_mean(name, known))
    wanted = [(each, [name for name in each["of"] if not of or name in of]) for each in recipe.data["samples"]]
    samples = [{**each, **entry, "of": names} for each, names in wanted if names]
    return recipe_from_data({**recipe.data, "samples": samples}, folder=recipe.folder, path=recipe.path)


def _with_sample(recipe: Recipe, of: Sequence[str], entry: Mapping[str, Any]) -> Recipe:
    names = list(of) or [*recipe.outputs]
    if not names:
        raise recipe.error("The recipe has no outputs.", hint="say what to sample: --of NAME")
    data = {**recipe.data, "samples": [{"of": names, **entry}]}
    return recipe_from_data(data, folder=recipe.folder, path=recipe.path)


def _of_models(sources: Sequence[Source]) -> dict[str, Any]:
    """Plain data of a recipe whose outputs are one graph, or whose models are files."""
    if len(sources) == 1 and isinstance(sources[0], Node):
        return graph_data(sources[0], {"file": "never-written.safetensors", "dtype": "fp32"}, None)
    models: dict[str, str] = {}
    for source in sources:
        if not isinstance(source, str | Path):
            raise UsageError("Several models are sampled together only as files.", hint="sample a graph alone")
        stem = Path(source).stem or "model"
        name = next(each for n in range(len(models) + 1) if (each := f"{stem}-{n + 1}" if n else stem) not in models)
        plain = not (set(str(source)) & {":", "~"})  # no root of the user's, no home
        models[name] = str(source if plain else Path(source).absolute())
    return {"recipe": 1, "models": models}
