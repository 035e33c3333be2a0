"""The probes' file: what it may hold, and where a fault stands."""

from __future__ import annotations

import pytest

from mergekit_sd.errors import RecipeError
from mergekit_sd.sampling.checks import load_probes

SET = """\
[mine]
timesteps = [500]
seeds = [3, 3]
traced = "a cat"
neutral = ["a photo"]
pairs = [["cat", "dog"]]

[mine.concepts]
cat = "a cat"
dog = "a dog"
"""


@pytest.mark.parametrize("name", ["general", "shapes"])
def test_the_packages_sets_load(name):
    probes = load_probes(name=name)
    assert probes.name == name
    assert probes.prompts[0] == ""
    assert len(probes.prompts) == len(set(probes.prompts)) == len(probes.concepts) + len(probes.neutral)
    assert all(word in probes.concepts for pair in probes.pairs for word in pair)


def test_general_is_the_default_and_few_calls():
    probes = load_probes()
    assert probes == load_probes(name="general")
    assert len(probes.prompts) * len(probes.timesteps) * len(probes.seeds) <= 60


def test_an_own_file_of_one_set_needs_no_name(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(SET)
    probes = load_probes(path)
    assert (probes.name, probes.seeds, probes.neutral) == ("mine", (3,), ("", "a photo"))
    assert probes.prompts == ("", "a photo", "a cat", "a dog")


@pytest.mark.parametrize(
    ("old", "new", "key", "line", "words"),
    [
        ("timesteps = [500]", "timesteps = [500, 1000]", "mine.timesteps.1", 2, "must be at most 999"),
        ("timesteps = [500]", "timesteps = []", "mine.timesteps", 2, "takes at least 1"),
        ("timesteps = [500]", "timesteps = 500", "mine.timesteps", 2, "takes a list in brackets, not the number 500"),
        ("seeds = [3, 3]", 'seeds = ["three"]', "mine.seeds.0", 3, "takes a whole number"),
        ('traced = "a cat"', "", "mine", 1, 'needs the key "traced"'),
        ('traced = "a cat"', "traced = 4", "mine.traced", 4, "takes text in quotes"),
        ("neutral", "neutrals", "mine.neutrals", 5, "is no key of a set of probes"),
        ('"dog"]]', '"dgo"]]', "mine.pairs.0", 6, '"dgo" is no concept'),
        ('["cat", "dog"]', '["cat"]', "mine.pairs.0", 6, "takes at least 2"),
        ('dog = "a dog"', "dog = true", "mine.concepts.dog", 10, "takes text in quotes, not true"),
        ('dog = "a dog"', '"" = "a dog"', 'mine.concepts.""', 10, "name is empty"),
    ],
)
def test_a_fault_is_told_with_its_key_and_line(tmp_path, old, new, key, line, words):
    path = tmp_path / "own.toml"
    path.write_text(SET.replace(old, new))
    with pytest.raises(RecipeError, match=words) as caught:
        load_probes(path)
    assert (caught.value.file, caught.value.key, caught.value.line) == (str(path), key, line)


def test_a_set_that_is_no_table(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("mine = 1\n")
    with pytest.raises(RecipeError, match="takes a table") as caught:
        load_probes(path)
    assert (caught.value.key, caught.value.line) == ("mine", 1)


def test_an_unknown_set_is_refused_with_a_guess(tmp_path):
    with pytest.raises(RecipeError, match='no set of probes "shape"') as caught:
        load_probes(name="shape")
    assert caught.value.hint == 'did you mean "shapes"?'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "holds no probes"),
        (b"#" * (1 << 20) + b"\n", "larger than 1 MiB"),
        (b"[mine\n", "."),
    ],
)
def test_what_is_no_probes_file_is_refused(tmp_path, content, words):
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_probes(path)
    assert caught.value.file == str(path)
