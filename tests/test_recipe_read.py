"""Files that are no recipe, and TOML's traps: what is said, and where."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe import read
from mergekit_sd.recipe.read import parse_text, read_document

CASES = {
    "backslash": ('a = 1\nfile = "D:\\sd"', 2, 11, "backslash", "'D:\\sd'"),
    "backslash_hex": ('file = "D:\\Users\\me"', 1, 11, "backslash", "'D:\\Users\\me'"),
    "backslash_surrogate": ('a = "\\ud800"', 1, 6, "backslash", "single quotes"),
    "backslash_multiline": ('a = """x\n\\q"""', 2, 1, "backslash", "single quotes"),
    "True": ("a = True", 1, 5, "no True", "write true"),
    "False": ("a = [False]", 1, 6, "no False", "write false"),
    "None": ("a = None", 1, 5, "no None", "leave the key out"),
    "null": ("a = null", 1, 5, "no null", "leave the key out"),
    "yaml": ("alpha: 0.5", 1, 6, "colon", "write alpha = 0.5"),
    "yaml_list": ("- a", 1, 3, "dashes", "[first, second]"),
    "bare_word": ("\nop = weighted_sum # x", 2, 6, "quotes", 'write "weighted_sum"'),
    "bare_path": ("file = D:\\sd\\x.ckpt", 1, 8, "quotes", "write 'D:\\sd\\x.ckpt'"),
    "bare_digits": ("file = 7-x.ckpt", 1, 9, "quotes", 'write "7-x.ckpt"'),
    "double_equals": ("a == 5", 1, 4, "one =", "key = value"),
    "no_value": ("a =", 1, 4, "missing", "key = value"),
    "no_equals": ("a 5", 1, 3, "not TOML", None),
    "leading_point": ("a = .5", 1, 5, "digit", "write 0.5"),
    "trailing_point": ("a = 1.", 1, 6, "digits", "write 1.0"),
    "comma": ("a = 0,5", 1, 6, "comma", "write 0.5"),
    "curly_quotes": ("a = “x”", 1, 5, "Typographic", "plain"),
    "json": ('{"a": 1}', 1, 1, "JSON", None),
    "glob_key": ('x = { "a" = 1, *.attn1 = 1 }', 1, 16, "quotes", 'write "*.attn1" ='),
    "odd_key": ("ü = 1", 1, 1, "quotes", 'write "ü" ='),
    "header": ("[a", 1, 3, "header", None),
    "header_rest": ("[a]]", 1, 4, "behind", None),
    "open_array": ("b = 1\na = [1 2]", 2, 8, "array", "comma"),
    "line_break": ("[s.mix]\nalpha = { a = 1,\n b = 2 }", 2, 17, "one line", "[s.mix.alpha]"),
    "line_break_end": ("alpha = { a = 1\n}", 1, 16, "one line", "[alpha]"),
    "open_string": ('a = "x\nb = 1', 1, 7, "not closed", "quote"),
    "control": ('a = "x\x01"', 1, 7, "control", None),
    "nonsense": ("a = \x7f", 1, 5, "no value", "quotes"),
}


@pytest.mark.parametrize("name", CASES)
def test_traps(name):
    text, line, column, says, hint = CASES[name]
    with pytest.raises(RecipeError) as caught:
        parse_text(text, "r.toml")
    error = caught.value
    assert (error.exit_code, error.file, error.line, error.column) == (2, "r.toml", line, column)
    assert says in error.message
    assert error.hint
    assert hint is None or hint in error.hint


KEYED = {
    "twice": ("[s]\na = 1\na = [\n2]\n", 3, 1, "s.a", "twice, first on line 2"),
    "table_twice": ("[a.b]\n[c]\n[a.b]", 3, 4, "a.b", "twice, first on line 1"),
    "inline_twice": ("x = { a = 1, a = 2 }", 1, 14, "x.a", "twice, first on line 1"),
    "closed_table": ("a = { x = 1 }\n[a.y]", 2, 4, "a.y", "given its value already"),
    "selector": ("[w]\nOUT05 = 0.5\nOUT05.attn2 = 1", 3, 7, "w.OUT05.attn2", "Without quotes"),
    "inline_selector": ("w = { OUT05 = 0.5, OUT05.attn2 = 1 }", 1, 26, "w.OUT05.attn2", "Without quotes"),
    "open_at_end": ("b = 1\na = '''x\n\n", 2, 1, "a", "not closed"),
    "open_array_at_end": ("b = 1\na = [\n\n", 2, 1, "a", "not closed"),
}


@pytest.mark.parametrize("name", KEYED)
def test_faults_that_name_a_key(name):
    text, line, column, key, says = KEYED[name]
    with pytest.raises(RecipeError, match=says) as caught:
        parse_text(text)
    assert (caught.value.line, caught.value.column, caught.value.key) == (line, column, key)
    assert caught.value.hint
    if "selector" in name:
        assert '"OUT05.attn2"' in caught.value.hint


@pytest.mark.parametrize("text", ["a = " + "[" * 50_000, "a = " + "{a=" * 50_000])
def test_deep_nesting(text):
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_text(text)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("part", ["a", '"a"', "'a'"])
def test_keys_of_very_many_parts(part):
    with pytest.raises(RecipeError, match="more than 64 parts") as caught:
        parse_text("x = 1\n" + ".".join([part] * 200_000) + " = 1")
    assert (caught.value.line, caught.value.column) == (2, 1)
    assert parse_text(".".join([part] * 60) + " = 1").data


@pytest.mark.timeout(10)
def test_long_words_and_strings_are_read_in_linear_time():
    assert parse_text("a = '" + "a" * 1_000_000 + "'\n" + "b" * 1_000_000 + " = 1").data
    with pytest.raises(RecipeError, match="digits"):
        parse_text("a = " + "9" * 100_000)


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    data, positions = read_document(path)
    assert data == {"a": 1, "b": 2}
    assert positions.at(("a",)) == (1, 1)
    assert positions.at(("b",)) == (2, 1)


def refused(path):
    with pytest.raises(RecipeError) as caught:
        read_document(path)
    assert caught.value.file == str(path)
    assert caught.value.exit_code == 2
    return caught.value


def test_files_that_are_no_recipe(tmp_path, monkeypatch):
    path = tmp_path / "r.toml"
    assert "no such recipe" in refused(path).message
    assert "folder" in refused(tmp_path).message
    path.write_bytes("é\na = ü\xff".encode("latin-1"))
    assert "not UTF-8" in refused(path).message
    path.write_bytes(b"# \xc3\xa9\n\xc3\xa9 = \xff")
    error = refused(path)
    assert (error.line, error.column, error.hint) == (2, 5, "save it as UTF-8")
    path.write_bytes("a = 1".encode("utf-16"))
    assert "UTF-16" in refused(path).message
    monkeypatch.setattr(read, "LARGEST_RECIPE", 100)
    path.write_bytes(b"#" * 100)
    assert read_document(path).data == {}
    path.write_bytes(b"#" * 101)
    assert "larger than 100 B" in refused(path).message
    assert "cannot be read" in refused(tmp_path / "r\0.toml").message


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifos_and_loops_of_links_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "regular" in refused(tmp_path / "fifo").message
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refused(tmp_path / "loop").message


@given(st.text("ab=.[]{}\"'\\,#:\n 1-_\té", max_size=25))
def test_any_text_is_read_or_refused_in_our_words(text):
    error = None
    try:
        parse_text(text)
    except RecipeError as refusal:
        error = refusal
    theirs = ("Unescaped", "Invalid", "Expected", "Cannot", "Illegal")
    assert error is None or (error.line and error.column and not error.message.startswith(theirs))
