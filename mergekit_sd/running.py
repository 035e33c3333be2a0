"""A recipe's run as its user means it: the outputs, then the pictures that its samples ask for.

Owns where the pictures lie, and that a merge never fails for want of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_sd.api import RunReport, load, make_outputs
from mergekit_sd.errors import Cancelled, MergekitError
from mergekit_sd.events import CancelToken, Listener, Noted, ignore
from mergekit_sd.pictures import prepare_samples
from mergekit_sd.recipe.load import Recipe

if TYPE_CHECKING:
    from mergekit_sd.sampling.session import SampleOptions, Session

__all__ = ["draw_beside", "run", "samples_folder"]


def run(
    recipe: str | Path | Recipe,
    *,
    set: Mapping[str, object] | None = None,
    samples: bool = True,
    sampling: SampleOptions | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
    output_root: str | Path | None = None,
    **options: Any,
) -> RunReport:
    """Make every output of a recipe, write its lock, and draw the pictures that its samples ask for.

    `options` are those of `make_outputs`. Where no pictures can be made (diffusers is not installed, a model is
    of no family that draws), the report's warnings say why, and the outputs stand. Raises as `make_outputs` does;
    for a recipe without outputs as `sample` does.
    """
    checked = load(recipe, set)
    if checked.outputs or not checked.samples:
        report = make_outputs(checked, on_event=on_event, cancel=cancel, output_root=output_root, **options)
    else:  # a recipe for pictures alone
        report = RunReport(str(checked.path) if checked.path else None, (), (), checked.warnings, None)
    if not (samples and checked.samples and (report.outputs or not checked.outputs)):
        return report
    folder = samples_folder(checked, output_root)
    try:
        return replace(report, samples=_drawn(checked, report, folder, sampling, on_event, cancel))
    except Cancelled:
        raise
    except MergekitError as error:
        if not checked.outputs:
            raise
        warning = f"no pictures: {error.message}" + (f" ({error.hint})" if error.hint else "")
        on_event(Noted(warning))
        return replace(report, warnings=(*report.warnings, warning))


def draw_beside(
    report: RunReport,
    recipe: Recipe,
    *,
    force: bool = False,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> RunReport:
    """The report of a run with one output, and pictures in a folder beside that file, by a recipe of samples.

    Raises OutputExists where the folder is there and not `force`, and as `sample` does; the file stands.
    """
    from mergekit_sd.sampling.output import check_samples_folder

    file = report.outputs[0].path
    folder = file.parent / f"{file.stem}-samples"
    check_samples_folder(folder, force=force)
    return replace(report, samples=_drawn(recipe, replace(report, outputs=()), folder, None, on_event, cancel))


def samples_folder(recipe: Recipe, output_root: str | Path | None = None) -> Path:
    """Where a run puts its pictures: a folder beside the recipe, or below `output_root`."""
    stem = recipe.path.stem if recipe.path else "recipe"
    return Path(output_root or recipe.folder) / f"{stem}-samples"


def _drawn(
    recipe: Recipe,
    report: RunReport,
    folder: Path,
    sampling: SampleOptions | None,
    on_event: Listener,
    cancel: CancelToken | None,
) -> dict[str, Any]:
    from mergekit_sd.sampling.json_report import sampling_as_json
    from mergekit_sd.sampling.output import check_samples_folder, write_samples

    check_samples_folder(folder, force=True)  # the outputs were made anew, so the pictures are
    written = {output.name: output.path for output in report.outputs}
    session: Session = prepare_samples(recipe, options=sampling, written=written, on_event=on_event, cancel=cancel)
    made = session.run()
    write_samples(made, folder, force=True)
    return {"folder": str(folder), **sampling_as_json(made)}
