"""What this machine has and lacks for merging, each with what to do about it.

Owns the checks. Must not know models or recipes. It is the one place besides computing that
imports torch, and it tries the disk's calls in a folder of its own, which it removes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mergekit_sd.errors import MergekitError
from mergekit_sd.machine import available_memory
from mergekit_sd.recipe.roots import CONFIG_VARIABLE, config_folder, load_roots
from mergekit_sd.text import size
from mergekit_sd.version import VERSION

State = Literal["ok", "note", "problem"]

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)
MEMORY_NEEDED = 512 << 20  # torch itself takes 230 MiB, the buffers 64 MiB
MEMORY_WANTED = 2 << 30  # whole-tensor operations of SDXL on several threads
DISK_WANTED = 7 << 30  # one SDXL model in fp16 is 6.5 GiB
TRIED = 1 << 20

OLD_TORCH = "its weights_only loading can be broken (CVE-2025-32434, CVE-2026-24747): pip install 'torch>=2.10'"
NO_TORCH = "pip install 'torch>=2.10'"
NO_GPU = "nothing needs one: merging runs on the CPU"
NO_DRIVER = "this torch is built for a GPU but finds none: check the driver, if there should be one"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it is, what was found, what to do."""

    name: str
    state: State
    found: str
    todo: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return asdict(self)


def check_machine(folder: Path | None = None) -> Iterator[Finding]:
    """Every check, one after the other; `folder` is where outputs would go (the current one)."""
    for check in (_python, _torch, _device, _cores, _memory):
        yield check()
    here, temporary = folder or _told(os.getcwd), _told(tempfile.gettempdir)
    yield from check_folder("this folder", here)
    yield from check_folder("temporary", temporary, trial=_device_number(here) != _device_number(temporary))
    yield from check_roots()
    yield check_config()


# --- the programs -------------------------------------------------------------------------------------


def _python() -> Finding:
    found = f"{platform.python_version()}, mergekit-sd {VERSION}, {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "problem", found, "install Python 3.11 or newer")
    if sys.maxsize < 1 << 32:
        return Finding("python", "problem", f"{found}, 32 bits", "install a Python of 64 bits: models are too large")
    return Finding("python", "ok", found)


def _torch() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("torch", "problem", "not installed", NO_TORCH)
    except Exception as error:  # a broken installation fails in many ways
        return Finding("torch", "problem", f"cannot be loaded: {error}", f"reinstall it: {NO_TORCH}")
    return judge_torch(str(torch.__version__))


def judge_torch(version: str) -> Finding:
    """Whether this version of torch is new enough to be safe."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        return Finding("torch", "problem", f"{version} is too old", OLD_TORCH)
    return Finding("torch", "ok", version)


def _device() -> Finding:
    try:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch talks of drivers here; we say it ourselves
            names = [_cuda_words(torch, number) for number in range(torch.cuda.device_count())]
            if torch.backends.mps.is_available():
                names.append("Apple GPU (mps)")
        built_for_gpu = bool(torch.version.cuda or torch.version.hip)
    except Exception as error:
        return Finding("device", "note", f"cannot be asked: {error}", NO_GPU)
    if names:
        return Finding("device", "ok", "; ".join(names))
    return Finding("device", "note" if built_for_gpu else "ok", "CPU", NO_DRIVER if built_for_gpu else NO_GPU)


def _cuda_words(torch: Any, number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    return f"cuda:{number} {properties.name}, {size(properties.total_memory)}"


# --- cores and memory ---------------------------------------------------------------------------------


def _cores() -> Finding:
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    quota = _cgroup_cores()
    found = f"{usable} usable of {there}"
    if quota is not None and quota < usable:
        todo = f"give --threads {max(1, round(quota))}, or allow the container more"
        return Finding("cores", "note", f"{found}, the container may use {quota:g}", todo)
    return Finding("cores", "ok", found)


def _cgroup_cores() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _memory() -> Finding:
    known = available_memory()
    if known is None:
        return Finding("memory", "note", "not known on this system", "a merge needs 0.5 GiB")
    return judge_memory(*known)


def judge_memory(free: int | None, total: int) -> Finding:
    """Whether a merge fits: a streaming one takes little, whole-tensor operations more."""
    found = f"{size(total)} in all" if free is None else f"{size(free)} free of {size(total)}"
    usable = total if free is None else free
    if usable < MEMORY_NEEDED:
        return Finding("memory", "problem", found, "a merge needs 0.5 GiB: close other programs")
    if usable < MEMORY_WANTED:
        return Finding("memory", "note", found, "whole-tensor operations may want more: give them --threads 1")
    return Finding("memory", "ok", found)


# --- folders ------------------------------------------------------------------------------------------


def _told(ask: Callable[[], str]) -> Path:
    """A folder that the system names; one that is not there where it cannot (the current one was deleted)."""
    with contextlib.suppress(OSError):
        return Path(ask())
    return Path("(none)")


def _device_number(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return folder.stat().st_dev
    return None


def check_folder(label: str, folder: Path, *, trial: bool = True) -> Iterator[Finding]:
    """Room in a folder, and with `trial` what its file system can do."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(label, "problem", f"{folder}: {error.strerror}", "go to a folder that exists")
        return
    found = f"{folder}: {size(free)} free"
    full = free < DISK_WANTED
    todo = "an SDXL model in fp16 takes 6.5 GiB: free some space, or write elsewhere"
    yield Finding(label, "note" if full else "ok", found, todo if full else None)
    if trial:
        yield _try_out(f"{label}, disk", folder)


