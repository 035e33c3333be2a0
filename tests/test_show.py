"""How the command line says what goes wrong: escaped, and wrapped where someone reads it."""

from __future__ import annotations

import sys

from mergekit_sd.cli.show import error_lines, print_warning
from mergekit_sd.errors import MissingTensors


def test_details_of_an_error_are_escaped():
    told = "\n".join(error_lines(MissingTensors("m", details=["a\x1b[31m", *map(str, range(30))])))
    assert "   -  a\\x1b[31m" in told
    assert "… and 11 more" in told


def test_a_terminal_gets_wrapped_words_a_pipe_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    words = "one two three four five six seven eight nine ten eleven"
    print_warning(words)
    assert capsys.readouterr().err == f"warning: {words}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    print_warning(words)
    assert capsys.readouterr().err == ("warning: one two three four five six\n         seven eight nine ten eleven\n")
