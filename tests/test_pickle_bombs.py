"""Pickles that would take all memory or time, and pickles that are none: bounded, and refused with a reason."""

import contextlib
import struct
import time
import tracemalloc
import zipfile

import pickle_files as made
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_files import ONE, call, dictionary, name, text
from witness import nothing_happens, refuse

from mergekit_sd.errors import ForbiddenCall, MalformedFile, MergekitError
from mergekit_sd.formats.open import open_model
from mergekit_sd.formats.pickles import machine, weights

# --- bombs ----------------------------------------------------------------------------------------

N = 100_000
STEPS = 5 * N  # instead of millions: measuring memory takes time
PAIRS = b"](" + b"NN\x86" * 3000 + b"eq\x00"
COLLIDING = b"".join(b"\x8a\x09" + ((2**61 - 1) * n).to_bytes(9, "little") + b"N" for n in range(1, 60))
LAUGHS = b"]q\x00(" + text("lol") + b"e" + b"".join(b"0](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(60))
BOMBS = {
    "long number": b"\x8b\xff\xff\xff\x7f",
    "number of many bytes": b"\x8b" + struct.pack("<I", 100_000) + bytes(100_000),
    "number of many digits": b"I" + b"9" * 100_000 + b"\n",
    "old number of many digits": b"L" + b"9" * 100_000 + b"L\n",
    "long bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    "long byte array": b"\x96\xff\xff\xff\xff\xff\xff\xff\xff",
    "long text": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    "long frame": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    "long old string": b"T\xff\xff\xff\x7f",
    "line without end": b"V" + b"x" * 3_000_000,
    "marks": b"(" * N,
    "nothing but marks to pop": b"(" * N + b"1" * (N + 1),
    "tuples in tuples": b")" + b"\x85" * N + b"R",
    "lists in lists": b"(" * N + b"l" * N + b"R",
    "dictionaries in dictionaries": b"(N" * N + b"N" + b"d" * N + b"R",
    "more steps than any model has": b"N0" * (STEPS // 2),
    "copies of a long list": PAIRS + (name("collections", "OrderedDict") + b"h\x00\x85R0") * 3000,
    "copies of a long text": text("x" * 1_000_000) + b"q\x00" + (name("_codecs", "encode") + b"h\x00\x85R0") * 1000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr(machine, "MAX_STEPS", STEPS)
    path = tmp_path / "model.ckpt"
    path.write_bytes(made.zipped(dictionary(a=ONE, b=BOMBS[bomb]), {"0": bytes(4)}))  # it would load but for the bomb
    begin = time.perf_counter()
    tracemalloc.start()
    try:
        refuse(path, MalformedFile if not BOMBS[bomb].endswith(b"R") else ForbiddenCall)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (64 << 20) + 20 * path.stat().st_size
    assert time.perf_counter() - begin < 30


HARMLESS = {
    "a billion laughs": LAUGHS,
    "tuples in tuples": b")" + b"\x85" * N,
    "lists in lists": b"]" + b"\x85" * N,
    "objects in objects": name("x", "Y") + b"q\x000" + b"h\x00" * N + b")" + b"\x81\x85" * N,
    "itself": b"]q\x00h\x00a",
    "each other": b"}q\x00" + text("x") + b"}q\x01" + text("y") + b"h\x00ss",
    "a key of tuples in tuples": b"})" + b"\x85" * 5 * N + b"Ns",
    "a state of tuples in tuples": name("x", "Y") + b")\x81)" + b"\x85" * N + b"b",
    "items of tuples in tuples": name("x", "Y") + b")\x81" + text("k") + b")" + b"\x85" * N + b"s",
    "the same many times": b"](" + b"N" + b"2" * 300_000 + b"e",
    "notes with great numbers": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - n - 1) for n in range(1000)),
    "numbers that collide": b"}(" + COLLIDING + b"u",
    "keys that are no text": b"}(K\x05N]N}NNNG\x7f\xf8\0\0\0\0\0\0Nu",
}


@pytest.mark.parametrize("bomb", HARMLESS)
@pytest.mark.parametrize("within", [True, False])
def test_structures_without_end_do_no_harm(tmp_path, bomb, within):
    """In the state dict, and where names are made of paths."""
    path = tmp_path / "model.ckpt"
    data = (
        dictionary(a=ONE, b=HARMLESS[bomb]) if within else dictionary(b=HARMLESS[bomb], a=b"}" + text("t") + ONE + b"s")
    )
    path.write_bytes(made.zipped(data, {"0": bytes(4)}))
    begin = time.perf_counter()
    with nothing_happens():
        model = open_model(path)
    assert set(model.tensors) == ({"a"} if within else {"a.t"})
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("length", [190, 10_000])
def test_names_that_grow_with_every_level(tmp_path, length, monkeypatch):
    """A tensor many times over, under names of names of names."""
    monkeypatch.setattr(weights, "MOST_PATHS", 5000)
    path = tmp_path / "model.ckpt"
    start = text("n" * length) + b"q\x000" + ONE + b"q\x010"
    data = start + b"}h\x00" * 5 + b"](" + b"h\x01" * 50_000 + b"e" + b"s" * 5
    path.write_bytes(made.zipped(dictionary(a=b"}" + text("t") + ONE + b"s", b=data), {"0": bytes(4)}))
    tracemalloc.start()
    model = open_model(path)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    assert "a.t" in model.tensors
    assert len(model.tensors) == (5000 if length < 200 else 1)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pickle_that_inflates_without_end(tmp_path, method):
    path = tmp_path / "model.ckpt"
    path.write_bytes(made.zipped(b"N" * (200 << 20), method=method))
    tracemalloc.start()
    assert "is the most" in refuse(path, MalformedFile).message
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_function_within_itself_without_end(tmp_path):
    path = tmp_path / "model.ckpt"
    of = name("torch._tensor", "_rebuild_from_type_v2") + b"q\x000"
    nested = b"(h\x00N" * N + made.text("x") + b"Nt" * N
    path.write_bytes(made.zipped(dictionary(a=ONE, b=of + b"h\x00" + nested + b"R")))
    assert "does not take" in refuse(path, MalformedFile).message
    itself = b"](h\x00Nh\x02Ne"  # a list within itself is no tuple of arguments
    path.write_bytes(made.zipped(dictionary(a=ONE, b=of + b"]q\x020" + b"h\x00(h\x00Nh\x02NtR" + itself)))
    assert "does not take" in refuse(path, MalformedFile).message


# --- garbage --------------------------------------------------------------------------------------

VALID = dictionary(
    a=ONE, b=call(name("collections", "OrderedDict"), b"]"), c=b"](K\x01K\x02e", d=name("x", "Y") + b")\x81}b"
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(place=st.integers(0, len(VALID) - 1), value=st.binary(max_size=3))
def test_changed_bytes_load_or_are_refused(tmp_path, place, value):
    path = tmp_path / "model.ckpt"
    for content in (
        made.zipped(VALID[:place] + value + VALID[place + 1 :], {"0": bytes(4)}),
        made.zipped(VALID[:place], {"0": bytes(4)}),
        made.legacy(made.MAGIC, made.PROTOCOL, made.SYSTEM, VALID[:place] + value + VALID[place + 1 :]),
    ):
        path.write_bytes(content)
        with contextlib.suppress(MergekitError):
            open_model(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.binary(max_size=60))
def test_garbage_is_refused(tmp_path, data):
    path = tmp_path / "model.ckpt"
    path.write_bytes(made.zipped(data))
    with pytest.raises(MergekitError):
        open_model(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cut short"),
        (b"N", "cut short"),
        (b".", "not there"),
        (b"(.", "not there"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\xffN.", "0xff"),
        (b"h\x00.", "never noted"),
        (b"q\x00.", "not there"),
        (b"t.", "mark"),
        (b"NNNs.", "no dictionary"),
        (b"}(Nu.", "without a value"),
        (b"NNa.", "no list"),
        (b"NNb.", "state"),
        (b"NN\x93.", "no text"),
        (b"NN\x81.", "no class"),
        (b"(o.", "no class"),
        (b"S'x.\n.", "without quotes"),
        (b"S'\\q'\n.", "cannot be read"),
        (b"Ix\n.", "cannot be read"),
        (b"X\x01\0\0\0\xff.", "cannot be read"),
        (b"NQ.", "otherwise than torch does"),
        (b"Pstorage\n.", "otherwise than torch does"),
        (b"\x97.", "outside of itself"),
        (name("torch", "Size") + b"NR.", "without a tuple"),
        (name("torch", "Size") + b"N\x85R.", "does not take"),
        (name("_codecs", "encode") + b"(X\x02\0\0\0\xc3\xbcX\x05\0\0\0asciitR.", "does not take"),
        (call(name("torch._utils", "_rebuild_tensor_v2"), b"N") + b".", "does not take"),
        (made.tensor(b"N", 0, (1,), (1,)) + b".", "does not take"),
        (made.tensor(made.storage("0", 1), 0, (-1,), (1,)) + b".", "does not take"),
        (made.tensor(made.storage("0", 1), -1, (1,), (1,)) + b".", "does not take"),
        (made.tensor(made.storage("0", 1), 0, (1,), (1, 1)) + b".", "does not take"),
        (made.tensor(made.storage("0", 1), 0, (1,) * 65, (1,) * 65) + b".", "does not take"),
        (made.storage("0", -1) + b".", "otherwise than torch does"),
        (made.storage("0", 1, "system", "os") + b".", "otherwise than torch does"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, data, words):
    path = tmp_path / "model.ckpt"
    path.write_bytes(made.zipped(data))
    assert words in refuse(path, MalformedFile).message
