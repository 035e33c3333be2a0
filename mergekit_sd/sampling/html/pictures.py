"""The pictures on the page: for each prompt a grid of models by seeds."""

from __future__ import annotations

import base64

from mergekit_sd.sampling.groups import Group, in_words
from mergekit_sd.sampling.html.words import escaped, name
from mergekit_sd.sampling.parameters import png
from mergekit_sd.sampling.values import Picture, SamplingReport

SMALL = 256  # pixels: up to here a picture is enlarged without smoothing


def pictures(report: SamplingReport, found: tuple[Group, ...]) -> str:
    """Every group's heading and grid."""
    if not found:
        return "<p>No pictures were made.</p>"
    return "\n".join(_group(report, group, place) for place, group in enumerate(found))


def chosen(report: SamplingReport, found: tuple[Group, ...]) -> tuple[str, str] | None:
    """The two models to compare first, a parent and what was made last of one prompt; None where there are no two."""
    there = next((list(group.models) for group in found if len(group.models) > 1), [])
    there = there or list(dict.fromkeys(model for group in found for model in group.models))
    if len(there) < 2:
        return None
    made = [model for model in there if model not in report.parents] or there
    others = [model for model in there if model != made[-1]]
    parents = [model for model in others if model in report.parents] or others
    return parents[0], made[-1]


def _group(report: SamplingReport, group: Group, place: int) -> str:
    settings = group.settings
    negative = f'<p class="muted verbatim">Negative: {escaped(settings.negative)}</p>' if settings.negative else ""
    # One picture for each model: side by side instead of below each other.
    kind = "grid one" if len(settings.seeds) == 1 else "grid"
    seeds = "".join(f'<th scope="col" role="columnheader">seed {seed}</th>' for seed in settings.seeds)
    rows = "\n".join(_row(report, group, place, model) for model in group.models)
    alone = f" · seed {settings.seeds[0]}" if len(settings.seeds) == 1 else ""
    return f"""<div class="group">
<header>
<h3 class="verbatim">{escaped(settings.prompt) or "(no prompt)"}</h3>
{negative}
<p class="muted">{escaped(in_words(settings))}{alone}</p>
</header>
<div class="scroll" tabindex="0" role="region" aria-label="Pictures, prompt {place + 1}">
<table class="{kind}" role="table">
<thead role="rowgroup"><tr role="row"><td role="cell"></td>{seeds}</tr></thead>
<tbody role="rowgroup">
{rows}
</tbody>
</table>
</div>
</div>"""


def _row(report: SamplingReport, group: Group, place: int, model: str) -> str:
    cells = "".join(
        f'<td role="cell">{_image(group.pictures.get((model, seed)), place)}</td>' for seed in group.settings.seeds
    )
    role = ' <span class="role">parent</span>' if model in report.parents else ""
    return f'<tr role="row"><th scope="row" role="rowheader">{name(model)}{role}</th>{cells}</tr>'


def _image(picture: Picture | None, place: int) -> str:
    if picture is None:
        return '<p class="nothing">no picture</p>'
    height, width = picture.pixels.shape[:2]
    prompt, seed = picture.settings.prompt, picture.seed
    kind = "small" if max(height, width) <= SMALL else "large"
    data = base64.b64encode(png(picture)).decode()
    return (
        f'<img class="{kind}" width="{width}" height="{height}" '
        f'alt="{escaped(picture.model)}, seed {seed}: {escaped(prompt)}" '
        f'data-model="{escaped(picture.model)}" data-shot="{place}-{seed}" '
        f'data-what="seed {seed}: {escaped(prompt)}" src="data:image/png;base64,{data}">'
    )
