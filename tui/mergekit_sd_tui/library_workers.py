"""What the library's screen has done in threads: reading the index, scanning, hashing, looking beside a model.

Owns how progress becomes messages. Must not know widgets: a worker only posts.
"""

from __future__ import annotations

import time
from pathlib import Path

import mergekit_sd as mk
from mergekit_sd.events import CancelToken, Event
from mergekit_sd.text import count, shown, size
from mergekit_sd_tui import messages
from mergekit_sd_tui.pictures import read_shot
from mergekit_sd_tui.screens.working import Post

BATCH = 200  # entries of one message
BATCH_SECONDS = 0.1  # after which a smaller one is told
PREVIEWS = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def read_index(post: Post) -> None:
    """Tell what the index has."""
    every = mk.list_library()
    for start in range(0, len(every), BATCH):
        post(messages.EntriesFound(tuple(every[start : start + BATCH])))
    post(messages.IndexRead(not every, () if every else tuple(mk.model_folders())))


def look_beside(path: Path, post: Post) -> None:
    """Tell which files belong to a model, and its preview."""
    beside = mk.sidecars(path)
    post(messages.BesideFound(path, tuple(each.name for each in beside)))
    pictures = [each for each in beside if each.suffix.lower() in PREVIEWS]
    # WebUI's own name for a preview comes before any other picture.
    pictures.sort(key=lambda each: ".preview." not in each.name.lower())
    shots = (read_shot(each) for each in pictures)
    post(messages.PreviewFound(path, next((shot for shot in shots if shot.picture), None)))


def read_made(paths: tuple[Path, ...], post: Post) -> None:
    """Tell what jobs have made."""
    there = [path for path in dict.fromkeys(paths) if path.is_file()]
    post(messages.EntriesFound(tuple(mk.look_up(path) for path in there)))


def scan(hashes: str, post: Post, token: CancelToken, folders: tuple[Path, ...] = ()) -> None:
    """Bring the index up to date and tell what is new; without folders, in all that are known."""
    batch: list[mk.LibraryEntry] = []
    seen, last = 0, time.monotonic()

    def flush() -> None:
        nonlocal last
        if batch:
            post(messages.EntriesFound(tuple(batch)))
            batch.clear()
        last = time.monotonic()

    def listen(event: Event) -> None:
        nonlocal seen
        if isinstance(event, mk.FileRead | mk.FileHashed):
            seen += isinstance(event, mk.FileRead)
            if isinstance(event, mk.FileHashed) or event.news != "same":
                batch.append(event.entry)
            if len(batch) >= BATCH or time.monotonic() - last > BATCH_SECONDS:
                flush()
                if isinstance(event, mk.FileRead):
                    post(messages.Advanced(f"Scanning: {count(seen, 'model')} …"))
        elif isinstance(event, mk.FileGone):
            post(messages.EntryGone(Path(event.path)))
        elif isinstance(event, mk.HashingProgressed):
            post(messages.Advanced(f"Hashing: {size(event.done)} of {size(event.bytes)}"))

    try:
        report = mk.scan_library(folders, hashes=hashes, on_event=listen, cancel=token)  # type: ignore[arg-type]
    finally:
        flush()
    post(messages.Scanned(report))


def hash_models(paths: tuple[Path, ...], post: Post, token: CancelToken) -> None:
    """Hash some models."""
    from mergekit_sd.errors import Cancelled

    for number, path in enumerate(paths, 1):
        done, last = 0, 0.0

        def advance(nbytes: int, number: int = number, path: Path = path) -> None:
            nonlocal done, last
            if token.cancelled:
                raise Cancelled
            done += nbytes
            if time.monotonic() - last > BATCH_SECONDS:
                last = time.monotonic()
                post(messages.Advanced(f"Hashing {number} of {len(paths)}: {shown(path.name)}, {size(done)}"))

        mk.known_identity(path, advance)
        post(messages.EntriesFound((mk.look_up(path),)))
    post(messages.Hashed(len(paths)))
