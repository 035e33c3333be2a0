"""The public API: what the command line, the terminal UI and scripts are made of.

Owns the calls and what they return. Each is thin: the rooms below do the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_sd.errors import InputError, NotWritable, OutputExists, PinMismatch
from mergekit_sd.events import CancelToken, Listener, Noted, ignore
from mergekit_sd.execute.run import Made, OutputReport, RunOptions, check_pins, execute
from mergekit_sd.formats.dtypes import OUTPUT_DTYPES
from mergekit_sd.formats.hashing import FileHashes, OnBytes, hash_file_tensors
from mergekit_sd.formats.open import open_model
from mergekit_sd.graph import Node, graph_data, parents
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.planning.build import PlanOptions, build_plan, check_targets
from mergekit_sd.planning.paths import Findings, Sought
from mergekit_sd.planning.report import plan_as_json
from mergekit_sd.planning.values import MetadataStyle, Plan, PlannedOutput
from mergekit_sd.recipe.load import Recipe, load_recipe, recipe_from_data
from mergekit_sd.recipe.lock import (
    Lock,
    LockedInput,
    LockedOutput,
    fingerprint,
    lock_path,
    read_lock,
    sweep_draft,
    write_lock,
)
from mergekit_sd.recipe.write import recipe_text
from mergekit_sd.version import VERSION

__all__ = [
    "OPERATIONS",
    "OUTPUT_DTYPES",
    "Recipe",
    "RunReport",
    "check_run",
    "find_input",
    "load",
    "make_outputs",
    "plan",
    "plan_as_json",
    "recipe_of",
    "recipe_text",
    "save",
    "save_recipe",
]


@dataclass(frozen=True)
class RunReport:
    """What a run made. `skipped`: outputs that the lock says are done, by name."""

    recipe: str | None
    outputs: tuple[OutputReport, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    lock: str | None
    samples: Mapping[str, Any] | None = None
    """What was drawn, as plain data with its folder; None where nothing was asked for, or it could not be."""

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "recipe": self.recipe,
            "outputs": [each.as_json() for each in self.outputs],
            "skipped": list(self.skipped),
            "warnings": list(self.warnings),
            "lock": self.lock,
            "samples": self.samples,
        }


def load(recipe: str | Path | Recipe, set: Mapping[str, object] | None = None) -> Recipe:
    """Read and check a recipe, without opening a model; `set` maps dotted paths to values."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, set or {})


def plan(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, object] | None = None,
    output_root: str | Path | None = None,
    anywhere: bool = False,
    metadata: MetadataStyle = "full",
) -> Plan:
    """What a run would do, from headers alone. Raises what `run` would raise by then.

    `anywhere`: outputs may lie outside the recipe's folder, `output_root` and the roots.
    """
    root = Path(output_root) if output_root else None
    return build_plan(load(recipe, set), PlanOptions(root, anywhere, metadata, find=find_input))


def check_run(plan: Plan, *, force: bool = False) -> None:
    """Raise what a run of this plan would raise before it computes: targets, disk, pins."""
    check_targets(plan, force)
    check_pins(plan, hasher=_file_hashes)


def make_outputs(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, object] | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
    output_root: str | Path | None = None,
    anywhere: bool = False,
    metadata: MetadataStyle = "full",
    locked: bool = False,
    skip_done: bool = False,
    **options: Any,
) -> RunReport:
    """Make every output of a recipe, and write its lock; no pictures.

    `options` are those of RunOptions: force, threads, allow_nonfinite, scan, sha256 (of every input, for the
    lock). Raises RecipeError
    (exit code 2), InputError (3), EnvironmentFault (4), Cancelled (130); see `mergekit_sd.errors`.
    """
    checked = load(recipe, set)
    made = plan(checked, output_root=output_root, anywhere=anywhere, metadata=metadata)
    where = lock_path(checked.path) if checked.path else None
    lock = read_lock(where) if where and (locked or skip_done) else None
    if locked:
        options |= _expected(made, lock, where)
    skipped = _done(made, lock) if skip_done and lock else ()
    rest = tuple(output for output in made.outputs if output.name not in skipped)
    if not rest:
        return RunReport(str(checked.path), (), skipped, made.warnings, str(where))
    if skipped:  # the inputs were compared with the lock just now
        options.pop("expected_inputs", None)
    if where and not locked:
        sweep_draft(where)
    result = execute(replace(made, outputs=rest), RunOptions(**options, file_hashes=_file_hashes), on_event, cancel)
    warnings = list(made.warnings)
    if where and not locked:
        try:
            write_lock(where, _lock_of(made, result, lock if skipped else None))
        except OSError as error:
            warnings.append(f"the lock was not written: {error}")
            on_event(Noted(warnings[-1]))
    return RunReport(
        str(checked.path) if checked.path else None,
        result.outputs,
        skipped,
        tuple(warnings),
        str(where) if where else None,
    )


