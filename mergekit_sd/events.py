"""What a run tells while it goes on: typed events from one place, for a bar, JSON lines or a UI.

Must not know who listens. Events are frozen values; `as_json()` is the line that `--json` prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str] = "event"

    def as_json(self) -> dict[str, object]:
        """The event as one flat object with its kind under "event"."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Noted(Event):
    """Something that the user should know and that stops nothing."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True)
class OutputStarted(Event):
    """An output's pass begins; `bytes` is the size of the file to come."""

    kind: ClassVar[str] = "output_started"
    output: str
    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Progressed(Event):
    """`done` of `bytes` of the output's data are computed; `seconds` since its pass began."""

    kind: ClassVar[str] = "progress"
    output: str
    done: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OutputFinished(Event):
    """The file is under its name. `content_hash` is None where no hash was asked for."""

    kind: ClassVar[str] = "output_finished"
    output: str
    path: str
    bytes: int
    content_hash: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Sampling(Event):
    """Pictures of a model are in the making: `done` of `steps` of them all; `stage` says at what it is."""

    kind: ClassVar[str] = "sampling"
    model: str
    stage: str
    done: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MemoryTold(Event):
    """About how many bytes the networks will take at most; `free`: what the machine has, None where it is not known."""

    kind: ClassVar[str] = "memory"
    bytes: int
    free: int | None


Listener = Callable[[Event], None]


class CancelToken:
    """Asks a run to stop. Safe to set from a signal handler or another thread."""

    def __init__(self) -> None:
        self._cancelled = False  # no threading.Event: a signal handler that interrupts itself would wait for its lock
        self.listening = False
        """Whether a run is under way that will see the token: then a signal handler need not raise."""

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """While a run holds files that it must remove itself."""
        self.listening = True
        try:
            yield
        finally:
            self.listening = False

    def cancel(self) -> None:
        """Ask; the run stops at the next chunk, removes what it wrote and raises Cancelled."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether someone asked."""
        return self._cancelled


def ignore(_: Event) -> None:
    """The listener that listens to nothing."""
