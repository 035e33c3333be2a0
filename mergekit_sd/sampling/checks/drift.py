"""How far a model's blocks have moved from each parent's: of their own, and with what they inherit.

Owns the charts and sentences of drift. Must not run a network: what went through the blocks is given.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.checks.measuring import Measured, joined_moves
from mergekit_sd.sampling.checks.tracing import Move, moves
from mergekit_sd.sampling.values import Chart, Check
from mergekit_sd.text import shown

Changed = Mapping[str, Mapping[str, float]]


def check_drift(
    model: str, child: Measured, parents: Mapping[str, Measured], changed: Changed | None = None
) -> tuple[tuple[Check, ...], tuple[Chart, ...]]:
    """One check for each parent, and the charts: the UNet's own drift, its total drift, the text encoder's.

    `changed`: by parent, then by block, how much the recipe changes the model against it; blocks at 0 that
    moved all the same are a warning.
    """
    total = {name: moves(child.unet, each.unet) for name, each in parents.items()}
    own = {name: child.own.get(name, {}) for name in parents}
    text = {name: child.own_text.get(name) or joined_moves(child.text, each.text) for name, each in parents.items()}
    checks = tuple(_check(model, name, own[name], total[name], (changed or {}).get(name, {})) for name in parents)
    charts = (
        _chart(
            f"Blocks of {shown(model)}: their own drift",
            "How far each block's output is from the parent's when it is given the parent's input; 0 is the same.",
            own,
        ),
        _chart(
            f"Blocks of {shown(model)}: drift with what they inherit",
            "How far each block's output is from the parent's when the whole model runs; 0 is the same.",
            total,
        ),
        _chart(
            f"Text encoder of {shown(model)}: its layers' drift",
            "How far each layer's output is from the parent's; 0 is the same.",
            text,
        ),
    )
    return checks, tuple(chart for chart in charts if chart.values)


def _chart(title: str, note: str, found: Mapping[str, Mapping[str, Move]]) -> Chart:
    values = {
        name: {block: round(move.relative, 4) for block, move in blocks.items()}
        for name, blocks in found.items()
        if blocks
    }
    return Chart(title, note, values)


def _check(
    model: str, parent: str, own: Mapping[str, Move], total: Mapping[str, Move], changed: Mapping[str, float]
) -> Check:
    child, other = shown(model), shown(parent)
    found = own or total
    moved = sorted((block for block in found if found[block].relative > t.MOVED), key=lambda b: -found[b].relative)
    figures = {f"{block} {kind}": value for block in moved[: t.MOST] for kind, value in _figures(found[block])}
    name = f"drift from {parent}"
    if not found:
        message = f"{child} and {other} have no blocks of the same shapes to compare."
        return Check(name, "sound", "ok", model, message)
    if not moved:
        message = f"Every block of {child} answers as {other}'s does."
        return Check(name, "sound", "ok", model, message, figures)
    most = ", ".join(f"{block} ({_percent(found[block])})" for block in moved[: t.MOST])
    more = f" and {len(moved) - t.MOST} more" if len(moved) > t.MOST else ""
    whose = "of their own" if own else "with what they inherit"
    message = f"Of the blocks of {child} these moved most from {other}'s, {whose}: {most}{more}."
    unasked = [block for block in moved if own and changed.get(block) == 0]
    if unasked:
        blocks = ", ".join(unasked[: t.MOST])
        message += f" The recipe leaves {blocks} as {other} has it, yet it moved: look at that step's weights."
        return Check(name, "sound", "warning", model, message, figures)
    if own and changed and all(block in changed for block in moved):
        message += " All of them are blocks that the recipe changes."
    return Check(name, "sound", "ok", model, message, figures)


def _figures(move: Move) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("relative", round(move.relative, 4)), ("cosine", round(move.cosine, 4))


def _percent(move: Move) -> str:
    return f"{100 * move.relative:.{0 if move.relative >= 0.01 else 1}f}%"
