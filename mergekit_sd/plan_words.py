"""A plan in lines of plain text: steps with their block weights, outputs, pictures, what is read and written.

Owns the words, for whoever shows them. Must not know terminals; takes what `plan_as_json` gave.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_sd.text import count, listed, shown, size

__all__ = ["plan_lines"]

BARS = " ▁▂▃▄▅▆▇█"
CELL = 11  # columns of a block and its weight
GAP = 2  # between two of them


def plan_lines(plan: Mapping[str, Any], width: int, *, bars: bool = True) -> Iterator[str]:
    """All of a plan but its inputs and warnings, wrapped to so many columns (paths are not), foreign names escaped.

    `bars`: whether weights of blocks have a bar, which is not ASCII.
    """
    for step in plan["steps"]:
        yield from _step(step, width, bars)
        yield ""
    for output in plan["outputs"]:
        yield from _output(output, width)
        yield ""
    for sample in plan["samples"]:
        words = f"{count(sample['pictures'], 'picture')} of {_names(sample['of'])}: {shown(sample['prompt'])}"
        yield from _wrapped(words, 0, width)
    if plan["samples"]:
        yield ""
    yield f"reads {size(plan['read_bytes'])}, writes {size(plan['write_bytes'])}"


def _step(step: Mapping[str, Any], width: int, bars: bool) -> Iterator[str]:
    settings = dict(step["settings"])
    operands = ", ".join(f"{name} = {_names(source)}" for name, source in step["operands"].items())
    called = f"step {shown(step['name'])}: {step['op']}({settings.pop('expr', operands)})"
    yield from _wrapped(called, 0, width)
    for setting, value in settings.items():
        yield from _wrapped(f"{setting} = {_setting(value)}", 2, width)
    for parameter, blocks in step["weights"].items():
        yield from _weights(parameter, blocks, width, bars)
    folded = {"merged": step["merged"], "folded to copies": step["folded"], "carried over": step["carried"]}
    yield from _wrapped(_counts(folded), 2, width)
    for what, names in (
        ("missing elsewhere, kept as they are", step["kept"]),
        ("only elsewhere, dropped", step["dropped"]),
        *((f"taken out as {what}", names) for what, names in step["removed"].items()),
    ):
        if names:
            yield from _wrapped(f"{count(len(names), 'tensor')} {what}: {listed(names)}", 2, width)


def _weights(parameter: str, blocks: Mapping[str, Any], width: int, bars: bool) -> Iterator[str]:
    """One number if there is one; else blocks in rows of IN, M and OUT, with bars."""
    values = list(blocks.values())
    if values and all(value == values[0] for value in values) and not isinstance(values[0], list):
        yield f"  {parameter} = {values[0]:g} everywhere"
        return
    yield f"  {parameter}:"
    rows: dict[str, list[str]] = {}
    for block in sorted(blocks, key=_block_order):
        group = block.rstrip("0123456789") if block[-1:].isdigit() else "rest"
        rows.setdefault(group, []).append(f"{block} {_cell(blocks[block], bars)}")
    widest = max(len(cell) for cells in rows.values() for cell in cells[:-1] or cells)
    column = max(widest, CELL) + GAP
    most = 6 if widest <= CELL else 4  # so that 12 blocks fill their rows
    number = next((each for each in (most, most - 2, 2) if 4 + each * column - GAP <= width), 1)
    for cells in rows.values():
        for start in range(0, len(cells), number):
            yield "    " + "".join(cell.ljust(column) for cell in cells[start : start + number]).rstrip()


def _output(output: Mapping[str, Any], width: int) -> Iterator[str]:
    what = output["architecture"] or "unknown layout"
    yield f"output {shown(output['name'])}: {shown(output['path'])}"
    if "layers" in output:
        yield f"  a LoRA for {what}, {count(output['layers'], 'layer')}, about {size(output['bytes'])}"
        return
    tensors = output["tensors"]
    dtypes = ", ".join(f"{name} × {number:,}" for name, number in sorted(output["dtypes"].items()))
    predicts = f", predicts {output['prediction']}" if output["prediction"] else ""
    about = "a PyTorch file of about " if output["container"] == "torch" else ""  # its archive is put together later
    made = f"{what}{predicts}, {about}{size(output['bytes'])}, {count(tensors['total'], 'tensor')} ({dtypes})"
    yield from _wrapped(made, 2, width)
    yield f"  {_counts({how: tensors[how] for how in ('merged', 'cast', 'copied', 'constant')})}"
    for reason, names in output["dropped"].items():
        yield from _wrapped(f"{count(len(names), 'tensor')} dropped as {reason}: {listed(names)}", 2, width)


def _wrapped(text: str, indent: int, width: int) -> Iterator[str]:
    """A list of names is wrapped under itself."""
    lines = textwrap.wrap(text, max(width - indent - 2, 10), break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        yield " " * (indent + 2 * bool(number)) + line


def _names(source: str | list[str]) -> str:
    return shown(source) if isinstance(source, str) else f"[{', '.join(shown(name) for name in source)}]"


def _setting(value: Any) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple | list) else str(value)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {how}" for how, number in counts.items() if number)


def _block_order(block: str) -> tuple[int, str]:
    order = {"IN": 1, "M": 2, "OUT": 3}
    return order.get(block.rstrip("0123456789"), 0), block


def _cell(value: Any, bars: bool) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3g}–{value[1]:.3g}"
    bar = BARS[round(min(max(value, 0.0), 1.0) * (len(BARS) - 1))] if bars else " "
    return f"{value:.3g}{bar if bar != ' ' else ''}"
