"""Where a model comes from: records of all tools as one tree, hostile ones cut, and the library's files in it."""

from __future__ import annotations

import itertools
import json
import time

import models
import pytest
import story
import torch
from hypothesis import given
from hypothesis import strategies as st

import mergekit_sd as mk
from mergekit_sd.library.lineage import ABOVE, CUT, DAMAGED, DEEPEST, LOOP, MOST, named_parents, read_lineage

SHA = {letter: letter * 64 for letter in "abcdef"}
WEIGHTED = {"type": "webui", "interp_method": "Weighted sum", "multiplier": 0.3}


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


def brief(node):
    """A tree in short: name, how it was made, parents; only what there is."""
    short = [node.name, node.made, [brief(parent) for parent in node.parents]]
    return short if node.parents else [part for part in short if part]


def ours(models_, steps, output):
    data = {"recipe": 1, "models": models_, "steps": steps, "outputs": {"out": output}}
    return {"mergekit_sd.recipe": json.dumps(data)}


def a1111(record, known=None):
    return {"sd_merge_recipe": json.dumps(record), "sd_merge_models": json.dumps(known or {})}


def merged(*letters, **more):
    places = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
    said = dict(zip(places, (SHA.get(letter, letter) for letter in letters), strict=False))
    return WEIGHTED | dict.fromkeys(places) | said | more


def entry(name, record=None):
    return {"name": name, "legacy_hash": "12345678", "sd_merge_recipe": record}


def everything(node):
    yield node
    for parent in node.parents:
        yield from everything(parent)


def notes(node):
    return [each.note for each in everything(node) if each.note]


# --- our recipes ---------------------------------------------------------------------------------------

MODELS = {name: {"file": f"{name}.safetensors", "content": name * 32} for name in "abc"}


def test_our_recipe_is_a_tree_of_steps():
    steps = {
        "mix": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3},
        "dream": {"op": "add_difference", "a": "mix", "b": "c", "c": "a", "alpha": 0.7},
    }
    root = read_lineage(ours(MODELS, steps, {"model": "dream", "vae": "b"}), "dream.safetensors")
    mix = ["mix", "weighted_sum of 2, alpha 0.3", [["a.safetensors"], ["b.safetensors"]]]
    parents = [mix, ["c.safetensors"], ["a.safetensors"], ["b.safetensors"]]
    assert brief(root) == ["dream.safetensors", "add_difference ×0.7", parents]
    assert [parent.role for parent in root.parents] == ["a", "b", "c", "vae"]
    assert [parent.step for parent in root.parents] == [True, False, False, False]
    assert root.parents[1].hashes == {"content": "c" * 32}
    assert [each.name for each in root.models()] == [f"{name}.safetensors" for name in "abcab"]


@pytest.mark.parametrize(
    ("step", "made"),
    [
        ({"op": "weighted_sum", "a": "a", "b": "b", "alpha": "GRAD_V"}, "weighted_sum of 2, alpha by block (GRAD_V)"),
        ({"op": "weighted_sum", "a": "a", "b": "b", "alpha": "0,0.1"}, "weighted_sum of 2, alpha by block"),
        ({"op": "weighted_sum", "a": "a", "b": "b", "alpha": {"base": 1}}, "weighted_sum of 2, alpha by block"),
        (
            {"op": "weighted_sum", "a": "a", "b": "b", "alpha": {"preset": "COSINE"}},
            "weighted_sum of 2, alpha by block (COSINE)",
        ),
        (
            {"op": "add_difference", "a": "a", "b": "b", "c": "c", "alpha": [1, 2]},
            "add_difference of 3, alpha by block",
        ),
        ({"op": "ties", "base": "a", "models": ["b", "c"], "density": 0.5}, "ties of 3, density 0.5"),
        ({"op": "formula", "expr": "a + 0.5*(b - 'c')"}, "formula a + 0.5*(b - 'c')"),
        ({"op": "inject_lora", "model": "a", "loras": [{"lora": "b"}, "<lora:c:0.5>"]}, "inject_lora of 3"),
        ({"op": "x", "a": "a", "b": "b", "p": 1, "q": 2, "r": 3, "s": 4}, "x of 2, p 1, q 2, r 3"),
        ({"op": "x", "a": "a", "b": "b", "p": 10**400, "q": True}, "x of 2, p too large a number"),
        ({"a": "a", "b": "b", "p": 1e999}, "an operation of 2, p inf"),
    ],
)
def test_an_operation_in_a_few_words(step, made):
    root = read_lineage(ours(MODELS, {"s": step}, {"model": "s"}), "x")
    assert root.made == made
    wanted = {each for each in "abc" if f'"{each}"' in json.dumps(list(step.values())) or each in step.get("expr", "")}
    assert {parent.name[0] for parent in root.parents} >= wanted - {"c"}


