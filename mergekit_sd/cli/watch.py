"""The progress of what reads many files: a scan, comparing, restoring.

Owns when something is told. How bars and lines look is `show`'s.
"""

from __future__ import annotations

import sys
import time

import click

import mergekit_sd as mk
from mergekit_sd.cli.show import Talk
from mergekit_sd.events import Event, Noted, OutputStarted, Progressed
from mergekit_sd.text import count

_SECONDS = 0.5  # between JSON lines
_BLINK = 0.1  # seconds between counts on a terminal


class Watch:
    """Shows a scan, or other reading of many files: counts and a bar on a terminal, JSON lines with `--json`."""

    def __init__(self, as_json: bool, verb: str = "hashing") -> None:
        self._as_json = as_json
        self._verb = verb
        self._talk = Talk(as_json)
        self._files = 0
        self._hashing = ""
        self._last = 0.0

    def __enter__(self) -> Watch:
        self._talk.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()
        self._talk.__exit__()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, mk.FileRead):
            self._files += 1
            if not self._as_json and sys.stderr.isatty() and self._is_time(_BLINK):
                click.echo(f"\r{count(self._files, 'file')} …", nl=False, err=True)
        elif isinstance(event, mk.HashingProgressed):
            self._advance(event)
        elif isinstance(event, mk.HashingStarted) and not self._as_json:
            self._wipe()
            self._talk.__exit__()  # the bar before, if there was one
            self._hashing = f"{self._verb} {count(event.files, 'file')}"
            self._talk(OutputStarted(self._hashing, "", event.bytes))
        elif isinstance(event, Noted) or (self._as_json and not isinstance(event, mk.FileHashed)):
            self._talk(event)

    def _advance(self, event: mk.HashingProgressed) -> None:
        if not self._as_json:
            self._talk(Progressed(self._hashing, event.done, event.bytes, event.seconds))
        elif self._is_time(_SECONDS):
            self._talk(event)

    def _is_time(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last < seconds:
            return False
        self._last = now
        return True

    def _wipe(self) -> None:
        """Take the count off the terminal."""
        if self._files and not self._as_json and sys.stderr.isatty():
            click.echo("\r\x1b[K", nl=False, err=True)
