"""The directory of a zip file, read strictly: what is in it, and where.

Owns the zip format, as far as torch and programs that pack again use it. Nothing it says is taken on
trust: a file that another program could read otherwise is refused. The format:
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mergekit_sd.errors import MalformedFile
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.views import Inflated
from mergekit_sd.text import shown

MAX_DIRECTORY = 64 << 20  # bytes; a training checkpoint has half a million
MAX_COMMENT = 0xFFFF
MAX_RATIO = 1032  # deflate cannot pack better: what claims to is made up
STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # the field's value stands in the zip64 record
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_ZIP64 = 1

_AGAIN = "download or copy it again"
_DECEIVES = "the file is damaged or made to deceive: download it again, or get the model as .safetensors"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the archive. `packed` bytes in the archive become `nbytes`."""

    name: str
    method: int
    crc: int
    packed: int
    nbytes: int
    header: int


class Archive:
    """An opened zip file. Raises MalformedFile for anything that is not as it should be."""

    def __init__(self, file: InputFile) -> None:
        self.path: Path = file.path
        self._file = file
        self._directory = 0  # where it begins: members end before
        self.members: Mapping[str, Member] = self._read_directory()

    def read(self, member: Member, most: int) -> bytes:
        """The bytes of a small member, checked."""
        if member.nbytes > most:
            self._bad(f"{_quoted(member)} has {member.nbytes:,} bytes; {most:,} is the most.")
        at = self.locate(member)
        if member.method == DEFLATED:
            try:
                return bytes(Inflated(0, member.nbytes, at, member.packed, member.crc).make(self._file.read_into))
            except zlib.error as error:
                self._bad(f"{_quoted(member)} is damaged ({error}).", _AGAIN)
        data = self._bytes(at, member.nbytes)
        if zlib.crc32(data) != member.crc:
            self._bad(f"{_quoted(member)} is damaged: its checksum (CRC) does not fit it.", _AGAIN)
        return data

    def locate(self, member: Member) -> int:
        """Where a member's bytes begin in the file: behind its own header, which must agree with the directory."""
        if member.method not in (STORED, DEFLATED):
            hint = "pack it again without compression, or save it again with torch"
            self._bad(f"{_quoted(member)} is compressed by method {member.method}, which is not read here.", hint)
        if member.method == STORED and member.packed != member.nbytes:
            self._bad(f"{_quoted(member)} is said to have {member.packed:,} bytes and {member.nbytes:,}.")
        if member.nbytes > member.packed * MAX_RATIO + MAX_RATIO:
            self._bad(f"{_quoted(member)} is said to shrink from {member.nbytes:,} bytes to {member.packed:,}.")
        if member.header + _LOCAL.size + len(member.name) > self._directory:
            self._bad(f"{_quoted(member)} lies outside of the archive.")
        raw = self._bytes(member.header, _LOCAL.size)
        mark, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(raw)
        begin = member.header + _LOCAL.size
        name = self._bytes(begin, min(name_length, self._directory - begin))
        if mark != b"PK\3\4" or method != member.method or flags & _ENCRYPTED or _decoded(name) != member.name:
            self._bad(f"{_quoted(member)} is something else where the archive's directory says that it lies.")
        at = int(begin + name_length + extra_length)
        if at + member.packed > self._directory:
            self._bad(f"{_quoted(member)} reaches beyond the archive's end.")
        return at

    # --- the directory -------------------------------------------------------------------------------

    def _read_directory(self) -> dict[str, Member]:
        count, length, begin, end = self._find_directory()
        if begin + length != end:
            self._bad("The zip archive has bytes that belong to nothing before its directory or behind it.")
        if length > MAX_DIRECTORY or count * _ENTRY.size > length:
            self._bad(f"The zip archive's directory of {length:,} bytes cannot hold its {count:,} entries.")
        self._directory = begin
        raw, at = self._bytes(begin, length), 0
        members: dict[str, Member] = {}
        for _ in range(count):
            member, at = self._entry(raw, at)
            if member.name in members:
                self._bad(f"The zip archive holds {_quoted(member)} twice.")
            members[member.name] = member
        if at != length:
            self._bad("The zip archive's directory is longer than its entries.")
        return members

    def _find_directory(self) -> tuple[int, int, int, int]:
        """Number of entries, length and begin of the directory, and where it has to end."""
        total = self._file.state.size
        tail_begin = max(0, total - _END.size - MAX_COMMENT)
        tail = self._bytes(tail_begin, total - tail_begin)
        at = tail.rfind(b"PK\5\6")
        while at >= 0 and (len(tail) < at + _END.size or at + _END.size + _END.unpack_from(tail, at)[-1] != len(tail)):
            at = tail.rfind(b"PK\5\6", 0, at)
        if at < 0:
            self._bad("The zip archive is cut short: its directory, at the end, is missing.", _AGAIN)
        short = _END.unpack_from(tail, at)[1:-1]
        end = tail_begin + at
        long, end = self._find_zip64(end) or (short, end)
        saturated = (*[_FULL16] * 4, *[_FULL32] * 2)
        if any(one not in (other, full) for one, other, full in zip(short, long, saturated, strict=True)):
            self._bad("The zip archive's directory has two ends, which differ.")
        disk, first_disk, here, count, length, begin = long
        if disk or first_disk or here != count:
            self._bad("The zip archive is one part of several.", "put the parts together first")
        return count, length, begin, end

    def _find_zip64(self, end: int) -> tuple[tuple[int, ...], int] | None:
        """The same fields of the long form, and where it lies; torch writes one even where it need not."""
        if end < _LOCATOR64.size + _END64.size:
            return None
        mark, _, at, _ = _LOCATOR64.unpack(self._bytes(end - _LOCATOR64.size, _LOCATOR64.size))
        if mark != b"PK\6\7":
            return None
        fits = at + _END64.size <= end - _LOCATOR64.size
        fields = _END64.unpack(self._bytes(at, _END64.size)) if fits else (b"",)
        if fields[0] != b"PK\6\6":
            self._bad("The zip archive lacks the long form of its directory's end.")
        return fields[4:], at

    def _entry(self, raw: bytes, at: int) -> tuple[Member, int]:
        """The entry of the directory that begins there, and where the next begins."""
        if at + _ENTRY.size > len(raw):
            self._bad("The zip archive's directory is shorter than its entries.")
        fields = _ENTRY.unpack_from(raw, at)
        mark, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed, nbytes, name_length, extra_length, comment_length = fields[8:13]
        header = fields[16]
        name_end = at + _ENTRY.size + name_length
        extra_end = name_end + extra_length
        if mark != b"PK\1\2" or extra_end + comment_length > len(raw):
            self._bad("The zip archive's directory is damaged.", _AGAIN)
        name = _decoded(raw[at + _ENTRY.size : name_end])
        if flags & _ENCRYPTED:
            self._bad(f'"{shown(name)}" in the zip archive is encrypted.', "unpack it with its password first")
        long = self._long_fields(raw[name_end:extra_end], [nbytes, packed, header])
        member = Member(name, method, crc, long[1], long[0], long[2])
        return member, extra_end + comment_length

    def _long_fields(self, extra: bytes, fields: list[int]) -> list[int]:
        """Sizes and offset, taken from the zip64 record where they are too large for their fields."""
        long: list[int] = []
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == _ZIP64:
                data = extra[at + 4 : at + 4 + length]
                long = [value for (value,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8])]
            at += 4 + length
        if fields.count(_FULL32) > len(long):
            self._bad("The zip archive's directory lacks the long form of a size.")
        taken = iter(long)
        return [next(taken) if value == _FULL32 else value for value in fields]

    def _bytes(self, at: int, length: int) -> bytes:
        data = bytearray(length)
        self._file.read_into(memoryview(data), at)
        return bytes(data)

    def _bad(self, message: str, hint: str = _DECEIVES) -> NoReturn:
        raise MalformedFile(message, file=self.path, hint=hint)


def _decoded(name: bytes) -> str:
    """A name as torch and all others write it; of others, at least one that is its own."""
    return name.decode("utf-8", "surrogateescape")


def _quoted(member: Member) -> str:
    return f'"{shown(member.name)}"'
