"""Charts as drawings in the page: bars for few models, rows of shades for many, and the numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mergekit_sd.sampling.html.words import escaped, name, number
from mergekit_sd.sampling.values import Chart, SamplingReport

FEW = 4  # rows of bars; more become rows of shades
STEP, BAR = 40, 26  # pixels from one block to the next, and of the bar
TALL, SHADE = 84, 24  # pixels of the highest bar, and of a shade
LETTER = 6.2  # pixels of a letter of a block's name
UPRIGHT = 6  # letters that fit below a bar; longer names are turned
MOST = 18  # letters of a name that are shown


def charts(report: SamplingReport) -> str:
    """The section of all charts; nothing where there are none."""
    if not report.charts:
        return ""
    drawn = "\n".join(_chart(chart) for chart in report.charts)
    return (
        f'<section id="charts" aria-labelledby="charts-title">\n<h2 id="charts-title">Charts</h2>\n{drawn}\n</section>'
    )


def _chart(chart: Chart) -> str:
    blocks = list(dict.fromkeys(block for values in chart.values.values() for block in values))
    finite = [value for values in chart.values.values() for value in values.values() if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if len(chart.values) <= FEW:
        rows = "".join(
            _row_name(row, values) + _bars(row, blocks, values, low, high) for row, values in chart.values.items()
        )
    else:
        most = max(high, -low)
        rows = _names(blocks) + "".join(
            _row_name(row, values) + _shades(row, blocks, values, most) for row, values in chart.values.items()
        )
    title = escaped(chart.title)
    return f"""<figure class="chart">
<figcaption><h3>{title}</h3><p class="muted">{escaped(chart.note)}</p></figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="Chart: {title}">{rows}</div>
{_table(chart, blocks)}
</figure>"""


def _row_name(row: str, values: Mapping[str, float]) -> str:
    finite = {block: value for block, value in values.items() if math.isfinite(value)}
    if not finite:
        return f'<p class="row-name">{name(row)}</p>'
    largest = max(finite, key=lambda block: abs(finite[block]))
    told = f"largest {number(finite[largest])} at {escaped(largest)}"
    return f'<p class="row-name">{name(row)} <span>{told}</span></p>'


def _bars(row: str, blocks: list[str], values: Mapping[str, float], low: float, high: float) -> str:
    """Bars from zero up and down, on the scale of the whole chart, the blocks' names below."""
    scale = TALL / (high - low) if high > low else 0.0
    zero = 4 + high * scale
    marks = []
    for place, block in enumerate(blocks):
        value = values.get(block, math.nan)
        if math.isfinite(value):
            tall = max(abs(value) * scale, 1.0)
            top = zero - tall if value >= 0 else zero
            marks.append(_mark("bar", place, top, tall, f"{row}, {block}: {number(value)}"))
    base = f'<line class="rule" x1="0" x2="{len(blocks) * STEP}" y1="{zero:.1f}" y2="{zero:.1f}"/>'
    return _drawing(row, blocks, TALL + 8, "".join(marks) + base, named=True)


def _shades(row: str, blocks: list[str], values: Mapping[str, float], most: float) -> str:
    """One field for each block, the fuller the larger its number; below zero in another colour."""
    marks = []
    for place, block in enumerate(blocks):
        value = values.get(block, math.nan)
        if math.isfinite(value):
            marks.append(_mark("heat-bed", place, 1, SHADE, ""))
            part = abs(value) / most if most else 0.0
            kind = "heat below" if value < 0 else "heat"
            marks.append(_mark(kind, place, 1, SHADE, f"{row}, {block}: {number(value)}", part))
    return _drawing(row, blocks, SHADE + 8, "".join(marks), named=False)


def _mark(kind: str, place: int, top: float, tall: float, words: str, part: float | None = None) -> str:
    wide = STEP - 2 if kind.startswith("heat") else BAR
    left = place * STEP + (STEP - wide) / 2
    filled = "" if part is None else f' fill-opacity="{part:.3f}"'
    told = f"<title>{escaped(words)}</title>" if words else ""
    where = f'x="{left:.1f}" y="{top:.1f}" width="{wide}" height="{tall:.1f}"'
    return f'<rect class="{kind}" {where}{filled}>{told}</rect>'


def _drawing(row: str, blocks: list[str], height: float, marks: str, *, named: bool) -> str:
    below = _labels(blocks, height + 12, 45) if named else ""
    tall = height + (_label_height(blocks) if named else 0)
    told = f"{escaped(row)}: {len(blocks)} values, in the table below"
    wide = len(blocks) * STEP + _overhang(blocks)
    box = f'width="{wide}" height="{tall:.0f}" viewBox="0 0 {wide} {tall:.0f}"'
    return f'<svg {box} role="img" aria-label="{told}">{marks}{below}</svg>'


def _names(blocks: list[str]) -> str:
    """The blocks' names alone, above rows of shades."""
    tall, wide = _label_height(blocks), len(blocks) * STEP + _overhang(blocks)
    box = f'width="{wide}" height="{tall:.0f}" viewBox="0 0 {wide} {tall:.0f}"'
    return f'<svg {box} aria-hidden="true">{_labels(blocks, tall - 4, -45)}</svg>'


def _turned(blocks: list[str]) -> bool:
    return any(len(block) > UPRIGHT for block in blocks)


def _longest(blocks: list[str]) -> float:
    return LETTER * max((min(len(block), MOST) for block in blocks), default=0)


def _label_height(blocks: list[str]) -> float:
    return 18 + (0.71 * _longest(blocks) if _turned(blocks) else 0)


def _overhang(blocks: list[str]) -> int:
    """What a turned name needs beyond the last block."""
    return round(0.71 * _longest(blocks)) if _turned(blocks) else 0


def _labels(blocks: list[str], line: float, turn: int) -> str:
    """The blocks' names at the height `line`; where one is long, all are turned by `turn` degrees."""
    drawn = []
    for place, block in enumerate(blocks):
        words = escaped(block if len(block) <= MOST else block[: MOST - 1] + "…")
        middle = f"{place * STEP + STEP / 2:.0f}"
        how = f'transform="rotate({turn} {middle} {line:.0f})"' if _turned(blocks) else 'text-anchor="middle"'
        drawn.append(f'<text x="{middle}" y="{line:.0f}" {how}>{words}</text>')
    return "".join(drawn)


def _table(chart: Chart, blocks: list[str]) -> str:
    rows = list(chart.values)
    head = "".join(f'<th scope="col">{name(row)}</th>' for row in rows)
    body = "".join(
        f'<tr><th scope="row">{escaped(block)}</th>'
        + "".join(f"<td>{_in_table(chart.values[row], block)}</td>" for row in rows)
        + "</tr>\n"
        for block in blocks
    )
    return f"""<details><summary>Numbers</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Numbers: {escaped(chart.title)}"><table class="numbers">
<thead><tr><td></td>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div></details>"""


def _in_table(values: Mapping[str, float], block: str) -> str:
    return number(values[block]) if block in values else "–"