def test_a_model_without_steps_is_a_copy():
    root = read_lineage(ours(MODELS, {}, {"model": "a"}), "x")
    assert brief(root) == ["x", "a copy", [["a.safetensors"]]]


def test_what_the_webui_record_knows_of_our_parents_is_taken(tmp_path_factory, tmp_path):
    story.room(tmp_path_factory, tmp_path)
    mk.run(tmp_path / "r.toml", metadata="webui")
    metadata = models.metadata(tmp_path / "out.safetensors")
    root = read_lineage(metadata, "out.safetensors")
    assert brief(root) == [
        "out.safetensors",
        "weighted_sum of 2, alpha 0.3",
        [["base.safetensors"], ["anime.safetensors"]],
    ]
    known = mk.identify(tmp_path / "base.safetensors").file
    assert root.parents[0].hashes["sha256"] == known.sha256
    assert root.parents[0].hashes["autov1"] == known.auto_v1
    assert set(root.parents[0].hashes) == {"content", "sha256", "autov1"}
    del metadata["mergekit_sd.recipe"]
    assert brief(read_lineage(metadata, "out.safetensors")) == brief(root)


# --- other tools' records ------------------------------------------------------------------------------


def test_records_nest():
    known = {
        SHA["a"]: entry("sub\\mix.safetensors", merged("c", "d", "e", interp_method="Add difference", multiplier=1)),
        SHA["b"].upper(): entry("b.ckpt"),
        SHA["c"]: entry("c.ckpt", json.dumps(merged("e", interp_method="No interpolation"))),
    }
    root = read_lineage(a1111(merged("a", "b", bake_in_vae="mse.pt"), known), "x.safetensors")
    copy = ["c.ckpt", "a copy", [["e" * 10]]]
    mix = ["sub/mix.safetensors", "add_difference ×1", [copy, ["d" * 10], ["e" * 10]]]
    assert brief(root) == ["x.safetensors", "weighted_sum of 2, alpha 0.3", [mix, ["b.ckpt"], ["mse.pt"]]]
    assert root.parents[1].hashes == {"sha256": SHA["b"], "autov1": "12345678"}
    assert root.parents[2].role == "vae"


@pytest.mark.parametrize(
    ("record", "made", "number"),
    [
        (
            {"mode": "Weight sum", "calcmode": "normal", "base_alpha": 0.5},
            "Weight sum of 2, by supermerger, alpha 0.5",
            2,
        ),
        ({"mode": "Triple sum", "mbw": True}, "Triple sum of 3, by supermerger, alpha by block", 3),
        ({"mode": "Weight sum", "calcmode": "cosineA"}, "Weight sum (cosineA) of 2, by supermerger", 2),
        ({"mode": "Add", "calcmode": "trainDifference"}, "Add (trainDifference) of 3, by supermerger", 3),
        ({"mode": "Weight sum", "calcmode": "self"}, "Weight sum (self) of 1, by supermerger", 1),
    ],
)
def test_supermergers_records(record, made, number):
    record |= {"type": "sd-webui-supermerger", "model_a": SHA["a"], "model_b": "own.ckpt [0123456789]"}
    root = read_lineage(a1111(record | {"model_c": SHA["c"]}), "x")
    assert (root.made, len(root.parents)) == (made, number)
    if number > 1:
        assert (root.parents[1].name, root.parents[1].hashes) == ("own.ckpt", {"autov2": "0123456789"})


def test_modelspecs_names_are_the_last_resort():
    root = read_lineage({"modelspec.merged_from": "a.safetensors, b.ckpt"}, "x")
    assert brief(root) == ["x", "a merge of 2", [["a.safetensors"], ["b.ckpt"]]]
    assert brief(read_lineage({"format": "pt"}, "x")) == ["x"]


def test_a_model_met_again_is_told_once():
    known = {SHA["a"]: entry("a", merged("b", "c")), SHA["b"]: entry("b", merged("c", "d"))}
    root = read_lineage(a1111(merged("a", "b"), known), "x")
    assert notes(root) == [ABOVE]
    assert root.parents[1].note == ABOVE
    assert named_parents(a1111(merged("a", "a"), known)) == [{"name": "a", "sha256": SHA["a"], "autov1": "12345678"}]


