"""The checks on the page: one card for each heading above, and below each heading its checks."""

from __future__ import annotations

from mergekit_sd.sampling.html.words import LEVELS, counts, escaped, level, name, number
from mergekit_sd.sampling.values import HEADINGS, Check, SamplingReport

FEW = 12  # checks that are ok: more are folded


def summary(report: SamplingReport) -> str:
    """A card for each heading: how many checks failed, warned and were ok."""
    if not report.checks:
        return ""
    cards = []
    for heading, title in HEADINGS.items():
        levels = [check.level for check in report.checks if check.heading == heading]
        words = "<br>".join(counts(levels)) or '<span class="muted">not checked</span>'
        cards.append(f'<li><a href="#{heading}"><strong>{title}</strong> {words}</a></li>')
    return f'<ul class="verdicts">{"".join(cards)}</ul>'


def findings(report: SamplingReport) -> str:
    """Every heading with its checks, the worst first."""
    if not report.checks:
        return "<p>Nothing was checked.</p>"
    parts = []
    for heading, title in HEADINGS.items():
        checks = [check for check in report.checks if check.heading == heading]
        told = " ".join(counts([check.level for check in checks]))
        parts.append(f'<div class="heading" id="{heading}">\n<h3>{title} {told}</h3>\n{_checks(checks)}\n</div>')
    return "\n".join(parts)


def _checks(checks: list[Check]) -> str:
    if not checks:
        return '<p class="muted">Nothing was checked here.</p>'
    order = list(LEVELS)
    checks = sorted(checks, key=lambda check: order.index(check.level))
    well = [check for check in checks if check.level == "ok"]
    if len(well) <= FEW:
        return _list(checks)
    ill = checks[: len(checks) - len(well)]
    return f"{_list(ill) if ill else ''}<details><summary>{len(well)} checks are ok</summary>{_list(well)}</details>"


def _list(checks: list[Check]) -> str:
    return f'<ul class="checks">\n{"".join(_check(check) for check in checks)}</ul>'


def _check(check: Check) -> str:
    figures = "".join(
        f"<div><dt>{escaped(what)}</dt><dd>{number(value)}</dd></div>" for what, value in check.figures.items()
    )
    figures = f'<dl class="figures">{figures}</dl>' if figures else ""
    return (
        f'<li>{level(check.level)} <div class="what">{escaped(check.name)} <span>{name(check.model)}</span></div> '
        f'<div class="told"><p>{escaped(check.message)}</p>{figures}</div></li>\n'
    )
