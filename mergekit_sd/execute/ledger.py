"""What a pass notes while bytes go by: leaf hashes, NaN and Inf, overflow. Shared by all threads."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
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


class Leaves:
    """The leaf hashes of tensors, by a source's number and the tensor's name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[tuple[int, str], dict[int, bytes]] = defaultdict(dict)

    def keep(self, source: int, tensor: str, start: int, digests: list[bytes]) -> None:
        """The leaves of a tensor from byte `start` on, which begins a leaf; from any thread."""
        with self._lock:
            self._found[source, tensor].update(enumerate(digests, start // LEAF))

    def content_hash(self, source: int, tensors: Mapping[str, TensorInfo]) -> str:
        """The content hash of some tensors of one source, all of whose leaves have been kept."""
        entries = []
        for name, tensor in tensors.items():
            leaves = self._found.get((source, name), {})
            entries.append((name, tensor.dtype.name, tensor.shape, [leaves[index] for index in sorted(leaves)]))
        return content_hash(entries)


class Ledger:
    """The notes of one output's pass. `read`: the leaves of inputs, by number; `made`: the output's, as source 0."""

    def __init__(self, read: Leaves) -> None:
        self._lock = threading.Lock()
        self.read = read
        self.made = Leaves()
        self.nonfinite: dict[str, Finding] = defaultdict(Finding)
        self.overflow: dict[str, Finding] = defaultdict(Finding)
        self.clamped: dict[str, Finding] = defaultdict(Finding)
        self.done = 0

    def advance(self, nbytes: int) -> None:
        """So many more bytes of the output are done."""
        with self._lock:
            self.done += nbytes

    def note(self, findings: dict[str, Finding], tensor: str, elements: int, largest: float) -> None:
        """Add to what was found of a tensor."""
        if elements:
            with self._lock:
                finding = findings[tensor]
                finding.elements += elements
                finding.largest = max(finding.largest, largest)

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