# --- what is wrong or endless --------------------------------------------------------------------------

KEYS = ("mergekit_sd.recipe", "sd_merge_recipe", "sd_merge_models", "modelspec.merged_from")
DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    "value", ["", "{", "null", "[]", "17", '"x"', DEEP, '{"a":' * 10_000 + "1" + "}" * 10_000, "\0"]
)
@pytest.mark.parametrize("key", KEYS[:2])
def test_what_is_no_record_is_told_to_be_damaged(key, value):
    root = read_lineage({key: value}, "x")
    assert (root.note, root.parents) == (DAMAGED, ())


@pytest.mark.parametrize("value", ["{}", '{"models": 1, "outputs": {"o": {"model": []}}}', '{"outputs": {"o": 1}}'])
def test_a_record_of_other_types_is_damaged(value):
    assert read_lineage({KEYS[0]: value}, "x").note == DAMAGED
    assert read_lineage({KEYS[1]: value}, "x").note == DAMAGED


WORDS = """a b op models steps outputs model vae file content expr loras lora alpha type sd-webui-supermerger mode
model_a model_b primary_model_hash name sd_merge_recipe interp_method legacy_hash <lora:a:1>"""
words = st.sampled_from([*WORDS.split(), SHA["a"], SHA["b"], "\ud800", "x" * 300])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=6),
    max_leaves=30,
)
tables = st.dictionaries(st.sampled_from("ab"), st.dictionaries(words, words | values, max_size=6), max_size=2)
recipes = st.fixed_dictionaries({"models": tables, "steps": tables, "outputs": tables})


@given(st.dictionaries(st.sampled_from(KEYS), (values | recipes).map(json.dumps) | st.text(max_size=20)))
def test_no_metadata_does_harm(metadata):
    root = read_lineage(metadata, "x")
    assert len(list(everything(root))) <= MOST + 2
    assert all(len(each.name) <= 200 and len(each.made) <= 1000 for each in everything(root))
    json.dumps(root.as_json())
    json.dumps(named_parents(metadata))


def test_loops_are_cut():
    steps = {
        "s": {"op": "weighted_sum", "a": "t", "b": "a", "alpha": 0.3},
        "t": {"op": "weighted_sum", "a": "s", "b": "t", "alpha": 0.3},
    }
    assert notes(read_lineage(ours(MODELS, steps, {"model": "s"}), "x")) == [LOOP, LOOP]
    known = {SHA["a"]: entry("a", merged("b", "a")), SHA["b"]: entry("b", merged("a", "c"))}
    assert notes(read_lineage(a1111(merged("a", "c"), known), "x")) == [LOOP, LOOP]


def chain(length):
    """Records of models each made of the next."""
    hashes = [f"{number:064x}" for number in range(1, length + 1)]
    known = {sha: entry(f"m{n}", merged(after, after)) for n, (sha, after) in enumerate(itertools.pairwise(hashes))}
    return a1111(merged(hashes[0], hashes[0]), known)


def depth(node):
    return 1 + max(map(depth, node.parents), default=0)


def test_ten_thousand_generations_are_cut():
    root = read_lineage(chain(10_000), "x")
    assert depth(root) == DEEPEST + 2
    assert set(notes(root)) == {CUT, ABOVE}
    steps = {f"s{n}": {"op": "weighted_sum", "a": f"s{n + 1}", "b": "a", "alpha": 0.3} for n in range(10_000)}
    root = read_lineage(ours(MODELS, steps, {"model": "s0"}), "x")
    assert depth(root) == DEEPEST + 1
    assert CUT in notes(root)


def test_ten_megabytes_are_read_at_once():
    many = {f"{number:064x}": entry("x" * 100, merged("a", "b")) for number in range(20_000)}
    wide = ours(MODELS, {"s": {"op": "mean", "models": ["a"] * 1_000_000}}, {"model": "s"})
    begun = time.monotonic()
    for metadata in (a1111(merged("a", "b"), many), wide, {KEYS[3]: "a, " * 4_000_000}, {KEYS[0]: "x" * 10_000_000}):
        assert sum(map(len, metadata.values())) > 4_000_000
        assert len(list(everything(read_lineage(metadata, "x")))) <= MOST + 2
    assert time.monotonic() - begun < 20
    assert read_lineage(wide, "x").note == CUT


