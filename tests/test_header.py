"""The safetensors header: every refusal, and laws of writing and reading it."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.errors import MalformedFile, MergekitError, UsageError
from mergekit_sd.formats import header
from mergekit_sd.formats.dtypes import BF16, DTYPES, F16, F32, F64, I64
from mergekit_sd.formats.header import MAX_HEADER, build_header, parse_header

FILE = Path("model.safetensors")


def parse(text, data_size=0):
    raw = text if isinstance(text, bytes) else text.encode() if isinstance(text, str) else json.dumps(text).encode()
    return parse_header(raw, data_size, FILE)


def refuse(text, data_size=0):
    with pytest.raises(MalformedFile) as caught:
        parse(text, data_size)
    assert caught.value.file == str(FILE)
    assert caught.value.hint
    return caught.value


def entry(begin=0, end=4, shape=(2,), dtype="F16", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def test_a_good_header_loads_in_its_order_with_absolute_offsets():
    text = json.dumps({"b": entry(4, 8), "__metadata__": {"format": "pt"}, "a": entry(0, 4)}) + "   "
    tensors, metadata = parse(text, 8)
    assert list(tensors) == ["b", "a"]
    assert tensors["a"].offset == 8 + len(text)
    assert tensors["b"].offset == 8 + len(text) + 4
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes, tensors["a"].numel) == (F16, (2,), 4, 2)
    assert metadata == {"format": "pt"}


def test_zero_size_tensors_and_scalars():
    document = {
        "empty first": entry(0, 0, (0, 3)),
        "scalar": entry(0, 2, ()),
        "empty between": entry(2, 2, (3, 0)),
        "full": entry(2, 6),
        "empty last": entry(6, 6, (0,)),
    }
    tensors, _ = parse(document, 6)
    assert tensors["scalar"].shape == ()
    assert tensors["empty last"].nbytes == 0
    assert parse("{}", 0) == ({}, {})


# --- row 4, 5, 8: ranges --------------------------------------------------------------------------


def test_overlapping_ranges():
    error = refuse({"a": entry(0, 4), "b\n": entry(2, 6)}, 6)
    assert error.key == "b\n"
    assert "partly those of a." in error.message


def test_equal_ranges():
    error = refuse({"a\x1b": entry(0, 4), "b": entry(0, 4)}, 4)
    assert error.key == "b"
    assert "all those of a\\x1b." in error.message


def test_zero_size_tensor_inside_another():
    assert refuse({"a": entry(0, 4), "b": entry(2, 2, (0,))}, 4).key == "b"


@pytest.mark.parametrize(("first", "second"), [((3, 7), (7, 11)), ((0, 4), (7, 11))])
def test_holes(first, second):
    error = refuse({"a": entry(*first), "b": entry(*second)}, 11)
    assert error.key == ("a" if first[0] else "b")
    assert "lie 3 that no tensor owns" in error.message


def test_bytes_after_the_last_tensor():
    assert "follow 1,234 bytes (1.2 KiB)" in refuse({"a": entry(0, 4)}, 1238).message
    assert "follow 1 bytes" in refuse({}, 1).message


def test_truncated_data_tells_both_sizes():
    document = {"a": entry(0, 4), "b": entry(4, 8000, (3998,))}
    start = 8 + len(json.dumps(document))
    error = refuse(document, 7000)
    assert error.key == "b"
    assert f"{start + 8000:,} bytes" in error.message
    assert f"it has {start + 7000:,}" in error.message
    assert refuse({"a": entry(0, 4), "z": entry(400, 400, (0,))}, 4).key == "z"


# --- row 6: dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E8M0", "f16", "", None, 7, ["F16"], {"F16": 1}, "\x1b[31m"])
def test_unknown_dtype_names_the_known(dtype):
    error = refuse({"a": entry(dtype=dtype)}, 4)
    assert error.key == "a"
    assert all(name in error.hint for name in DTYPES)
    assert "\x1b" not in error.message


# --- row 7: duplicates ----------------------------------------------------------------------------

ENTRY = json.dumps(entry())


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (f'{{"a": {ENTRY}, "a": {ENTRY}}}', "a", "names this tensor twice"),
        (f'{{"x": {ENTRY}, "a": {ENTRY}, "\\u0061": {ENTRY}}}', "a", "names this tensor twice"),
        ('{"a": {"dtype": "F16", "dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}', "a", "'dtype' twice"),
        ('{"a": {"dtype": "F16", "shape": [2], "shape": [2], "data_offsets": [0, 4]}}', "a", "'shape' twice"),
        (
            '{"a": {"dtype": "F16", "shape": [2]}, '
            '"b": {"dtype": "F16", "shape": [2], "shape": [2], "data_offsets": [0, 4]}}',
            "a",
            "lacks data_offsets",
        ),
        ('{"__metadata__": {"k": "1", "k": "1"}}', None, "'k' twice"),
        ('{"__metadata__": {}, "__metadata__": {}}', None, "__metadata__ twice"),
    ],
)
def test_duplicates(text, key, words):
    error = refuse(text, 4)
    assert error.key == key
    assert words in error.message


# --- row 9: the outer form ------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b'{"\xff": 1}', b"\xff\xfe{\0", '{"ä": {}}'.encode("latin-1")])
def test_not_utf8(raw):
    assert "not UTF-8" in refuse(raw).message


@pytest.mark.parametrize("opening", ['{"a":[', '{"a":{"b":', '{"a":{"shape":[', '{"__metadata__":{"a":['])
def test_deep_brackets(opening):
    inner = opening[-1] if opening[-1] in "[{" else '{"b":'
    assert "nested too deeply" in refuse(opening + inner * 100_000).message


@pytest.mark.parametrize("text", ["", "[]", "null", " {}", "\ufeff{}", "1", '"a"', "[" * 100_000])
def test_does_not_begin_with_a_brace(text):
    assert "does not begin with {" in refuse(text).message


@pytest.mark.parametrize(
    "text", ["{", "{}x", "{}\0", "{'a': 1}", '{"a":}', '{"a\n": 1}', '{"a": 01}', '{"a": +1}', "{,}"]
)
def test_not_json(text):
    assert "not valid JSON" in refuse(text).message


@pytest.mark.parametrize("value", ["null", "[]", '"x"', "1", "true", "NaN"])
def test_metadata_that_is_no_object(value):
    assert "__metadata__ is not an object" in refuse(f'{{"__metadata__": {value}}}').message


@pytest.mark.parametrize("value", ["null", "[]", "{}", "1", "1.5", "true", "NaN", "-Infinity", "1" * 5000])
def test_metadata_value_that_is_no_string(value):
    error = refuse(f'{{"__metadata__": {{"good": "x", "b\\u001bad": {value}}}}}')
    assert "'b\\x1bad', not a string" in error.message


@pytest.mark.parametrize(
    "text",
    [f'{{"\\ud800": {ENTRY}}}', '{"__metadata__": {"a": "\\udfff"}}', '{"__metadata__": {"\\udc00": "a"}}'],
)
def test_half_a_surrogate_pair(text):
    error = refuse(text, 4)
    assert "not valid Unicode" in error.message
    error.message.encode()


def test_a_whole_surrogate_pair_is_a_character():
    assert list(parse(f'{{"\\ud83d\\ude00": {ENTRY}}}', 4)[0]) == ["\U0001f600"]


@pytest.mark.parametrize("value", ["null", "[]", '"x"', "1", "true", "NaN", "1" * 5000])
def test_entry_that_is_no_object(value):
    error = refuse(f'{{"a": {value}}}')
    assert error.key == "a"
    assert "is not an object" in error.message


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_entry_without_a_field(field):
    document = {"a": entry()}
    del document["a"][field]
    error = refuse(document, 4)
    assert error.key == "a"
    assert f"lacks {field}" in error.message


def test_entry_with_an_unknown_field():
    error = refuse({"a": entry(**{"strides\x1b": [1]})}, 4)
    assert error.key == "a"
    assert "has the unknown strides\\x1b." in error.message


# --- row 10: numbers ------------------------------------------------------------------------------

BAD_NUMBERS = ["-1", "NaN", "Infinity", "-Infinity", "2.0", "2e0", "true", "null", '"2"', "[2]", str(2**63), "1" * 5000,
               "-" + "1" * 5000]  # fmt: skip


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("place", ["shape", "begin", "end"])
def test_numbers_that_are_no_sizes(number, place):
    numbers = {"shape": "2", "begin": "0", "end": "4", place: number}
    error = refuse(
        '{{"a": {{"dtype": "F16", "shape": [{shape}], "data_offsets": [{begin}, {end}]}}}}'.format(**numbers), 4
    )
    assert error.key == "a"
    assert ("shape" if place == "shape" else "data_offsets") in error.message
    assert "whole numbers from 0 to below 2**63" in error.message
    assert len(error.message) < 200


def test_a_long_number_is_told_by_its_length():
    text = '{"a": {"dtype": "F16", "shape": [' + "7" * 5000 + '], "data_offsets": [0, 4]}}'
    assert "a number of 5,000 digits" in refuse(text, 4).message


@pytest.mark.parametrize("shape", [[2**62, 2], [2**32, 2**32], [2**62, 2**62, 0], [0, 2**62, 2**62], [2**62]])
def test_overflowing_shapes(shape):
    error = refuse({"a": entry(0, 0, shape)}, 0)
    assert error.key == "a"
    assert "larger than any file" in error.message


@pytest.mark.parametrize("value", [None, 2, "2", {}, {"0": 2}])
def test_shape_and_offsets_that_are_no_lists(value):
    assert refuse({"a": {**entry(), "shape": value}}, 4).key == "a"
    assert refuse({"a": {**entry(), "data_offsets": value}}, 4).key == "a"


@pytest.mark.parametrize("offsets", [[], [4], [0, 2, 4]])
def test_offsets_that_are_no_pair(offsets):
    assert "data_offsets" in refuse({"a": {**entry(), "data_offsets": offsets}}, 4).message


def test_too_many_dimensions():
    parse({"a": entry(0, 2, [1] * 64)}, 2)
    assert "65 dimensions; 64 is the most" in refuse({"a": entry(0, 2, [1] * 65)}, 2).message


@pytest.mark.parametrize(("begin", "end"), [(0, 3), (0, 5), (4, 0)])
def test_range_that_does_not_fit_the_shape(begin, end):
    error = refuse({"a": entry(begin, end)}, 4)
    assert error.key == "a"
    assert "[2] of F16 takes 4 bytes" in error.message
    assert f"has {end - begin}." in error.message


# --- row 11: names --------------------------------------------------------------------------------


def test_names_with_control_characters_and_markup_load():
    name = "a\x1b[31m\n[/x]"
    assert list(parse({name: entry()}, 4)[0]) == [name]
    error = refuse({name: entry(), "b": entry(2, 6)}, 6)
    assert "those of a\\x1b[31m\\n[/x]." in error.message


def test_a_full_sdxl_header_parses_quickly():
    entries = [(f"model.diffusion_model.input_blocks.{i}.weight", F16, (320, 320, 3, 3)) for i in range(2515)]
    built = build_header(entries, {"format": "pt"})
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        parse_header(built.raw[8:], built.size - len(built.raw), FILE)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1  # 10 ms where it was written; room for a busy machine


# --- writing --------------------------------------------------------------------------------------


def test_built_header_has_the_given_order_and_aligned_data():
    entries = [("h", F16, (3,)), ("d", F64, (1,)), ("u", DTYPES["U8"], (5,)), ("f", F32, (3,)), ("b", BF16, (1,))]
    built = build_header(entries, {"z": "1", "a": "2"})
    document = json.loads(built.raw[8:])
    assert list(document) == ["__metadata__", "h", "d", "u", "f", "b"]
    assert list(document["__metadata__"]) == ["a", "z"]
    assert sorted(built.tensors, key=lambda name: built.tensors[name].offset) == ["d", "f", "h", "b", "u"]
    assert all(info.offset % info.dtype.itemsize == 0 for info in built.tensors.values())
    assert len(built.raw) % 64 == 0
    assert built.size == len(built.raw) + 8 + 12 + 6 + 2 + 5
    assert build_header(entries, {"a": "2", "z": "1"}) == built


def test_metadata_of_the_same_length_gives_the_same_layout():
    entries = [("a", F16, (3,))]
    one, two = build_header(entries, {"hash": "0" * 32}), build_header(entries, {"hash": "f" * 32})
    assert len(one.raw) == len(two.raw)
    assert one.tensors == two.tensors
    assert one.raw != two.raw
    assert b"__metadata__" not in build_header(entries, {}).raw


@pytest.mark.parametrize(
    ("entries", "metadata", "words"),
    [
        ([("a\ud800", F16, (1,))], {}, "name is not valid Unicode"),
        ([], {"k": "\ud800"}, "'k' is not valid Unicode"),
        ([], {"\udc00": "v"}, "is not valid Unicode"),
        ([("a", F16, (1,)), ("a", F16, (2,))], {}, "occurs twice"),
        ([("__metadata__", F16, (1,))], {}, "the format's own"),
        ([("a", F16, (-1,))], {}, "cannot be written"),
        ([("a", F16, (2**62,))], {}, "cannot be written"),
        ([("a", F16, (2**61,)), ("b", F16, (2**61,))], {}, "cannot be written"),
        ([("a", F16, (1,) * 65)], {}, "cannot be written"),
    ],
)
def test_what_cannot_be_written(entries, metadata, words):
    with pytest.raises(UsageError) as caught:
        build_header(entries, metadata)
    assert words in caught.value.message
    caught.value.message.encode()


def test_a_header_above_the_limit_cannot_be_written(monkeypatch):
    assert MAX_HEADER == 100_000_000
    monkeypatch.setattr(header, "MAX_HEADER", 1000)
    build_header([], {"k": "x" * 900})
    with pytest.raises(UsageError) as caught:
        build_header([], {"k": "x" * 1000})
    assert "1,000 is the most" in caught.value.message
    assert "1,080 bytes" in caught.value.message


# --- laws -----------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ENTRIES = st.lists(
    st.tuples(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda entry: entry[0],
)


@given(ENTRIES, st.dictionaries(TEXT, TEXT, max_size=4))
def test_what_is_built_is_read(entries, metadata):
    built = build_header(entries, metadata)
    assert int.from_bytes(built.raw[:8], "little") == len(built.raw) - 8
    tensors, found = parse_header(built.raw[8:], built.size - len(built.raw), FILE)
    assert tensors == dict(built.tensors)
    assert list(tensors) == [name for name, _, _ in entries]
    assert found == metadata


VALID = build_header([("a.weight", F16, (2, 3)), ("b", I64, ()), ("c\n", F32, (0,))], {"format": "pt", "k": "v"})


@given(st.integers(8, len(VALID.raw) - 1), st.integers(0, 255))
def test_a_changed_byte_loads_or_is_refused(place, value):
    raw = bytearray(VALID.raw)
    raw[place] = value
    try:
        tensors, _ = parse_header(bytes(raw[8:]), VALID.size - len(raw), FILE)
    except MergekitError as error:
        error.message.encode()
    else:
        assert sum(info.nbytes for info in tensors.values()) == VALID.size - len(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
WILD = st.dictionaries(
    TEXT | st.just("__metadata__"),
    JSON | st.fixed_dictionaries({"dtype": JSON | st.just("F16"), "shape": JSON, "data_offsets": JSON}),
    max_size=3,
)


@given(WILD, st.integers(0, 20))
def test_any_json_loads_or_is_refused(document, data_size):
    try:
        tensors, _ = parse_header(json.dumps(document).encode(), data_size, FILE)
    except MergekitError as error:
        error.message.encode()
    else:
        assert set(tensors) == set(document) - {"__metadata__"}
