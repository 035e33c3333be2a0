"""Files that share their bytes on the disk, by calls that only Linux has.

Owns the system calls and their structures (linux/fs.h, linux/fiemap.h). Must not know names of files.
"""

from __future__ import annotations

import struct
import sys

AVAILABLE = sys.platform == "linux"

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_SYNC = 1  # FIEMAP_FLAG_SYNC
_LAST, _SHARED = 0x1, 0x2000  # FIEMAP_EXTENT_LAST, _SHARED
_HEAD = struct.Struct("=QQLLLL")  # start, length, flags, extents mapped, room for extents, reserved
_EXTENT = struct.Struct("=QQQQQLLLL")  # logical, physical, length, 2 reserved, flags, 3 reserved
_MOST = 1000  # extents asked for at once


def clone(source: int, target: int) -> None:
    """Make an empty file one that shares all bytes with another. Raises OSError where the file system cannot."""
    import fcntl

    fcntl.ioctl(target, _FICLONE, source)


def share_bytes(one: int, other: int) -> bool:
    """Whether two files of equal size lie at the same place on the disk already; False where nobody can say."""
    try:
        extents = _extents(one)
        return bool(extents) and extents == _extents(other)
    except OSError:
        return False


def _extents(descriptor: int) -> list[tuple[int, int, int]]:
    """Offset, place and length of each extent; none if one is not shared."""
    import fcntl

    found: list[tuple[int, int, int]] = []
    start = 0
    while True:
        request = bytearray(_HEAD.pack(start, 2**64 - 1 - start, _SYNC, 0, _MOST, 0) + bytes(_MOST * _EXTENT.size))
        fcntl.ioctl(descriptor, _FIEMAP, request)
        mapped = _HEAD.unpack_from(request)[3]
        flags = _LAST
        for number in range(mapped):
            logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(
                request, _HEAD.size + number * _EXTENT.size
            )
            if not flags & _SHARED:
                return []
            found.append((logical, physical, length))
            start = logical + length
        if flags & _LAST:
            return found
