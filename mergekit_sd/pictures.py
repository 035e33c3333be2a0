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
from mergekit_sd.sampling.values import Picture, SamplingReport

if TYPE_CHECKING:
    from mergekit_sd.sampling.session import SampleOptions, Session

Source: TypeAlias = "str | Path | Node | Recipe"

__all__ = ["prepare_samples", "sample", "samples_recipe"]


def samples_recipe(
    sources: Source | Sequence[Source],
    *,
    of: Sequence[str] = (),
    set: Mapping[str, object] | None = None,
    **asked: Any,
) -> Recipe:
    """The recipe that `sample` makes the pictures of.

    A recipe, or its file (.toml), is taken with its own samples, or with one of `asked` for `of` (its outputs,
    unless told). Model files and graphs become a recipe of those models. `asked` are a sample's keys: prompt,
    negative, seeds, steps, cfg, sampler, size, clip_skip, cfg_rescale, extras, control.
    """
    listed = [sources] if isinstance(sources, str | Path | Node | Recipe) else list(sources)
    entry = {key: value for key, value in asked.items() if value is not None}
    recipes = [each for each in listed if isinstance(each, Recipe) or _is_recipe(each)]
    if recipes:
        if len(listed) > 1:
            raise UsageError("A recipe is sampled alone.", hint="give one recipe, or model files")
        recipe = load(recipes[0], set)  # type: ignore[arg-type]
        return _with_sample(recipe, of, entry) if entry else _chosen(recipe, of)
    if "prompt" not in entry:
        raise UsageError("There is nothing to draw.", key="--prompt", hint='say what: --prompt "a lantern in the rain"')
    data = _of_models(listed)
    names = list(of) or [*data.get("outputs", data["models"])]
    return recipe_from_data({**data, "samples": [{"of": names, **entry}]}, folder=Path.cwd())


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


def _is_recipe(source: Source) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(".toml")


def _chosen(recipe: Recipe, of: Sequence[str]) -> Recipe:
    """A recipe's own samples, those of `of` only."""
    if not recipe.samples:
        hint = 'add [[samples]] to it, or say what to draw: --prompt "a lantern in the rain"'
        raise recipe.error("The recipe has no samples.", hint=hint)
    if not of:
        return recipe
    data = dict(recipe.data)
    data["samples"] = [
        {**entry, "of": [name for name in entry["of"] if name in of]}
        for entry in data["samples"]
        if {*entry["of"]} & {*of}
    ]
    if not data["samples"]:
        raise recipe.error(f'No sample of the recipe is of "{of[0]}".', hint='give a prompt, too: --prompt "…"')
    return recipe_from_data(data, folder=recipe.folder, path=recipe.path)


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
        models[name] = str(Path(source).absolute())
    return {"recipe": 1, "models": models}
