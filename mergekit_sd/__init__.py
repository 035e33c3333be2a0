"""mergekit-sd: merge and operate on Stable Diffusion models.

The curated API. Names are imported when they are first used: `import mergekit_sd` is cheap, and
torch comes only with the first computation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_sd.api import (
        Recipe,
        RunReport,
        check_run,
        load,
        plan,
        plan_as_json,
        recipe_of,
        run,
        save,
    )
    from mergekit_sd.events import CancelToken, Event
    from mergekit_sd.graph import Ops, open

    ops: Ops

_HOMES = {
    "api": ("Recipe", "RunReport", "check_run", "load", "plan", "plan_as_json", "recipe_of", "run", "save"),
    "events": ("CancelToken", "Event"),
    "graph": ("open", "ops"),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "CancelToken",
    "Event",
    "Recipe",
    "RunReport",
    "check_run",
    "load",
    "open",
    "ops",
    "plan",
    "plan_as_json",
    "recipe_of",
    "run",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
