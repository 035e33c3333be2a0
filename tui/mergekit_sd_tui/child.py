"""The engine in a process of its own: `python -m mergekit_sd`, which stops when its standard input is closed.

Owns one thing: the end of whoever started it, however that came, is a Ctrl-C here. Cancelling a job closes the
input, and so does the death of the UI, even by SIGKILL; that works alike on every platform.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time
from types import FrameType

AGAIN = 2.0  # seconds; an import may have swallowed the first Ctrl-C
CANCELLED = 130


def main() -> None:
    """Run the command line of `sys.argv`."""
    signal.signal(signal.SIGINT, _leave)
    threading.Thread(target=_watch, daemon=True).start()
    runpy.run_module("mergekit_sd", run_name="__main__", alter_sys=True)


def _watch() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held while Python shuts down
        pass
    while True:
        _interrupt()
        time.sleep(AGAIN)


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it from whatever it waits for
    else:
        import _thread

        _thread.interrupt_main()


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Until the command line has its own handler, nothing is held."""
    os._exit(CANCELLED)


if __name__ == "__main__":
    main()
