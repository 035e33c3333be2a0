"""The report of `inspect` for people.

Owns its order and its words for what every file has; those for LoRAs and the like are `inspect_kinds`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mergekit_sd as mk
from mergekit_sd.cli.inspect_kinds import show_about, show_kind, untold
from mergekit_sd.cli.inspect_words import KINDS, PARTS, cut, items, say, tight
from mergekit_sd.cli.lineage import show_lineage
from mergekit_sd.cli.show import console, row, table
from mergekit_sd.text import count, listed, shown, size


def show_inspection(found: mk.Inspection) -> None:
    """All that was found, on stdout."""
    say(shown(found.path), "bold")
    say(f"  {_what(found)}")
    dtypes = ", ".join(f"{name} {number:,}" for name, number in found.dtypes.items())
    say(f"  {found.format}, {count(found.tensors, 'tensor')}, {size(found.file_bytes)}; {dtypes or 'no tensors'}")
    show_kind(found)
    _show_parts(found)
    if found.position_ids is not None:
        say(f"position_ids: {_position_ids(found.position_ids)}")
    if found.prunable:
        what = "EMA, junk and what is no part of the model" if found.unread[1] else "EMA and junk"
        say(f"Without {what}: {size(found.file_bytes - found.prunable)}, {size(found.prunable)} less")
    if found.junk.sizes:
        largest_first = sorted(found.junk.sizes.items(), key=lambda item: -item[1])
        each = (f"{size(nbytes):>10}  {shown(name)}" for name, nbytes in largest_first)
        items(f"Junk, {count(found.junk.tensors, 'tensor')}, {size(found.junk.bytes)}", each)
    if found.nonfinite is not None:
        _show_scan(found.nonfinite)
    if found.notes:
        items("Notes", found.notes)
    show_about(found)
    show_lineage(mk.read_lineage(found.metadata, Path(found.path).name))
    if rest := untold(found):
        items("Metadata", (f"{shown(key)}: {cut(value)}" for key, value in rest.items()))
    if found.identity is not None:
        say("Hashes")
        show_identity(found.identity)


def _what(found: mk.Inspection) -> str:
    words = KINDS[found.kind]
    if found.title is not None:
        words = f"{found.title} {words} ({found.architecture})"
    encoders = f": {' and '.join(found.encoders)}" if found.encoders else ""
    return f"{words}{encoders}" + (f", predicts {found.prediction}" if found.prediction and found.architecture else "")


def _show_parts(found: mk.Inspection) -> None:
    parts = tight(table("part", "tensors", "size", "dtypes", right=("tensors", "size")))
    for name, share in found.components.items():
        row(parts, PARTS.get(name, name), f"{share.tensors:,}", size(share.bytes), _dtypes(share.dtypes))
    for role, share in found.roles.items():
        # That a LoRA's tensors are no component's says nothing.
        if share.tensors and (role in _OTHERS or (role == "unknown" and found.components)):
            row(parts, PARTS[role], f"{share.tensors:,}", size(share.bytes), _dtypes(share.dtypes))
    if found.unread[0]:
        row(parts, "no part of the model", f"{found.unread[0]:,}", size(found.unread[1]))
    if parts.row_count:
        console().print(parts)
    if found.weights_hashes:  # a table of its own: beside the dtypes there is no room in 80 columns
        hashes = tight(table("part", "weights hash"))
        for name in found.components:
            row(hashes, PARTS.get(name, name), found.weights_hashes.get(name, ""))
        console().print(hashes)


_OTHERS = ("schedule", "marker", "ema", "junk")


def _dtypes(dtypes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in dtypes.items())


def _position_ids(ids: mk.PositionIds) -> str:
    if ids.state == "ok":
        return "ok"
    if ids.state == "missing":
        return "missing (programs fill them in: no harm)"
    if not ids.wrong:
        return f"corrupt: stored as {ids.dtype}, not as integers; the values are still right"
    return f"corrupt: {len(ids.wrong)} of {ids.count} wrong ({listed(map(str, ids.wrong), 8)})"


def _show_scan(nonfinite: Mapping[str, int]) -> None:
    if not nonfinite:
        say("Scan: every value is finite")
        return
    each = (f"{shown(name)}  {number:,}" for name, number in nonfinite.items())
    items(f"Scan: NaN or Inf in {count(len(nonfinite), 'tensor')}", each)


def show_identity(found: mk.Identity) -> None:
    """Every hash of a file, and who uses it."""
    hashes = found.file
    say(f"  sha256   {hashes.sha256}")
    say(f"  AutoV1   {hashes.auto_v1:14}old lists, A1111 before 2023")
    say(f"  AutoV2   {hashes.auto_v2:14}A1111 (model hash), Civitai")
    if hashes.auto_v3:
        say(f"  AutoV3   {hashes.auto_v3:14}Civitai, A1111 (LoRA)")
    if found.claimed_v3 and not found.claimed_v3.startswith(hashes.auto_v3 or "-"):
        say(f"           {shown(found.claimed_v3[:12]):14}A1111 shows this one, from the file's metadata")
    if found.content:
        say(f"  content  {found.content}  mergekit-sd (lock files)")
    else:
        say(f"  content  none: {shown(found.no_content or '')}")
