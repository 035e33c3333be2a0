"""What was made of what, and how: models, recipe, settings, machine, notes."""

from __future__ import annotations

from mergekit_sd.sampling.groups import Group, sampler_label
from mergekit_sd.sampling.groups import number as in_full
from mergekit_sd.sampling.html.words import counts, escaped, fact, label, name
from mergekit_sd.sampling.values import SamplingReport, Settings


def models(report: SamplingReport) -> str:
    """A table of the models: what was made here first, then its parents."""
    made = [model for model in report.models if model not in report.parents]
    rows = "".join(_model(report, model) for model in [*made, *report.parents])
    words = f"{_names(made)} made of {_names(report.parents)}." if made and report.parents else ""
    checked = '<th scope="col" role="columnheader">Checks</th>' if report.checks else ""
    hashed = '<th scope="col" role="columnheader">Hash</th>' if _has_hashes(report) else ""
    return f"""<p class="muted">{words}</p>
<table class="listing" role="table">
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Model</th>\
<th scope="col" role="columnheader">Role</th>{hashed}{checked}</tr></thead>
<tbody role="rowgroup">
{rows}</tbody>
</table>"""


def _has_hashes(report: SamplingReport) -> bool:
    return any(each.model_hash for each in report.pictures)


def _names(every: list[str] | tuple[str, ...]) -> str:
    return ", ".join(name(model) for model in every)


def _model(report: SamplingReport, model: str) -> str:
    known = next((each.model_hash for each in report.pictures if each.model == model and each.model_hash), None)
    role = "parent" if model in report.parents else "made here" if report.parents else "model"
    made = f' <span class="muted">{escaped(report.made[model])}</span>' if model in report.made else ""
    hashed = f'<code class="hash">{escaped(known)}</code>' if known else '<span class="muted">none</span>'
    hashed = f'<td role="cell">{hashed}</td>' if _has_hashes(report) else ""
    levels = [check.level for check in report.checks if check.model == model]
    told = "".join(f"<span>{each} </span>" for each in counts(levels)) or '<span class="muted">none</span>'
    checked = f'<td role="cell" class="counts">{told}</td>' if report.checks else ""
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{name(model)}</th><td role="cell">{role}{made}</td>'
        f"{hashed}{checked}</tr>\n"
    )


def about(report: SamplingReport, found: tuple[Group, ...]) -> str:
    """The sections after the findings; what a report lacks is left out."""
    settings = "\n".join(_settings(group.settings, len(found) > 1) for group in found)
    machine = _facts({label(key): fact(key, value) for key, value in report.machine.items()})
    notes = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
    sections = {
        "Notes": f'<ul class="notes">{notes}</ul>' if notes else "",
        "Recipe": _recipe(report.recipe) if report.recipe else "",
        "Settings": settings,
        "Machine": machine if report.machine else "",
    }
    return "\n".join(
        f'<section id="{title.lower()}" aria-labelledby="{title.lower()}-title">\n'
        f'<h2 id="{title.lower()}-title">{title}</h2>\n{text}\n</section>'
        for title, text in sections.items()
        if text
    )


def _recipe(text: str) -> str:
    lines = len(text.splitlines())
    return f"""<details><summary>{lines} line{"s" * (lines != 1)} of TOML</summary>
<div class="recipe"><button type="button" id="copy" hidden>Copy</button>
<pre tabindex="0"><code id="recipe-text">{escaped(text)}</code></pre></div></details>"""


def _settings(settings: Settings, several: bool) -> str:
    title = f'<h3 class="verbatim">{escaped(settings.prompt) or "(no prompt)"}</h3>' if several else ""
    size = f"{settings.size[0]} × {settings.size[1]} pixels" if settings.size else "the model's own"
    values = {
        "Prompt": f'<span class="verbatim">{escaped(settings.prompt)}</span>' if not several else "",
        "Negative prompt": f'<span class="verbatim">{escaped(settings.negative)}</span>'
        if settings.negative
        else "none",
        "Seeds": ", ".join(str(seed) for seed in settings.seeds),
        "Steps": str(settings.steps),
        "Sampler": escaped(sampler_label(settings.sampler)),
        "CFG scale": in_full(settings.cfg),
        "CFG rescale": in_full(settings.cfg_rescale) if settings.cfg_rescale else "",
        "Size": size,
        "Clip skip": "the model's own" if settings.clip_skip is None else str(settings.clip_skip),
    }
    return f'<div class="settings">{title}{_facts({key: value for key, value in values.items() if value})}</div>'


def _facts(values: dict[str, str]) -> str:
    return f'<dl class="facts">{"".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in values.items())}</dl>'
