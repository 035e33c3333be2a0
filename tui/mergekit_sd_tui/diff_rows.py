"""How a comparison of two models reads: rows of blocks and of tensors, with bars beside the numbers.

Owns these words. All foreign text in them is escaped. Must not know widgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.text import Text

import mergekit_sd as mk
from mergekit_sd.text import count, shown
from mergekit_sd_tui.glyphs import glyphs
from mergekit_sd_tui.leaves import PARTS

BAR = 12  # cells of the longest bar
GROUP_COLUMNS = (("block", 16), ("change", 8), ("", BAR), ("cosine", 8), ("equal", 12))
TENSOR_COLUMNS = (("tensor", 40), ("change", 8), ("", BAR), ("cosine", 8))
MARK = "*"
STATES = {
    "equal": "equal",
    "different": "different",
    "shape": "another shape",
    "only_a": "only in A",
    "only_b": "only in B",
}


def change_of(each: mk.GroupDiff | mk.TensorDiff) -> float | None:
    """The change relative to A; infinite where A is zero and B is not, None where nothing can be compared."""
    if isinstance(each, mk.GroupDiff) and not each.compared:
        return None
    if each.distance is None:
        return None
    relative = each.distance.relative_l2
    return math.inf if relative is None else relative


def longest(every: Iterable[mk.GroupDiff | mk.TensorDiff]) -> float:
    """The largest finite change: what the bars are measured by."""
    return max((change for each in every if (change := change_of(each)) is not None and change < math.inf), default=0.0)


def _number(change: float | None) -> str:
    if change is None:
        return "-"
    if change == 0 or change == math.inf:
        return "new" if change else "0"
    return "<0.01%" if change < 0.00005 else f"{change:.2%}" if change < 9.995 else f"{change:.0f} x"


def _bar(change: float | None, most: float) -> Text:
    share = 0.0 if change is None or not most else min(change / most, 1.0)
    cells = max(round(share * BAR), int(share > 0))
    # From yellow to red; the length says the same.
    return Text(glyphs().levels[-1] * cells, style=f"#ff{round(210 * (1 - share)):02x}40")


def _cosine(each: mk.GroupDiff | mk.TensorDiff) -> str:
    cosine = each.distance.cosine if each.distance and change_of(each) is not None else None
    return "" if cosine is None else f"{cosine:.5f}"


def group_cells(group: mk.GroupDiff, marked: bool, most: float) -> list[Text]:
    """The row of a block or component: the mark, then the columns."""
    change = change_of(group)
    return [
        Text(MARK if marked else " ", style="bold"),
        Text(shown(PARTS.get(group.name, group.name)), no_wrap=True, overflow="ellipsis"),
        Text(_number(change), justify="right"),
        _bar(change, most),
        Text(_cosine(group), justify="right"),
        Text(f"{group.equal} of {group.compared}" if group.compared else "", justify="right"),
    ]


def tensor_cells(tensor: mk.TensorDiff, most: float) -> list[Text]:
    """The row of a tensor."""
    change = change_of(tensor)
    return [
        Text(" "),
        # A name's end tells more than its beginning.
        Text(_end(shown(tensor.name), TENSOR_COLUMNS[0][1]), no_wrap=True),
        Text("-" if change is None else _number(change), justify="right"),
        Text(STATES[tensor.state]) if tensor.distance is None else _bar(change, most),
        Text(_cosine(tensor), justify="right"),
    ]


def _end(name: str, width: int) -> str:
    return name if len(name) <= width else glyphs().ellipsis + name[1 - width :]


def title_words(a: Path, b: Path) -> Text:
    """Which is A and which is B."""
    words = Text("A ", style="bold", no_wrap=True, overflow="ellipsis")
    words.append(shown(a.name), style="not bold").append("  B ").append(shown(b.name), style="not bold")
    return words


def summary(found: mk.Diff) -> str:
    """All weights in a line."""
    if found.same:
        return "Both have the same tensors with the same values"
    total = found.total
    sizes = ((total.only_a, "only in A"), (total.only_b, "only in B"), (total.shape, "of another shape"))
    besides = ", ".join(f"{number:,} {words}" for number, words in sizes if number)
    equal = f"{total.equal:,} of {count(total.compared, 'tensor')} equal"
    return f"All weights: {_number(change_of(total))} apart, {equal}{besides and '; '}{besides}"


def group_words(group: mk.GroupDiff, found: mk.Diff) -> Text:
    """The details of a block or component."""
    text = Text(f"{shown(PARTS.get(group.name, group.name))}\n", style="bold")
    text.append(f"change   {_number(change_of(group))} of A's norm\n", style="not bold")
    if group.largest_in:
        text.append(f"largest  {group.distance.largest:.4g}, in\n{shown(group.largest_in)}\n", style="not bold")
    text.append(f"equal    {group.equal:,} of {count(group.compared, 'tensor')}\n", style="not bold")
    for label, number in (("only in A", group.only_a), ("only in B", group.only_b), ("other shape", group.shape)):
        if number:
            text.append(f"{label}: {count(number, 'tensor')}\n", style="not bold")
    if group.distance.nonfinite:
        text.append(f"{count(group.distance.nonfinite, 'value')} NaN or Inf\n", style="bold")
    text.append(f"\nA  {_side(found.a)}\nB  {_side(found.b)}\n", style="not bold")
    return text


def tensor_words(tensor: mk.TensorDiff) -> Text:
    """The details of a tensor."""
    text = Text(f"{shown(tensor.name)}\n", style="bold")
    text.append(f"{STATES[tensor.state]}\n", style="not bold")
    for letter, shape in (("A", tensor.shape_a), ("B", tensor.shape_b)):
        if shape is not None:
            text.append(f"{letter}  {' x '.join(map(str, shape)) or 'scalar'}\n", style="not bold")
    if tensor.distance is not None:
        text.append(f"change   {_number(change_of(tensor))} of A's norm\n", style="not bold")
        text.append(f"largest  {tensor.distance.largest:.4g}\n", style="not bold")
    return text


def _side(side: mk.FileSide) -> str:
    return shown(f"{side.architecture or ''} {side.kind}".strip())


def tensors_of(found: mk.Diff, group: str) -> Sequence[mk.TensorDiff]:
    """The tensors of a block, the most changed first, then those that are in one file alone."""
    members = [each for each in found.tensors if each.group == group]
    return sorted(members, key=lambda each: (change_of(each) is None, -(change_of(each) or 0.0)))
