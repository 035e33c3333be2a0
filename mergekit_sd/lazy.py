"""Modules that are imported at their first use, so that what does not compute starts at once.

Owns one thing: the promise that importing `mergekit_sd` does not import torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # the next time, it is simply there: chunks ask thousands of times
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyModule("torch")

__all__ = ["torch"]
