"""What a pass notes while bytes go by: leaf hashes, NaN and Inf, overflow. Shared by all threads."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

import xxhash

from mergekit_sd.errors import DtypeOverflow, NonFiniteResult
from mergekit_sd.formats.hashing import LEAF, content_hash
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.text import count, shown


class LeafHasher:
    """Hashes a tensor's bytes as they come, from the start of a leaf on."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self._hash = xxhash.xxh3_128()
        self._room = LEAF

    def update(self, data: memoryview) -> None:
        """Take the next bytes; they never straddle a leaf's end."""
        self._hash.update(data)
        self._room -= len(data)
        if self._room == 0:
            self.finish()

    def finish(self) -> None:
        """Close the leaf that is begun, if any."""
        if self._room < LEAF:
            self.digests.append(self._hash.digest())
            self._hash = xxhash.xxh3_128()
            self._room = LEAF


@dataclass
class Finding:
    """How many elements of a tensor are out of order, and the largest magnitude among them."""

    elements: int = 0
    largest: float = 0.0


class Ledger:
    """The notes of one output's pass."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leaves: dict[tuple[int | None, str], dict[int, list[bytes]]] = defaultdict(dict)
        self.nonfinite: dict[str, Finding] = defaultdict(Finding)
        self.overflow: dict[str, Finding] = defaultdict(Finding)
        self.clamped: dict[str, Finding] = defaultdict(Finding)
        self.done = 0

    def advance(self, nbytes: int) -> None:
        """So many more bytes of the output are done."""
        with self._lock:
            self.done += nbytes

    def keep_leaves(self, source: int | None, tensor: str, start: int, digests: list[bytes]) -> None:
        """Leaf hashes of a tensor of input number `source` (None: of the output) from byte `start` on."""
        with self._lock:
            self._leaves[source, tensor][start] = digests

    def note(self, findings: dict[str, Finding], tensor: str, elements: int, largest: float) -> None:
        """Add to what was found of a tensor."""
        if elements:
            with self._lock:
                finding = findings[tensor]
                finding.elements += elements
                finding.largest = max(finding.largest, largest)

    def content_hash(self, source: int | None, tensors: dict[str, TensorInfo]) -> str:
        """The content hash of the tensors of an input, or of the output, from the leaves that passed."""
        entries = []
        for name, tensor in tensors.items():
            parts = self._leaves.get((source, name), {})
            digests = [digest for start in sorted(parts) for digest in parts[start]]
            entries.append((name, tensor.dtype.name, tensor.shape, digests))
        return content_hash(entries)

    def check(self, output: str, allow_nonfinite: bool) -> None:
        """Raises NonFiniteResult or DtypeOverflow, listing every tensor."""
        if self.nonfinite and not allow_nonfinite:
            raise NonFiniteResult(
                f'NaN or Inf in {count(len(self.nonfinite), "tensor")} of "{output}"; nothing was written.',
                hint="look at the parents (inspect --scan), or give --allow-nonfinite to write it all the same",
                details=[f"{shown(n)}: {count(f.elements, 'element')}" for n, f in sorted(self.nonfinite.items())],
            )
        if self.overflow:
            raise DtypeOverflow(
                f'{count(len(self.overflow), "tensor")} of "{output}" hold values that the output\'s dtype cannot; '
                "nothing was written.",
                hint='write another dtype (bf16, fp32), or say overflow = "clamp" in the output',
                details=[
                    f"{shown(name)}: {count(f.elements, 'element')}, largest {f.largest:.6g}"
                    for name, f in sorted(self.overflow.items())
                ],
            )
