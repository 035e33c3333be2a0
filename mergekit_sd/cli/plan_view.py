"""A plan as a person reads it: inputs, steps with their block weights, outputs, problems."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

import mergekit_sd as mk
from mergekit_sd.cli.layout import width
from mergekit_sd.cli.show import console, made_counts, print_error, print_warning, row, table
from mergekit_sd.errors import MergekitError
from mergekit_sd.text import count, listed, shown, size

BARS = " ▁▂▃▄▅▆▇█"
CELL = 11  # columns of a block and its weight


def tell_plan(plan: Any, *, force: bool, as_json: bool) -> tuple[dict[str, Any], MergekitError | None]:
    """Print a plan (as text), and what a run would raise before it computes; both for the report, too."""
    report = mk.plan_as_json(plan)
    if not as_json:
        print_plan(report)
    try:
        mk.check_run(plan, force=force)
    except MergekitError as error:
        print_error(error, as_json)
        return report | {"error": error.as_json()}, error
    return report, None


def print_plan(plan: dict[str, Any]) -> None:
    """Print the plan that `plan_as_json` gave."""
    out = console()
    inputs = table("model", "kind", "size", "path", right=["size"])
    for each in plan["inputs"]:
        kind = each["architecture"] or each["kind"]
        row(inputs, each["name"], kind, size(each["bytes"]), each["path"])
    out.print(inputs)
    for step in plan["steps"]:
        _print_step(out, step)
    for output in plan["outputs"]:
        _print_output(out, output)
    for sample in plan["samples"]:
        _say(
            out,
            0,
            f"{count(sample['pictures'], 'picture')} of {_names(sample['of'])}: {shown(sample['prompt'])}",
            wrap=True,
        )
    if plan["samples"]:
        out.print()
    out.print(f"reads {size(plan['read_bytes'])}, writes {size(plan['write_bytes'])}")
    for warning in plan["warnings"]:
        print_warning(warning)


def _print_step(out: Any, step: dict[str, Any]) -> None:
    settings = dict(step["settings"])
    operands = ", ".join(f"{name} = {_names(source)}" for name, source in step["operands"].items())
    _say(out, 0, f"step {shown(step['name'])}: {step['op']}({settings.pop('expr', operands)})", wrap=True)
    for setting, value in settings.items():
        _say(out, 2, f"{setting} = {_setting(value)}", wrap=True)
    for parameter, blocks in step["weights"].items():
        _print_weights(out, parameter, blocks)
    folded = {"merged": step["merged"], "folded to copies": step["folded"], "carried over": step["carried"]}
    _say(out, 2, made_counts(folded, {}), wrap=True)
    for what, names in (
        ("missing elsewhere, kept as they are", step["kept"]),
        ("only elsewhere, dropped", step["dropped"]),
        *((f"taken out as {what}", names) for what, names in step["removed"].items()),
    ):
        if names:
            _say(out, 2, f"{count(len(names), 'tensor')} {what}: {listed(names)}", wrap=True)
    out.print()


def _names(source: str | list[str]) -> str:
    return shown(source) if isinstance(source, str) else f"[{', '.join(shown(name) for name in source)}]"


def _setting(value: Any) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple | list) else str(value)


def _say(out: Any, indent: int, text: str, *, wrap: bool = False) -> None:
    """One line; a list of names is wrapped under itself, for a path that is left to the terminal."""
    lines = [text]
    if wrap:
        lines = textwrap.wrap(text, width() - indent - 2, break_long_words=False, break_on_hyphens=False)
    out.print("\n".join(" " * (indent + 2 * bool(n)) + line for n, line in enumerate(lines)), soft_wrap=True)


def _print_weights(out: Any, parameter: str, blocks: dict[str, Any]) -> None:
    """One number if there is one; else blocks in rows of IN, M and OUT, with bars."""
    values = list(blocks.values())
    if values and all(value == values[0] for value in values) and not isinstance(values[0], list):
        out.print(f"  {parameter} = {values[0]:g} everywhere")
        return
    out.print(f"  {parameter}:")
    rows: dict[str, list[str]] = {}
    for block in sorted(blocks, key=_block_order):
        group = block.rstrip("0123456789") if block[-1:].isdigit() else "rest"
        rows.setdefault(group, []).append(f"{block} {_cell(blocks[block])}")
    widest = max(len(cell) for cells in rows.values() for cell in cells[:-1] or cells)
    number = 6 if widest <= CELL else 4  # so that 12 blocks fill their rows, within 80 columns
    for cells in rows.values():
        for start in range(0, len(cells), number):
            _say(out, 4, "  ".join(cell.ljust(max(widest, CELL)) for cell in cells[start : start + number]).rstrip())


def _block_order(block: str) -> tuple[int, str]:
    order = {"IN": 1, "M": 2, "OUT": 3}
    return order.get(block.rstrip("0123456789"), 0), block


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3g}–{value[1]:.3g}"
    bar = BARS[round(min(max(value, 0.0), 1.0) * (len(BARS) - 1))] if _has_bars() else " "
    return f"{value:.3g}{bar if bar != ' ' else ''}"


def _has_bars() -> bool:
    """Whether stdout can say a bar: "0.5" with a stand-in for it would read as another number."""
    try:
        BARS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _print_output(out: Any, output: dict[str, Any]) -> None:
    what = output["architecture"] or "unknown layout"
    dtypes = ", ".join(f"{name} × {number:,}" for name, number in sorted(output["dtypes"].items()))
    tensors = output["tensors"]
    _say(out, 0, f"output {shown(output['name'])}: {shown(output['path'])}")
    predicts = f", predicts {output['prediction']}" if output["prediction"] else ""
    if "layers" in output:
        _say(out, 2, f"a LoRA for {what}, {count(output['layers'], 'layer')}, about {size(output['bytes'])}")
        out.print()
        return
    made = f"{what}{predicts}, {size(output['bytes'])}, {count(tensors['total'], 'tensor')} ({dtypes})"
    _say(out, 2, made, wrap=True)
    _say(out, 2, made_counts({how: tensors[how] for how in ("merged", "cast", "copied", "constant")}, {}))
    for reason, names in output["dropped"].items():
        _say(out, 2, f"{count(len(names), 'tensor')} dropped as {reason}: {listed(names)}", wrap=True)
    out.print()
