"""How an inspection reads: what a model is, what is wrong with it, its metadata, a tensor's numbers.

Owns these words. All foreign text in them is escaped. Must not know widgets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.text import Text

import mergekit_sd as mk
from mergekit_sd.text import count, listed, shown, size
from mergekit_sd_tui.leaves import PARTS, Leaf
from mergekit_sd_tui.tensor_tree import Branch

LONGEST = 400  # characters of one value of the metadata


def model_words(found: mk.Inspection, fix_key: str, prune_key: str) -> Text:
    """What the model is, and what can be mended by which key."""
    text = Text()
    what = f"{found.title} {found.kind}" if found.title else found.kind
    predicts = f", predicts {found.prediction}" if found.prediction and found.architecture else ""
    text.append(f"{what}{predicts}\n", style="bold")
    text.append(f"{found.format}, {count(found.tensors, 'tensor')}, {size(found.file_bytes)}\n")
    for line in _findings(found, fix_key, prune_key):
        text.append(f"{line}\n", style="bold")
    for note in found.notes:
        text.append(f"{shown(note)}\n")
    return text


def _findings(found: mk.Inspection, fix_key: str, prune_key: str) -> Iterable[str]:
    if found.position_ids is not None:
        yield f"position_ids: {_position_ids(found.position_ids, fix_key)}"
    for label, share in (("EMA", found.ema), ("junk", found.junk)):
        if share.tensors:
            yield f"{label}: {count(share.tensors, 'tensor')}, {size(share.bytes)}"
    if found.prunable:
        yield f"{size(found.prunable)} less without them: [{prune_key}]"


def _position_ids(ids: mk.PositionIds, key: str) -> str:
    if ids.state == "ok":
        return "ok"
    if ids.state == "missing":
        return "missing (programs fill them in: no harm)"
    if not ids.wrong:
        return f"stored as {ids.dtype}, not as integers: [{key}] mends them"
    return f"{len(ids.wrong)} of {ids.count} wrong ({listed(map(str, ids.wrong), 8)}): [{key}] mends them"


def metadata_words(found: mk.Inspection) -> Text:
    """The file's metadata; long values are cut."""
    text = Text("\nMetadata\n" if found.metadata else "\nNo metadata", style="bold")
    for key, value in found.metadata.items():
        more = f" … ({len(value):,} characters)" if len(value) > LONGEST else ""
        text.append(f"{shown(key)}: ", style="dim not bold")
        text.append(f"{shown(value[:LONGEST])}{more}\n", style="not bold")
    return text


def node_words(data: Branch | Leaf | None, numbers: Any, key: str) -> Text:
    """What is under the cursor; `numbers`: its statistics, None before they were asked for."""
    if data is None:
        return Text()
    if isinstance(data, Branch):
        nbytes = sum(leaf.nbytes for leaf in data.leaves)
        return Text(f"{shown(data.name)}\n{count(len(data.leaves), 'tensor')}, {size(nbytes)}\n")
    text = Text(f"{shown(data.name)}\n", style="bold")
    text.append(
        f"{PARTS.get(data.part, data.part)}, {data.dimensions}, {data.dtype}, {size(data.nbytes)}\n", "not bold"
    )
    if numbers is None:
        text.append(f"[{key}] tells its numbers\n", style="dim not bold")
    else:
        text.append(_numbers(numbers), style="not bold")
    return text


def _numbers(found: Any) -> str:
    lines = [
        f"{name:5} {value:.6g}" for name in ("min", "max", "mean", "std") if (value := getattr(found, name)) is not None
    ]
    bad = f"{count(found.nan, 'NaN')}, {count(found.inf, 'Inf')}" if found.nan or found.inf else "every value is finite"
    return "\n".join([*(lines or ["no finite value"]), bad, ""])
