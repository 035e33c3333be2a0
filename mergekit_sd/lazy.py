"""Modules that are imported at their first use, so that what does not compute starts at once.

Owns one thing: the promise that importing `mergekit_sd` does not import torch.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals of Python's handlers come when this ends: an exception inside C++ that an import runs kills the process.

    It takes a second or two at most. Threads other than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in dict.fromkeys(came):
            signal.raise_signal(each)


class _LazyModule(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        with _signals_held() if self.__name__ not in sys.modules else contextlib.nullcontext():
            module = importlib.import_module(self.__name__)
        value = getattr(module, name)
        setattr(self, name, value)  # the next time, it is simply there: chunks ask thousands of times
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyModule("torch")

__all__ = ["torch"]
