"""Every key that tomllib finds has a place, and that key's text stands there."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.recipe.positions import Positions, Where, dotted, scan


def paths_of(value, path=()):
    if isinstance(value, dict):
        for key, each in value.items():
            yield (*path, key)
            yield from paths_of(each, (*path, key))
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield (*path, index)
            yield from paths_of(each, (*path, index))


def offset_of(text, place):
    lines = text.split("\n")
    return sum(len(line) + 1 for line in lines[: place[0] - 1]) + place[1] - 1


def check(text):
    data = tomllib.loads(text)
    positions = scan(text)
    for path in paths_of(data):
        if path[-1] == "" or not isinstance(path[-1], str):
            assert path in positions.offsets
            continue
        rest = text[offset_of(text, positions.at(path)) :]
        spellings = (path[-1], f"'{path[-1]}'", json.dumps(path[-1]), json.dumps(path[-1], ensure_ascii=False))
        assert rest.startswith(spellings), (path, rest[:20])
    assert {path for path in positions.offsets if path} == set(paths_of(data))


ALL_KINDS = '''\
# a comment = 1
top = 1
"quoted key" = 'x # no comment'
'lit.eral' . b = 2 # comment with "quotes
[a.b]  # [not.a.table]
c = [ 1, [2, 3], # a comment with ]
  { d = "}", e = ["]"] },
]
text = """ one "" two
[x] = 3 \\""" \\\\ """""
lit = \'\'\'
[y]
''z' = 4\'\'\'\'\'
[[samples]]
of = []
[samples.sub]
x = 2026-01-31 10:00:00
[[samples]]
of = ["a", 'b',]
[[samples.deep]]
"\\u0061\\tb" = { i.j = 1, k = {} }
[[samples.deep]]
k = inf
[ spaced . "out" ]
v=+1.5e-3
'''


def test_every_kind_of_string_table_and_array():
    text = ALL_KINDS
    data = tomllib.loads(text)
    positions = scan(text)
    assert {path for path in positions.offsets if path} == set(paths_of(data))
    assert positions.at(("a", "b", "c", 2, "e", 0)) == (7, 19)
    assert positions.at(("samples", 1, "deep", 0, "a\tb", "i", "j")) == (21, 19)
    assert positions.at(("samples", 0)) == (14, 3)
    assert positions.at(("samples", 1)) == (18, 3)
    assert positions.at(("samples", 1, "deep", 1, "k")) == (23, 1)
    assert positions.at(("spaced", "out", "v")) == (25, 1)


def test_the_nearest_parent_stands_in():
    positions = scan("\n[a]\nb = { c = 1 }\n")
    assert positions.at(("a", "b", "zz", 3)) == (3, 1)
    assert positions.at(("nothing",)) == (1, 1)
    assert Positions().at(("a",)) is None
    assert positions.replacing([("a", "b")]).at(("a", "b", "c")) is None
    assert positions.replacing([("a", "b")]).at(("a",)) == (2, 2)


def test_crlf_counts_as_one_line():
    assert scan("a = 1\r\n\r\n b = 2\r\n".replace("\r\n", "\n")).at(("b",)) == (3, 2)


def test_a_place_makes_an_error():
    error = Where("r.toml", ("steps",), scan("[steps]\nmix = 1")).at("mix").error("No.", hint="yes", details=["d"])
    assert (error.file, error.key, error.line, error.column) == ("r.toml", "steps.mix", 2, 1)
    assert (error.hint, error.details, error.exit_code) == ("yes", ("d",), 2)
    assert dotted(("a", "OUT05.attn2", 0, "x\x1b")) == 'a."OUT05.attn2".0."x\\x1b"'


# --- generated documents ---------------------------------------------------------------------------

names = st.one_of(
    st.text("abAB09_-", min_size=1, max_size=4), st.text("a. #=\"[]{}'\\é𝄞\t", max_size=4), st.just("OUT05.attn2")
)
strings = st.text("ab \"'\\#[]{}=,\n", max_size=8)
leaves = st.one_of(st.integers(-5, 5), st.floats(allow_nan=False), st.booleans(), strings)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
documents = st.dictionaries(names, values, max_size=5)


def basic(text):
    return json.dumps(text, ensure_ascii=False)


def write_key(draw, key):
    spellings = [basic(key)]
    if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key):
        spellings.append(key)
    if "'" not in key and "\t" not in key:
        spellings.append(f"'{key}'")
    return draw(st.sampled_from(spellings))


def blank(draw):
    return draw(st.sampled_from(["", " ", "\t "]))


def loose(draw):
    return draw(st.sampled_from(["", " ", "\n", ' # ], } = "\n  ']))


def write_string(draw, value):
    spellings = [basic(value), '"""\n' + basic(value)[1:-1].replace("\\n", "\n") + '"""']
    if "'" not in value:
        spellings.append(f"'''\n{value}'''")
        if "\n" not in value:
            spellings.append(f"'{value}'")
    return draw(st.sampled_from(spellings))


def write_value(draw, value):
    if isinstance(value, str):
        return write_string(draw, value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        items = [loose(draw) + write_value(draw, each) + loose(draw) for each in value]
        return "[" + ",".join(items) + ("," if items and draw(st.booleans()) else "") + loose(draw) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(write_pair(draw, key, each) for key, each in value.items()) + "}"
    return repr(value)


def write_pair(draw, key, value):
    written = blank(draw) + write_key(draw, key) + blank(draw)
    while isinstance(value, dict) and len(value) == 1 and draw(st.booleans()):
        ((key, value),) = value.items()
        written += "." + blank(draw) + write_key(draw, key) + blank(draw)
    return written + "=" + blank(draw) + write_value(draw, value) + blank(draw)


def write_table(draw, table, header):
    later = []
    text = ""
    for key, value in table.items():
        tables = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
        if (isinstance(value, dict) or tables) and draw(st.booleans()):
            later.append((key, value))
        else:
            text += write_pair(draw, key, value) + draw(st.sampled_from(["\n", " # c = 1\n", "\n\n"]))
    for key, value in later:
        inner = [*header, key]
        for each in value if isinstance(value, list) else [value]:
            marks = ("[[", "]]") if isinstance(value, list) else ("[", "]")
            dots = (blank(draw) + "." + blank(draw)).join(write_key(draw, part) for part in inner)
            text += f"{marks[0]}{blank(draw)}{dots}{blank(draw)}{marks[1]}\n" + write_table(draw, each, inner)
    return text


@given(st.data())
def test_generated_documents(data):
    document = data.draw(documents)
    text = write_table(data.draw, document, [])
    assert tomllib.loads(text) == document
    positions = scan(text)
    assert {path for path in positions.offsets if path} == set(paths_of(document))
    for path in paths_of(document):
        line, column = positions.at(path)
        rest = text[offset_of(text, (line, column)) :]
        if isinstance(path[-1], str):
            assert rest.startswith((basic(path[-1]), f"'{path[-1]}'", path[-1] or '"')), (path, rest)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a=1", "[a]", "a = {}", "a = []"])
def test_small_documents(text):
    check(text)
