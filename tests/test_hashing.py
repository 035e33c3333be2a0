"""The content hash names tensors, not containers; file hashes are those that other tools show."""

import hashlib
import random
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_sd.errors import InputChanged, MissingInput, MissingTensors
from mergekit_sd.formats import hashing
from mergekit_sd.formats.dtypes import BF16, F16, F32
from mergekit_sd.formats.hashing import (
    LEAF,
    auto_v1,
    content_hash,
    file_hashes,
    hash_file_tensors,
    leaf_count,
    leaf_digest,
    sha256_file,
)
from mergekit_sd.formats.header import build_header
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.reading import Positional

DATA = {
    "big": (F16, (LEAF + 3,), random.Random(1).randbytes(2 * LEAF + 6)),
    "exact": (F32, (LEAF // 4,), random.Random(2).randbytes(LEAF)),
    "small": (BF16, (2, 3), bytes(range(12))),
    "none": (F16, (0, 4), b""),
    "scalar": (F32, (), b"\0\0\x80?"),
}


def write(path, data, metadata=None):
    built = build_header([(name, dtype, shape) for name, (dtype, shape, _) in data.items()], metadata or {})
    content = bytearray(built.raw.ljust(built.size, b"\0"))
    for name, info in built.tensors.items():
        content[info.offset : info.offset + info.nbytes] = data[name][2]
    path.write_bytes(content)
    return open_model(path)


def by_the_book(data):
    """The docstring of `hashing`, once more, as plainly as can be."""
    book = b""
    for name in sorted(data):
        dtype, shape, content = data[name]
        leaves = [content[i : i + 4194304] for i in range(0, len(content), 4194304)]
        book += struct.pack("<Q", len(name.encode())) + name.encode()
        book += struct.pack("<Q", len(dtype.name)) + dtype.name.encode()
        book += struct.pack(f"<Q{len(shape)}Q", len(shape), *shape)
        book += struct.pack("<Q", len(leaves)) + b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves)
    return xxhash.xxh3_128_hexdigest(book)


def test_leaves():
    assert [leaf_count(n) for n in (0, 1, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF)] == [0, 1, 1, 1, 2, 3]
    assert leaf_digest(b"abc") == leaf_digest(memoryview(bytearray(b"abc"))) == xxhash.xxh3_128_digest(b"abc")


def test_the_hash_is_what_the_book_says(tmp_path):
    assert hash_file_tensors(write(tmp_path / "a", DATA)) == by_the_book(DATA)


def test_the_hash_never_changes():
    """A value of record: pins and locks hold such hashes, so another one here is a new format."""
    entries = [("b", "F16", (2,), [leaf_digest(b"1234")]), ("ä", "I64", (), []), ("a", "F32", (0, 3), [])]
    assert content_hash(entries) == "765acbff344b5ea70936763a4becaf57"
    assert content_hash([]) == "99aa06d3014798d86001c324468d497f"  # xxh3-128 of nothing


def test_order_metadata_and_threads_do_not_matter(tmp_path):
    expected = hash_file_tensors(write(tmp_path / "a", DATA))
    backwards = dict(reversed(DATA.items()))
    for threads in (1, 2, 5):
        model = write(tmp_path / "b", backwards, {"title": "x" * threads})
        assert hash_file_tensors(model, threads=threads) == expected


def test_the_official_library_writes_the_same_tensors(tmp_path):
    import torch

    tensors = {"x": torch.randn(5, 7), "y": torch.randn(3).half()}
    save_file(tensors, tmp_path / "a")
    data = {"x": (F32, (5, 7), tensors["x"].numpy().tobytes()), "y": (F16, (3,), tensors["y"].numpy().tobytes())}
    assert hash_file_tensors(open_model(tmp_path / "a")) == hash_file_tensors(write(tmp_path / "b", data))


@pytest.mark.parametrize("name", ["big", "exact", "small", "scalar"])
@pytest.mark.parametrize("place", [0, -1])
def test_any_byte_matters(tmp_path, name, place):
    dtype, shape, content = DATA[name]
    changed = bytearray(content)
    changed[place] ^= 1
    model = write(tmp_path / "a", {**DATA, name: (dtype, shape, bytes(changed))})
    assert hash_file_tensors(model) == by_the_book({**DATA, name: (dtype, shape, bytes(changed))}) != by_the_book(DATA)


def test_name_dtype_and_shape_matter(tmp_path):
    content = bytes(range(12))
    variants = [
        {"a": (F16, (6,), content)},
        {"b": (F16, (6,), content)},
        {"a": (BF16, (6,), content)},
        {"a": (F16, (2, 3), content)},
        {"a": (F16, (3, 2), content)},
        {"a": (F16, (6, 1), content)},
        {"a": (F16, (3,), content[:6]), "b": (F16, (3,), content[6:])},
        {"a": (F16, (6,), content), "b": (F16, (0,), b"")},
        {"a": (F16, (6,), content), "b": (F16, (0, 1), b"")},
        {"a": (F16, (6,), content), "b": (BF16, (0,), b"")},
    ]
    hashes = [hash_file_tensors(write(tmp_path / "m", variant)) for variant in variants]
    assert len(set(hashes)) == len(variants)


ENTRIES = st.lists(
    st.tuples(
        st.text(max_size=3),
        st.sampled_from(["F16", "F32"]),
        st.lists(st.integers(0, 3), max_size=2).map(tuple),
        st.lists(st.binary(min_size=16, max_size=16), max_size=2).map(tuple),
    ),
    max_size=3,
    unique_by=lambda entry: entry[0],
)


@given(ENTRIES, ENTRIES, st.randoms())
def test_equal_hashes_mean_equal_entries(one, two, order):
    assert (content_hash(one) == content_hash(two)) == (sorted(one) == sorted(two))
    shuffled = list(one)
    order.shuffle(shuffled)
    assert content_hash(shuffled) == content_hash(one)


def test_some_tensors_only(tmp_path):
    model = write(tmp_path / "a", DATA)
    assert hash_file_tensors(model, ["scalar", "big", "big"]) == by_the_book({n: DATA[n] for n in ("big", "scalar")})
    with pytest.raises(MissingTensors) as caught:
        hash_file_tensors(model, ["scalr"])
    assert (caught.value.key, caught.value.hint) == ("scalr", 'did you mean "scalar"?')


def test_progress_adds_up_and_can_cancel(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "BATCH", 1000)
    model = write(tmp_path / "a", DATA)
    seen = []
    hash_file_tensors(model, on_bytes=seen.append)
    assert len(seen) > 2
    assert sum(seen) == sum(info.nbytes for info in model.tensors.values())

    def cancel(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_file_tensors(model, on_bytes=cancel)


def test_a_file_that_changes_is_refused(tmp_path):
    path = tmp_path / "a"
    model = write(path, DATA)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputChanged):
        hash_file_tensors(model)
    model = write(path, DATA)
    with pytest.raises(InputChanged):
        hash_file_tensors(model, on_bytes=lambda _: path.write_bytes(b"x"))


def test_without_preadv(tmp_path, monkeypatch):
    monkeypatch.delattr("os.preadv", raising=False)
    assert not hasattr(Positional, "preadv")
    assert hash_file_tensors(write(tmp_path / "a", DATA), threads=4) == by_the_book(DATA)


# --- file hashes ----------------------------------------------------------------------------------


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("piece", [64, 100, 1 << 20, 4 << 20])
def test_file_hashes_of_safetensors(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(hashing, "PIECE", piece)
    data = {"a": (F16, (500,), bytes(1000))} if piece < 1000 else DATA
    model = write(tmp_path / "m", data, {"title": "x" * 200})
    content = model.path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    seen = []
    hashes = file_hashes(model.path, seen.append)
    assert sum(seen) == len(content)
    assert hashes.sha256 == sha256_file(model.path) == sha(content)
    assert hashes.sha256_data == sha(content[start:])
    assert hashes.auto_v1 == auto_v1(model.path) == sha(content[0x100000:0x110000])[:8]
    assert hashes.auto_v2 == sha(content)[:10]
    assert hashes.auto_v3 == sha(content[start:])[:12]


@pytest.mark.parametrize("length", [0, 1, 0xFFFFF, 0x100000, 0x100001, 0x10FFFF, 0x110000, 0x110001])
def test_file_hashes_of_other_files(tmp_path, length):
    content = random.Random(length).randbytes(length)
    (tmp_path / "m.ckpt").write_bytes(content)
    hashes = file_hashes(tmp_path / "m.ckpt")
    assert (hashes.sha256_data, hashes.auto_v3) == (None, None)
    assert hashes.auto_v1 == sha(content[0x100000:0x110000])[:8]
    assert hashes.sha256 == sha(content)


def test_metadata_changes_auto_v2_but_not_auto_v3(tmp_path):
    one = file_hashes(write(tmp_path / "a", DATA, {"title": "one"}).path)
    two = file_hashes(write(tmp_path / "b", DATA, {"title": "two, longer" * 20}).path)
    assert one.auto_v2 != two.auto_v2
    assert one.auto_v3 == two.auto_v3


def test_a_header_longer_than_the_file_has_no_data_hash(tmp_path):
    (tmp_path / "m").write_bytes((1000).to_bytes(8, "little") + b"{}")
    assert file_hashes(tmp_path / "m").sha256_data is None


def test_file_hashes_refuse_as_opening_does(tmp_path):
    for each in (file_hashes, sha256_file, auto_v1):
        with pytest.raises(MissingInput):
            each(tmp_path / "no")
    (tmp_path / "m").write_bytes(bytes(1000))
    for each in (file_hashes, sha256_file):
        with pytest.raises(InputChanged):
            each(tmp_path / "m", lambda _: (tmp_path / "m").write_bytes(b"x"))
