"""Merge operations: pure functions of float32 tensors, registered with their signature.

To add one, write it in a module of this package; every module is imported here by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from mergekit_sd.operations.registry import OPERATIONS, PURPOSES, Operand, Operation, Parameter

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# In the order in which they are listed: by what they are for, then as they stand in their modules.
for _name in sorted(OPERATIONS, key=lambda name: PURPOSES.index(OPERATIONS[name].purpose)):
    OPERATIONS[_name] = OPERATIONS.pop(_name)

__all__ = ["OPERATIONS", "PURPOSES", "Operand", "Operation", "Parameter"]