# --- the library's files in the tree -------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path_factory, tmp_path):
    """base and anime; mix.safetensors of both; deep.safetensors of mix and photo. Not scanned."""
    story.room(tmp_path_factory, tmp_path)
    mk.run(tmp_path / "r.toml", metadata="webui")
    (tmp_path / "out.safetensors").rename(tmp_path / "mix.safetensors")
    text = story.MIX.replace('"base', '"mix').replace('"anime', '"photo').replace("base =", "mix1 =")
    text = text.replace('a = "mix"', 'a = "mix1"').replace("anime =", "photo =")
    (tmp_path / "deep.toml").write_text(text.replace("out.safe", "deep.safe"), encoding="utf-8")
    mk.run(tmp_path / "deep.toml")
    return tmp_path.resolve()


def test_parents_are_found_and_go_on_with_their_own_records(shelf, shell):
    mk.scan_library([shelf], sha256=True)
    tree = mk.family_tree(shelf / "deep.safetensors")
    mix, photo = tree.root.parents
    assert (mix.path, photo.path) == (shelf / "mix.safetensors", shelf / "photo.safetensors")
    assert [parent.path for parent in mix.parents] == [shelf / "base.safetensors", shelf / "anime.safetensors"]
    assert {parent.found_by for parent in mix.parents} == {"sha256"}
    assert tree.children == ()
    assert [(child.path.name, child.by) for child in mk.family_tree(shelf / "base.safetensors").children] == [
        ("mix.safetensors", "sha256")
    ]
    assert [child.path.name for child in mk.family_tree(shelf / "mix.safetensors").children] == ["deep.safetensors"]
    report = shell.json("library", "tree", shelf / "deep.safetensors")
    assert report["parents"][0]["parents"][0]["path"] == str(shelf / "base.safetensors")
    assert shell.json("library", "tree", shelf / "mix.safetensors")["children"][0]["by"] in ("name", "content")


def test_renamed_parents_are_found_by_their_hashes(shelf):
    mk.scan_library([shelf], sha256=True)
    mk.rename_model(shelf / "base.safetensors", "start")
    (base, _) = mk.family_tree(shelf / "mix.safetensors").root.parents
    assert (base.name, base.path, base.found_by) == ("base.safetensors", shelf / "start.safetensors", "sha256")
    assert [child.by for child in mk.family_tree(shelf / "start.safetensors").children] == ["sha256"]


def test_another_model_of_the_name_is_not_taken(shelf):
    models.write(shelf / "base.safetensors.new", {"emb_params": torch.zeros(1, 8)})
    (shelf / "base.safetensors.new").replace(shelf / "base.safetensors")
    mk.scan_library([shelf], hashes="none")
    by_name = mk.family_tree(shelf / "mix.safetensors").root.parents[0]
    assert (by_name.path, by_name.found_by) == (shelf / "base.safetensors", "name")
    assert [child.by for child in mk.family_tree(shelf / "base.safetensors").children] == ["name"]
    mk.scan_library([shelf], hashes="none", sha256=True)
    assert mk.family_tree(shelf / "mix.safetensors").root.parents[0].path is None
    assert mk.family_tree(shelf / "base.safetensors").children == ()


def test_a_file_made_over_its_own_parents_name_is_no_loop(tmp_path):
    metadata = ours({"a": {"file": "x.safetensors"}}, {"s": {"op": "scale", "a": "a"}}, {"model": "s"})
    models.write(tmp_path / "x.safetensors", {"t": torch.ones(2)}, metadata)
    mk.scan_library([tmp_path])
    tree = mk.family_tree(tmp_path / "x.safetensors")
    assert tree.root.parents[0].path is None
    assert tree.children == ()


def test_files_that_name_each_other_end(tmp_path):
    for name, other in (("x", "y"), ("y", "x")):
        metadata = ours({"a": {"file": f"../up/{other}.safetensors"}}, {"s": {"op": "scale", "a": "a"}}, {"model": "s"})
        models.write(tmp_path / f"{name}.safetensors", {"t": torch.ones(2)}, metadata)
    mk.scan_library([tmp_path])
    found = list(everything(mk.family_tree(tmp_path / "x.safetensors").root))
    assert [each.path and each.path.stem for each in found] == ["x", "y", None]


def test_a_loop_by_hashes_is_cut(tmp_path, monkeypatch):
    """No file can hold its own sha256; a damaged index can say so."""
    metadata = a1111(merged("a"), {SHA["a"]: entry("other")})
    path = models.write(tmp_path / "x.safetensors", {"t": torch.ones(2)}, metadata)
    mk.scan_library([tmp_path])
    with mk.Library() as library:
        library.add_hashes(library.entries(), {"sha256": SHA["a"]})
    assert notes(mk.family_tree(path).root) == [LOOP]


