"""Python itself as the witness that opening a file imports, compiles, runs, starts and unpickles nothing."""

from __future__ import annotations

import contextlib
import copyreg
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_sd.errors import ForbiddenCall, MergekitError
from mergekit_sd.formats.open import open_model

WATCHED = ("import", "exec", "compile", "os.", "subprocess.", "pickle.", "marshal.", "ctypes.", "socket.", "code.")
_seen: list[str] = []
_watching = False


def _witness(event: str, args: object) -> None:
    if _watching and event.startswith(WATCHED):
        _seen.append(event)


sys.addaudithook(_witness)  # it cannot be removed: it looks at nothing while nobody watches


@contextlib.contextmanager
def nothing_happens() -> Iterator[None]:
    """Fails if anything of the kind happens meanwhile."""
    global _watching
    modules, extensions = set(sys.modules), dict(copyreg._extension_registry)
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert _seen == []
    assert set(sys.modules) == modules
    assert copyreg._extension_registry == extensions


def refuse(path: Path, kind: type[MergekitError] = ForbiddenCall) -> MergekitError:
    """The refusal of a file, with all that a refusal has to have."""
    with nothing_happens(), pytest.raises(MergekitError) as caught:
        open_model(path)
    assert type(caught.value) is kind, caught.value
    assert (caught.value.exit_code, caught.value.file) == (3, str(path))
    assert caught.value.hint
    return caught.value