def save(
    node: Node,
    path: str | Path,
    *,
    dtype: str | Mapping[str, str] = "fp16",
    title: str | None = None,
    metadata: MetadataStyle = "full",
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
    force: bool = False,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    scan: bool = False,
    **output: Any,
) -> OutputReport:
    """Write a graph's result to a file, in one streaming pass.

    `output` takes `seed`, and the other keys of a recipe's output: vae (an opened model), overflow, junk,
    ema, position_ids, prediction. Raises as `run` does; OutputExists where the file is there and not `force`.
    """
    recipe = recipe_of(node, path, dtype=dtype, title=title, **output)
    made = plan(recipe, anywhere=True, metadata=metadata)
    options = RunOptions(
        force=force, threads=threads, allow_nonfinite=allow_nonfinite, scan=scan, file_hashes=_file_hashes
    )
    return execute(made, options, on_event, cancel).outputs[0]


def recipe_of(
    node: Node,
    path: str | Path,
    *,
    dtype: Any = "fp16",
    title: str | None = None,
    vae: Node | None = None,
    seed: int | None = None,
    **output: Any,
) -> Recipe:
    """The recipe that `save` runs. Its title is the models' names, unless told; `seed`: for random numbers."""
    target = {"file": str(Path(path).absolute()), "dtype": dict(dtype) if isinstance(dtype, Mapping) else dtype}
    named = title or " + ".join(parents(node))
    top = {"title": named} | ({} if seed is None else {"seed": seed})
    return recipe_from_data(graph_data(node, target | output, vae, **top), folder=Path.cwd())


def save_recipe(recipe: Recipe, path: str | Path, *, force: bool = False) -> None:
    """Write a recipe as a file that `run` takes from where it lies: paths relative to it where they can be."""
    path = Path(path)
    if path.exists() and not force:
        raise OutputExists("The recipe file exists already.", file=path, hint="give --force to replace it")
    folder = path.absolute().parent
    models = {name: {**entry, "file": _beside(entry["file"], folder)} for name, entry in recipe.data["models"].items()}
    outputs = {
        name: {**entry, "file": _beside(entry["file"], folder)} for name, entry in recipe.data["outputs"].items()
    }
    text = recipe_text({**recipe.data, "models": models, "outputs": outputs})
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NotWritable(f"The recipe cannot be written: {error.strerror}.", file=path) from error


def _beside(file: str, folder: Path) -> str:
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def find_input(sought: Sought) -> Findings:
    """Where a model that is not where its recipe says lies, by the library's index."""
    from mergekit_sd.library.finding import find_input  # here, not above: seldom needed, and a library's worth of time

    return find_input(sought)


def _file_hashes(path: Path, on_bytes: OnBytes) -> FileHashes:
    from mergekit_sd.library.known import known_file_hashes

    return known_file_hashes(path, on_bytes)


def _expected(plan: Plan, lock: Lock | None, where: Path | None) -> dict[str, Any]:
    """What a locked run must find, by RunOptions' names; what is seen at once is refused at once."""
    if lock is None:
        raise PinMismatch("There is no lock to keep to.", file=where, hint="run once without --locked")
    if lock.recipe != fingerprint(plan.recipe.data):
        raise PinMismatch("The recipe differs from the one that was locked.", file=where, hint="run without --locked")
    for source in plan.inputs:
        pinned = lock.inputs.get(source.name)
        if pinned is None or pinned.size != source.file.state.size:
            raise PinMismatch(f'"{source.name}" is not the file that was locked.', file=source.file.path)
    return {
        "expected": {name: each.content for name, each in lock.outputs.items()},
        "expected_inputs": {name: each.content for name, each in lock.inputs.items()},
        "hashing": True,
    }


def _done(plan: Plan, lock: Lock) -> tuple[str, ...]:
    """The outputs that the lock's run made as this one would, if its inputs are still the same; by content hashes."""
    if lock.recipe != fingerprint(plan.recipe.data) or lock.version != VERSION:
        return ()
    there = [output for output in plan.outputs if output.name in lock.outputs and output.path.is_file()]
    if not there:
        return ()
    used = _used_tensors(plan)
    for number, source in enumerate(plan.inputs):
        pinned = lock.inputs.get(source.name)
        if pinned is None or pinned.size != source.file.state.size:
            return ()
        if number in used and hash_file_tensors(source.file, used[number]) != pinned.content:
            return ()
    return tuple(output.name for output in there if _is_as_locked(output, lock.outputs[output.name]))


def _is_as_locked(output: PlannedOutput, locked: LockedOutput) -> bool:
    try:
        file = open_model(output.path)
        return file.state.size == locked.size and hash_file_tensors(file) == locked.content
    except InputError:  # damaged since
        return False


def _used_tensors(plan: Plan) -> dict[int, list[str]]:
    used: dict[int, dict[str, None]] = {}
    for output in plan.outputs:
        for number, reads in output.reads().items():
            used.setdefault(number, {}).update(dict.fromkeys(reads))
    return {number: list(names) for number, names in used.items()}


def _lock_of(plan: Plan, made: Made, before: Lock | None) -> Lock:
    """The lock of a run; of one that skipped what was done, the lock `before` and what was made besides."""
    inputs = {
        source.name: LockedInput(
            source.file.state.size,
            made.inputs.get(source.name, ""),
            made.sha256.get(source.name),
            made.files.get(source.name),
        )
        for source in plan.inputs
    }
    outputs = {report.name: LockedOutput(report.bytes, report.content_hash or "") for report in made.outputs}
    if before:
        inputs, outputs = dict(before.inputs), {**before.outputs, **outputs}
    return Lock(VERSION, fingerprint(plan.recipe.data), inputs, outputs)