def test_a_tree_of_many_files_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_sd.library.family.MOST", 5)
    monkeypatch.setattr("mergekit_sd.library.family.DEEPEST", 3)
    for number in range(8):
        following = {"a": {"file": f"m{number + 1}.safetensors"}}
        metadata = ours(following, {"s": {"op": "scale", "a": "a"}}, {"model": "s"})
        models.write(tmp_path / f"m{number}.safetensors", {"t": torch.ones(2)}, metadata)
    mk.scan_library([tmp_path], hashes="none")
    root = mk.family_tree(tmp_path / "m0.safetensors").root
    assert (depth(root), notes(root)) == (5, [CUT])
    monkeypatch.setattr("mergekit_sd.library.family.DEEPEST", 30)
    root = mk.family_tree(tmp_path / "m0.safetensors").root
    assert (depth(root), notes(root)) == (6, [CUT])


def test_without_a_library_nothing_is_found_nor_made(shelf, shell):
    mk.library_file().unlink()  # which the run began, for the sha256 of its inputs
    out, err = shell("library", "tree", shelf / "mix.safetensors")
    assert not mk.library_file().exists()
    assert "not in the library (sha256 " in out
    assert "mergekit-sd library scan" in err


def test_what_cannot_be_read_is_refused(tmp_path, shell):
    (tmp_path / "page.ckpt").write_text("<html>")
    shell.refused("WrongFormat", 3, "library", "tree", tmp_path / "page.ckpt")
    shell.refused("MissingInput", 3, "library", "tree", tmp_path / "none.safetensors")


# --- as people read it ---------------------------------------------------------------------------------


def test_the_tree_as_lines(shelf, shell):
    mk.scan_library([shelf], sha256=True)
    (shelf / "photo.safetensors").unlink()
    mk.scan_library([shelf])
    out, err = shell("library", "tree", shelf / "deep.safetensors")
    lines = out.splitlines()
    assert err == ""
    assert lines[:7] == [
        "deep.safetensors = weighted_sum of 2, alpha 0.3",
        "├─ a: mix.safetensors = weighted_sum of 2, alpha 0.3",
        f"│  │  {shelf / 'mix.safetensors'} (found by its name)",
        "│  ├─ a: base.safetensors",
        f"│  │     {shelf / 'base.safetensors'}",
        "│  └─ b: anime.safetensors",
        f"│        {shelf / 'anime.safetensors'}",
    ]
    assert lines[7] == "└─ b: photo.safetensors"
    assert lines[8].startswith("      not in the library (content hash ")
    out, _ = shell("library", "tree", shelf / "base.safetensors")
    assert "Its metadata does not tell what it was made of." in out
    assert f"Made of it, 1 model:\n  {shelf / 'mix.safetensors'}\n" in out


def test_names_of_strangers_are_escaped(tmp_path, shell, capsys):
    known = {SHA["a"]: entry("a\x1b[31m\n.ckpt", merged("b", "b", interp_method="\x1b[2J"))}
    path = models.write(tmp_path / "x.safetensors", {"t": torch.ones(2)}, a1111(merged("a", "\ud800 \x1b"), known))
    out, _ = shell("library", "tree", path)
    assert "\x1b" not in out
    assert "a\\x1b[31m\\n.ckpt = \\x1b[2J of 2" in out
    shell.json("library", "tree", path)


def test_inspects_lines(capsys):
    from mergekit_sd.cli.lineage import show_lineage

    show_lineage(mk.read_lineage({"format": "pt"}, "x"))
    assert capsys.readouterr().out == ""
    show_lineage(mk.read_lineage(a1111(merged("a", "b"), {SHA["a"]: entry("a.ckpt")}), "x.safetensors"))
    head, *lines = capsys.readouterr().out.splitlines()
    assert (head, lines[0]) == ("Made of", "  x.safetensors = weighted_sum of 2, alpha 0.3")
    assert lines[1:] == ["  ├─ a: a.ckpt", "  └─ b: bbbbbbbbbb"]
    show_lineage(mk.read_lineage({"sd_merge_recipe": "{"}, "x"))
    assert f"({DAMAGED})" in capsys.readouterr().out
    show_lineage(mk.read_lineage({"modelspec.merged_from": "a, " * 300}, "x"))
    assert "… the whole tree: mergekit-sd library tree FILE" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tree", "similar"])
def test_every_command_has_help_that_fits(shell, command):
    out, _ = shell("library", command, "--help")
    assert max(map(len, out.splitlines())) <= 80
    assert command in shell("library", "--help")[0]
