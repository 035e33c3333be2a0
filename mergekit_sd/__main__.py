"""The entry point: `mergekit-sd` and `python -m mergekit_sd`. Ctrl-C while importing ends quietly."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; never shows a traceback for Ctrl-C."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    try:
        from mergekit_sd.cli.main import run, stop_signals

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)  # it is over: the code stands, whatever the shutdown takes
    if code == 130:
        _end_at_once()
    sys.exit(code)


def _end_at_once() -> None:
    """Without the interpreter's shutdown: half-imported modules may not survive it.

    Python would also kill itself by SIGINT where the KeyboardInterrupt passed an `exec` of text, as in dataclasses.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(130)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """While importing nothing is held, and so no import can swallow the signal or print a traceback for it."""
    os._exit(130)


if __name__ == "__main__":
    main()
