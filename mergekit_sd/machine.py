"""What this machine has left, as its system tells it. Must not know what it is needed for."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TypeAlias

Memory: TypeAlias = tuple[int | None, int]


def available_memory() -> Memory | None:
    """Free and total bytes, a container's limit included; None for what the system does not tell."""
    for ask in (_memory_linux, _memory_posix, _memory_windows):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            free, total = ask()
            return _within_cgroup(free, total)
    return None


def _memory_linux() -> Memory:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":", 1) for line in lines)}
    return fields["MemAvailable"], fields["MemTotal"]


def _memory_posix() -> Memory:
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else None  # not on macOS
    return free, os.sysconf("SC_PHYS_PAGES") * page


def _memory_windows() -> Memory:
    import ctypes

    status = (ctypes.c_ulonglong * 8)(64)  # MEMORYSTATUSEX: its length and load, total, free, …
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):  # type: ignore[attr-defined,unused-ignore]
        raise OSError(errno.ENOSYS, "GlobalMemoryStatusEx")
    return status[2], status[1]


def _within_cgroup(free: int | None, total: int) -> Memory:
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        return min(total if free is None else free, max(0, limit - used)), min(total, limit)
    return free, total
