"""How far a model's blocks have moved from each parent's: of their own, and with what they inherit.

Owns the charts and sentences of drift. Must not run a network: what went through the blocks is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

from mergekit_sd.sampling.checks import thresholds as t
from mergekit_sd.sampling.checks.measuring import Measured, joined_moves
from mergekit_sd.sampling.checks.tracing import Move, moves
from mergekit_sd.sampling.values import Chart, Check
from mergekit_sd.text import listed, shown


def check_drift(
    model: str, child: Measured, parents: Mapping[str, Measured]
) -> tuple[tuple[Check, ...], tuple[Chart, ...]]:
    """One check for each parent, and the charts: the UNet's own drift, its total drift, the text encoder's."""
    total = {name: moves(child.unet, each.unet) for name, each in parents.items()}
    own = {name: child.own.get(name, {}) for name in parents}
    text = {name: child.own_text.get(name) or joined_moves(child.text, each.text) for name, each in parents.items()}
    checks = tuple(_check(model, name, own[name], total[name]) for name in parents)
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


def _check(model: str, parent: str, own: Mapping[str, Move], total: Mapping[str, Move]) -> Check:
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
    return Check(name, "sound", "ok", model, message, figures)


def check_stray(model: str, child: Measured, parents: Mapping[str, Measured]) -> tuple[Check, ...]:
    """Which blocks are further from every parent than any two parents are from each other: no mix of them is there.

    Of the model a block's own drift counts, of the parents what they inherit as well, which is more. Needs two.
    """
    pairs = [moves(one.unet, other.unet) for one, other in permutations(parents.values(), 2)]
    own = [child.own[name] for name in parents if name in child.own]
    if not pairs or len(own) < len(parents):
        return ()
    blocks = [block for block in own[0] if all(block in each for each in (*own, *pairs))]
    least = {block: min(each[block].relative for each in own) for block in blocks}
    apart = {block: max(each[block].relative for each in pairs) for block in blocks}
    stray = sorted(
        (block for block in blocks if least[block] > t.STRAY_LEAST and least[block] > t.STRAY * apart[block]),
        key=lambda block: -least[block],
    )
    figures = {f"{block} relative": round(least[block], 4) for block in stray[: t.MOST]}
    name = shown(model)
    if not stray:
        message = f"No block of {name} is further from its parents than they are from each other."
        return (Check("stray blocks", "sound", "ok", model, message, figures),)
    message = (
        f"In {name} these blocks answer unlike any parent's, further off than the parents are from each other: "
        f"{listed(stray, t.MOST)}. Their weights were added up too far, or are not of this family."
    )
    return (Check("stray blocks", "sound", "warning", model, message, figures),)


def _figures(move: Move) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("relative", round(move.relative, 4)), ("cosine", round(move.cosine, 4))


def _percent(move: Move) -> str:
    return f"{100 * move.relative:.{0 if move.relative >= 0.01 else 1}f}%"
