"""VAE files that are equal to the byte: which copy is kept, and what becomes of the others.

Owns the choice and the report. How a file is replaced is `replacing`'s, how it is undone `undo`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mergekit_sd.errors import NotWritable, UsageError
from mergekit_sd.events import CancelToken, Listener, ignore
from mergekit_sd.formats.open import MODEL_SUFFIXES
from mergekit_sd.library import reflink
from mergekit_sd.library.duplicates import by_hash
from mergekit_sd.library.entry import LibraryEntry
from mergekit_sd.library.journal import Journal, dedupe_runs, exclusive
from mergekit_sd.library.renaming import sidecars
from mergekit_sd.library.replacing import OTHER_DISK, Link, Pair, Refused, replace_file
from mergekit_sd.library.vaes import Advance, VaeGroup, list_vaes
from mergekit_sd.text import shown

_LOADED_WITH = (".vae.safetensors", ".vae.ckpt", ".vae.pt")  # WebUIs load `name.vae.pt` with `name.ckpt`


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is left as it is, and why; `failed` where it is the system that refuses."""

    path: Path
    reason: str
    failed: bool = False

    def as_json(self) -> dict[str, object]:
        """One flat object."""
        return {"path": str(self.path), "reason": self.reason, "failed": self.failed}


@dataclass(frozen=True, slots=True)
class DedupeGroup:
    """Files that are equal to the byte: the one that is kept, `why` that one, and what becomes of the others.

    `name` is what a published VAE is known as, `size` the bytes of one file. `linked` are links of the kept
    file already. `saves` counts what links elsewhere do not hold.
    """

    name: str | None
    sha256: str
    size: int
    kept: Path
    why: str
    replaced: tuple[Path, ...] = ()
    linked: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    saves: int = 0

    def as_json(self) -> dict[str, object]:
        """The group as plain data; `sidecars` are the files beside those replaced, which stay."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "size": self.size,
            "kept": str(self.kept),
            "why": self.why,
            "replaced": [
                {"path": str(path), "sidecars": [str(each) for each in sidecars(path)]} for path in self.replaced
            ],
            "linked": [str(path) for path in self.linked],
            "skipped": [each.as_json() for each in self.skipped],
            "saves": self.saves,
        }


@dataclass(frozen=True, slots=True)
class DedupeReport:
    """What was done, or would be (`applied`). `run` is the number that undoes it, None where nothing was done.

    `other_bytes` are the VAEs that several files hold with the same weights in other bytes: never touched.
    """

    link: Link
    applied: bool
    run: int | None
    groups: tuple[DedupeGroup, ...]
    other_bytes: tuple[VaeGroup, ...]

    @property
    def saves(self) -> int:
        """The bytes saved in all."""
        return sum(group.saves for group in self.groups)

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "link": self.link,
            "applied": self.applied,
            "run": self.run,
            "saves": self.saves,
            "groups": [group.as_json() for group in self.groups],
            "other_bytes": [group.as_json() for group in self.other_bytes],
        }


def dedupe_vaes(
    folders: Collection[str | Path],
    *,
    link: Link = "hard",
    apply: bool = False,
    threads: int | None = None,
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> DedupeReport:
    """Replace VAE files that are equal to the byte by links to one of them, or delete all but one.

    Only told unless `apply`. A file is replaced in one step, after both are read once more, and never if it is
    reached through a link or has changed; `undo_dedupe` undoes it. Checkpoints are not touched. Raises UsageError,
    NotWritable if the system refuses whatever was to be replaced, TargetLocked while another dedupe is
    under way, and Cancelled: what was done by then is undone like the rest.
    """
    if link == "reflink" and not reflink.AVAILABLE:
        raise UsageError("Only Linux has reflinks.", hint="take --link hard or sym")
    found = list_vaes(folders, threads=threads, on_event=on_event, cancel=cancel).groups
    links = [entry.path for group in found for entry in group.entries if not _is_real(entry.path)]
    if link == "delete":  # what former symlinks lead to, wherever those lie
        links += [step.path for run in dedupe_runs() if run.link == "sym" for step in run.pending]
    plans = [plan for group in found for plan in _plans(group, link, links)]
    run = None
    if apply:
        files, nbytes = _work(plans)
        with exclusive(), Journal(link) as journal:
            advance = Advance(files, nbytes, on_event, cancel)
            plans = [_applied(plan, link, journal, advance) for plan in plans]
            run = journal.number if any(plan.group.replaced for plan in plans) else None
    _check_something_went(plans, link)
    other = tuple(group for group in found if _has_other_bytes(group))
    return DedupeReport(link, apply, run, tuple(plan.group for plan in plans), other)


class _Plan(NamedTuple):
    """A group, and the entries and the status of its files as they were looked at."""

    group: DedupeGroup
    entries: Mapping[Path, LibraryEntry]
    status: Mapping[Path, os.stat_result]


def _plans(vae: VaeGroup, link: Link, links: Sequence[Path]) -> list[_Plan]:
    """One for each set of equal files of a VAE that are there more than once."""
    plans = []
    for entries in by_hash(vae.files, "sha256").values():
        known = {entry.path: entry for entry in entries}
        status = _status(known)
        if not status or len(known) < 2:
            continue
        needed = {path: _needed(path, links) for path in status} if link == "delete" else {}
        first, *others = _by_disk(status, link)
        rest = [path for other in others if len(other) == 1 for path in other]
        rest += [path for path in known if path not in status]
        for paths, skipped in ((first, rest), *((other, []) for other in others if len(other) > 1)):
            kept, why = _choose(paths, needed, vae.name)
            group = DedupeGroup(vae.name, entries[0].hashes["sha256"], entries[0].state.size, kept, why)
            plans.append(_Plan(_sorted_out(group, [*paths, *skipped], status, link, needed), known, status))
    return plans


def _status(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Of the files that are reached through no link, and still there."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            if _is_real(path):
                found[path] = path.stat()
    return found


def _by_disk(status: Mapping[Path, os.stat_result], link: Link) -> list[list[Path]]:
    """The files among which one is kept: all of them, or where links cannot lead across disks those of each disk."""
    disks: dict[int, list[Path]] = {}
    for path, each in status.items():
        disks.setdefault(each.st_dev if link in ("hard", "reflink") else 0, []).append(path)
    return sorted(disks.values(), key=len, reverse=True)


def _choose(paths: Sequence[Path], needed: Mapping[Path, str | None], name: str | None) -> tuple[Path, str]:
    """The file that is kept, and why."""

    def marks(path: Path) -> tuple[object, ...]:
        published = name is not None and path.name.casefold().startswith(name.casefold())
        return not needed.get(path), -len(sidecars(path)), not published, len(str(path)), str(path)

    words = ("must stay", "most files beside it", "published name", "shortest path", "first by name")
    first, *others = sorted(paths, key=marks)
    if not others:
        return first, "the only one that is no link"
    return first, next(word for word, one, two in zip(words, marks(first), marks(others[0]), strict=True) if one != two)


def _sorted_out(
    group: DedupeGroup,
    paths: Sequence[Path],
    status: Mapping[Path, os.stat_result],
    link: Link,
    needed: Mapping[Path, str | None],
) -> DedupeGroup:
    """What is to become of each file but the kept one."""
    replaced, linked, skipped = [], [], []
    for path in paths:
        if path == group.kept:
            continue
        if path not in status:
            target = Path(os.path.realpath(path))
            if path.is_symlink() and target in status:
                linked.append(path)
            else:
                skipped.append(Skipped(path, "it is reached through a link"))
        elif _is_linked(group.kept, path, status, link):
            linked.append(path)
        elif obstacle := _obstacle(path, status[path], status[group.kept], link, needed):
            skipped.append(obstacle)
        else:
            replaced.append(path)
    saves = _saved(replaced, status)
    return replace(group, replaced=tuple(replaced), linked=tuple(linked), skipped=tuple(skipped), saves=saves)


def _obstacle(
    path: Path, status: os.stat_result, kept: os.stat_result, link: Link, needed: Mapping[Path, str | None]
) -> Skipped | None:
    """Why a file cannot be replaced, as far as can be seen now."""
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    if reason := needed.get(path):
        return Skipped(path, reason)
    if link in ("hard", "reflink") and status.st_dev != kept.st_dev:
        return Skipped(path, OTHER_DISK)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return Skipped(path, "its folder cannot be written to", failed=True)
    if user not in (0, status.st_uid):
        return Skipped(path, "it belongs to another user")
    if link in ("hard", "sym") and _rights(status) != _rights(kept):
        return Skipped(path, "its owner or permissions are not those of the kept file")
    return None


def _rights(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid


def _needed(path: Path, links: Sequence[Path]) -> str | None:
    """Why other files would miss this one under its name, though an equal one is there."""
    for ending in _LOADED_WITH:
        stem = path.name[: -len(ending)]
        if stem and path.name.lower().endswith(ending):
            models = [each for suffix in sorted(MODEL_SUFFIXES) if (each := path.with_name(stem + suffix)).exists()]
            if models:
                return f"it is loaded with {shown(models[0].name)}"
    if path.with_name("config.json").exists():
        return "the config.json beside it belongs to it"
    for each in links:
        if os.path.realpath(each) == str(path):
            return f"the link {shown(str(each))} leads to it"
    return None


def _is_linked(kept: Path, path: Path, status: Mapping[Path, os.stat_result], link: Link) -> bool:
    """Whether a file is the kept one already, or shares its bytes with it."""
    if _node(status[kept]) == _node(status[path]):
        return True
    if link != "reflink" or status[kept].st_dev != status[path].st_dev:
        return False
    try:
        with kept.open("rb") as one, path.open("rb") as other:
            return reflink.share_bytes(one.fileno(), other.fileno())
    except OSError:
        return False


def _is_real(path: Path) -> bool:
    """Whether no part of a path is a link: it leads nowhere but where it says."""
    return os.path.realpath(path) == str(path)


def _saved(paths: Sequence[Path], status: Mapping[Path, os.stat_result]) -> int:
    """The bytes that are free once these are gone: those of files of which no other link remains."""
    sizes = {_node(status[path]): status[path] for path in paths}
    gone = Counter(_node(status[path]) for path in paths)
    return sum(each.st_size for node, each in sizes.items() if gone[node] >= each.st_nlink)


def _node(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _work(plans: Sequence[_Plan]) -> tuple[int, int]:
    """How many files are to be compared, and the bytes to read for it."""
    counts = [(len(plan.group.replaced), plan.group.size) for plan in plans]
    return sum(number for number, _ in counts), sum(2 * number * size for number, size in counts)


def _applied(plan: _Plan, link: Link, journal: Journal, advance: Advance) -> _Plan:
    """The plan done, and what it came to."""
    group, done, skipped = plan.group, [], list(plan.group.skipped)
    for path in group.replaced:
        pair = Pair(path, plan.entries[path].state, group.kept, plan.entries[group.kept].state)
        try:
            advance(0)  # sees a cancel
            replace_file(pair, link, journal, advance)
            done.append(path)
        except Refused as refused:
            skipped.append(Skipped(path, refused.reason, refused.failed))
    saves = _saved(done, plan.status)
    return plan._replace(group=replace(group, replaced=tuple(done), skipped=tuple(skipped), saves=saves))


def _check_something_went(plans: Sequence[_Plan], link: Link) -> None:
    """Refuse where nothing can be done, and not for want of anything to do."""
    skipped = [each for plan in plans for each in plan.group.skipped]
    failed = [each for each in skipped if each.failed]
    if failed and not any(plan.group.replaced or plan.group.linked for plan in plans):
        done = "deleted" if link == "delete" else "replaced by a link"
        details = [f"{each.path}: {each.reason}" for each in skipped]
        hint = "check the permissions and the file system, or take another --link"
        raise NotWritable(f"No file can be {done}.", file=failed[0].path.parent, hint=hint, details=details)


def _has_other_bytes(group: VaeGroup) -> bool:
    return len({entry.hashes.get("sha256") for entry in group.files}) > 1