def _try_out(label: str, folder: Path) -> Finding:
    """Try the calls that an output needs, in a folder beside, removed after."""
    try:
        with tempfile.TemporaryDirectory(prefix=".mergekit-sd-doctor-", dir=folder) as name:
            return judge_disk(label, {what: attempt(Path(name)) for what, attempt in TRIALS.items()})
    except OSError as error:
        return Finding(label, "note", f"cannot be written to: {error.strerror}", "write outputs to another folder")


def judge_disk(label: str, can: dict[str, bool]) -> Finding:
    """Put what a file system can and cannot do into words."""
    lacking = [what for what, works in can.items() if not works]
    if not lacking:
        return Finding(label, "ok", ", ".join(can))
    found = f"no {', no '.join(lacking)}"
    todo = "; ".join(WITHOUT[what] for what in lacking)
    return Finding(label, "problem" if "atomic rename" in lacking else "note", found, todo)


WITHOUT = {
    "preallocation": "a full disk shows only while writing",
    "kernel copies": "untouched tensors are copied through memory, which is slower",
    "locks": "do not write one output with two runs at once",
    "atomic rename": "outputs cannot be put in place here: write them to another disk",
}


def _preallocates(folder: Path) -> bool:
    if not hasattr(os, "posix_fallocate"):
        return False
    with (folder / "room").open("wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, TRIED)
        return True
    return False


def _copies_in_kernel(folder: Path) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    (folder / "from").write_bytes(bytes(TRIED))
    with (folder / "from").open("rb") as source, (folder / "to").open("wb") as target, contextlib.suppress(OSError):
        return os.copy_file_range(source.fileno(), target.fileno(), TRIED) > 0
    return False


def _locks(folder: Path) -> bool:
    """Whether a second opening of a locked file is refused its lock."""
    try:
        import fcntl
    except ImportError:  # Windows locks on every file system
        return True
    with (folder / "lock").open("wb") as first, (folder / "lock").open("wb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _renames(folder: Path) -> bool:
    old, new = folder / "old", folder / "new"
    with contextlib.suppress(OSError):
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        new.replace(old)
        return old.read_bytes() == b"new" and not new.exists()
    return False


TRIALS: dict[str, Callable[[Path], bool]] = {
    "preallocation": _preallocates,
    "kernel copies": _copies_in_kernel,
    "locks": _locks,
    "atomic rename": _renames,
}

# --- what the user set up -----------------------------------------------------------------------------


def check_roots() -> Iterator[Finding]:
    """Each registered root: it is there, or what to do."""
    try:
        roots = load_roots()
    except MergekitError as error:
        yield Finding("roots", "problem", error.message, f"mend or delete {error.file}")
        return
    if not roots:
        yield Finding("roots", "ok", "none registered", "mergekit-sd roots add NAME DIR names a folder of models")
    for name, folder in roots.items():
        if folder.is_dir():
            yield Finding(f"root {name}", "ok", str(folder))
        else:
            todo = f"connect its disk, or name another: mergekit-sd roots add {name} DIR"
            yield Finding(f"root {name}", "problem", f"{folder} is not there", todo)


def check_config() -> Finding:
    """The folder where the list of roots is kept: it, or what it would be made in, can be written to."""
    folder = config_folder().absolute()
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding("configuration", "ok", str(folder))
    todo = f"roots cannot be registered: set {CONFIG_VARIABLE} to a folder that can be written to"
    return Finding("configuration", "problem", f"{folder} cannot be written to", todo)
