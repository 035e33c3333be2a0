"""mergekit-sd: merge and operate on Stable Diffusion models.

The curated API. Names are imported when they are first used: `import mergekit_sd` is cheap, and
torch comes only with the first computation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_sd.api import (
        OPERATIONS,
        OUTPUT_DTYPES,
        Recipe,
        RunReport,
        check_run,
        load,
        plan,
        plan_as_json,
        recipe_of,
        recipe_text,
        run,
        save,
        save_recipe,
    )
    from mergekit_sd.demo import make_demo
    from mergekit_sd.events import CancelToken, Event
    from mergekit_sd.graph import open, ops
    from mergekit_sd.inspection import (
        Diff,
        GroupDiff,
        Identity,
        Inspection,
        PositionIds,
        TensorDiff,
        bytes_to_read,
        diff_files,
        identify,
        inspect_file,
    )
    from mergekit_sd.library import (
        DuplicateGroup,
        Duplicates,
        FileGone,
        FileHashed,
        FileRead,
        HashingProgressed,
        HashingStarted,
        Library,
        LibraryEntry,
        ModelFolder,
        ScanReport,
        also_in,
        find_by_hash,
        find_by_name,
        find_duplicates,
        library_file,
        list_library,
        look_up,
        model_folders,
        rename_model,
        scan_library,
        sidecars,
    )
    from mergekit_sd.provenance import recover, verify

# Where each name of the API lives.
_HOMES = {
    "api": (
        "OPERATIONS",
        "OUTPUT_DTYPES",
        "Recipe",
        "RunReport",
        "check_run",
        "load",
        "plan",
        "plan_as_json",
        "recipe_of",
        "recipe_text",
        "run",
        "save",
        "save_recipe",
    ),
    "demo": ("make_demo",),
    "doctor": ("Finding", "check_machine"),
    "events": ("CancelToken", "Event"),
    "graph": ("open", "ops"),
    "inspection": (
        "Diff",
        "GroupDiff",
        "Identity",
        "Inspection",
        "PositionIds",
        "TensorDiff",
        "bytes_to_read",
        "diff_files",
        "identify",
        "inspect_file",
    ),
    "library": (
        "DuplicateGroup",
        "Duplicates",
        "FileGone",
        "FileHashed",
        "FileRead",
        "HashingProgressed",
        "HashingStarted",
        "Library",
        "LibraryEntry",
        "ModelFolder",
        "ScanReport",
        "also_in",
        "find_by_hash",
        "find_by_name",
        "find_duplicates",
        "library_file",
        "list_library",
        "look_up",
        "model_folders",
        "rename_model",
        "scan_library",
        "sidecars",
    ),
    "reference": ("by_purpose", "describe_operation", "find_operation", "parameter_forms"),
    "recipe.presets": ("PRESETS", "SD_BLOCKS", "find_preset", "preset"),
    "recipe.roots": ("add_root", "load_roots", "roots_file"),
    "recipe.schema": ("recipe_json_schema",),
    "provenance": ("recover", "verify"),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "OPERATIONS",
    "OUTPUT_DTYPES",
    "PRESETS",
    "SD_BLOCKS",
    "CancelToken",
    "Diff",
    "DuplicateGroup",
    "Duplicates",
    "Event",
    "FileGone",
    "FileHashed",
    "FileRead",
    "Finding",
    "GroupDiff",
    "HashingProgressed",
    "HashingStarted",
    "Identity",
    "Inspection",
    "Library",
    "LibraryEntry",
    "ModelFolder",
    "PositionIds",
    "Recipe",
    "RunReport",
    "ScanReport",
    "TensorDiff",
    "add_root",
    "also_in",
    "by_purpose",
    "bytes_to_read",
    "check_machine",
    "check_run",
    "describe_operation",
    "diff_files",
    "find_by_hash",
    "find_by_name",
    "find_duplicates",
    "find_operation",
    "find_preset",
    "identify",
    "inspect_file",
    "library_file",
    "list_library",
    "load",
    "load_roots",
    "look_up",
    "make_demo",
    "model_folders",
    "open",
    "ops",
    "parameter_forms",
    "plan",
    "plan_as_json",
    "preset",
    "recipe_json_schema",
    "recipe_of",
    "recipe_text",
    "recover",
    "rename_model",
    "roots_file",
    "run",
    "save",
    "save_recipe",
    "scan_library",
    "sidecars",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
