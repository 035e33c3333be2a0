"""The inspector's screen: a model's parts down to its tensors, and the copies that mend it."""

from __future__ import annotations

import pytest
import small_models
import torch
import tui_stage as stage

import mergekit_sd as mk
from mergekit_sd_tui.leaves import Leaf, common_start, read_leaves
from mergekit_sd_tui.tensor_tree import Branch, TensorTree

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def model(tmp_path):
    """A model with junk, an EMA copy's name and broken position_ids."""
    tensors = small_models.small("sd1", 1)
    tensors[IDS] = tensors[IDS].float() + 0.4
    tensors[IDS][0, 5] = 7.0
    tensors["[/x] junk"] = torch.ones(3)
    path = tmp_path / "models" / "broken.safetensors"
    path.parent.mkdir()
    return small_models.save(path, tensors, {"note": "[/] \x1b[31m" + "long " * 200})


def opened(path):
    """A story's beginning: the model is in the inspector."""

    async def begin(pilot):
        await stage.until(pilot, lambda: not pilot.app.screen.busy)
        pilot.app.inspect_model(path)
        await stage.sees(pilot, "UNet")
        await stage.until(pilot, lambda: "tensors" in stage.status(pilot.app))

    return begin


def test_the_tree_goes_down_to_shapes_and_dtypes(model):
    async def story(pilot):
        await opened(model)(pilot)
        text = stage.shown(pilot.app)
        assert "text encoder" in text
        assert "1 of 77 wrong (5): [f] mends them" in text
        assert "junk: 1 tensor, 12 B" in text
        await pilot.press("enter")
        await stage.sees(pilot, "IN04  input_blocks.4", "M00  middle_block")
        tree = pilot.app.screen.query_one(TensorTree)
        await pilot.press("down")
        assert isinstance(tree.under_cursor, Branch)
        await pilot.press("enter", "down")
        assert isinstance(tree.under_cursor, Leaf)
        leaf = tree.under_cursor
        await stage.sees(pilot, leaf.name, leaf.dimensions)
        await pilot.press("up", "space")
        assert not tree.cursor_node.is_expanded

    stage.play(story, (180, 40))


def test_every_tensor_has_its_leaf_once(model):
    found = mk.inspect_file(model)
    leaves = read_leaves(model, found)
    assert sorted(leaf.name for leaf in leaves) == sorted(mk.open(model).file.tensors)
    assert {leaf.part for leaf in leaves} == {"unet", "vae", "text_encoder", "schedule", "junk"}
    assert set(mk.SD_BLOCKS) < {leaf.block.split()[0] for leaf in leaves if leaf.part == "unet"}
    assert [leaf.part for leaf in leaves if leaf.name == "[/x] junk"] == ["junk"]


def test_blocks_are_in_the_order_of_their_numbers(model):
    leaves = read_leaves(model, mk.inspect_file(model))
    blocks = list(dict.fromkeys(leaf.block.split()[0] for leaf in leaves))
    assert [block for block in blocks if block in mk.SD_BLOCKS] == list(mk.SD_BLOCKS)


@pytest.mark.parametrize(
    ("names", "start"),
    [(["a.b.c", "a.b.d"], "a.b."), (["a.bc", "a.bd"], "a."), (["a"], ""), (["x.y"], "x."), (["p", "q"], "")],
)
def test_a_common_start_is_of_whole_words(names, start):
    assert common_start(names) == start


def test_a_filter_opens_what_it_leaves(model):
    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("slash", *"position_ids", "enter")
        await stage.until(pilot, lambda: "1 of" in stage.status(pilot.app))
        await stage.sees(pilot, "77 f32")
        await pilot.press("escape")
        await stage.until(pilot, lambda: " of " not in stage.status(pilot.app))
        assert pilot.app.current_mode == "inspector"
        await pilot.press("escape")
        assert pilot.app.current_mode == "library"

    stage.play(story, (100, 30))


def test_f_writes_a_mended_copy(model):
    target = model.parent / "broken-fixed.safetensors"

    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("f")
        await stage.sees(pilot, "Mend position_ids", "broken-fixed.safetensors")
        await pilot.press("enter")
        await stage.until(pilot, target.exists, "the copy")
        await stage.until(pilot, lambda: "is written" in stage.status(pilot.app))

    stage.play(story, (120, 30))
    assert mk.inspect_file(target).position_ids.state == "ok"
    assert mk.inspect_file(target).junk.tensors == 1
    assert mk.inspect_file(model).position_ids.state == "corrupt"


def test_p_writes_a_copy_without_junk_under_another_name(model):
    target = model.parent / "small.safetensors"
    (model.parent / "taken.safetensors").touch()

    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("p")
        await stage.sees(pilot, "broken-pruned.safetensors")
        box = pilot.app.screen.query_one("Input")
        for wrong, why in (
            (model.parent / "taken.safetensors", "exists already"),
            (model.parent / "nowhere" / "x.safetensors", "There is no folder"),
            ("", "Type the path"),
            ("\0", "cannot be a path"),
        ):
            box.value = str(wrong)
            await pilot.press("enter")
            await stage.sees(pilot, why)
        box.value = str(target)
        await pilot.press("enter")
        await stage.until(pilot, lambda: target.exists() and "is written" in stage.status(pilot.app), "the copy")

    stage.play(story, (120, 30))
    assert mk.inspect_file(target).junk.tensors == 0


def test_esc_writes_nothing(model):
    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("f")
        await stage.sees(pilot, "Mend position_ids")
        await pilot.press("escape")
        await pilot.pause()
        assert not pilot.app.screen.busy

    stage.play(story)
    assert [each.name for each in model.parent.iterdir()] == ["broken.safetensors"]


def test_a_refusal_of_the_engine_is_told(model, monkeypatch):
    def refuses(*_args, **_options):
        from mergekit_sd.errors import DiskFull

        raise DiskFull("The disk is full [/x].", file="/tmp/\x1b[31m", hint="make room")

    monkeypatch.setattr(mk, "save", refuses, raising=False)

    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("f")
        await stage.sees(pilot, "Mend position_ids")
        await pilot.press("enter")
        await stage.until(pilot, lambda: "The disk is full [/x]." in stage.told(pilot.app))
        assert "/tmp/\\x1b[31m" in stage.told(pilot.app)
        assert "make room" in stage.told(pilot.app)
        assert "The writing failed" in stage.status(pilot.app)
        await stage.sees(pilot, "The disk is full [/x].")

    stage.play(story, (100, 30))


def test_numbers_of_a_tensor_come_on_demand(model, monkeypatch):
    from types import SimpleNamespace

    asked = []

    def statistics(path, name):
        asked.append((path, name))
        return SimpleNamespace(min=-1.5, max=2.0, mean=0.25, std=1.0, nan=3, inf=0)

    monkeypatch.setattr(mk, "tensor_statistics", statistics, raising=False)

    async def story(pilot):
        await opened(model)(pilot)
        await pilot.press("t")
        assert "only tensors have numbers" in stage.told(pilot.app)
        await pilot.press("slash", *"junk", "enter")
        await stage.until(pilot, lambda: "1 of" in stage.status(pilot.app))
        await pilot.press("end", "t")
        await stage.sees(pilot, "min   -1.5", "mean  0.25", "3 NaNs, 0 Infs")
        assert asked == [(model, "[/x] junk")]

    stage.play(story, (120, 40))


def test_without_a_model_the_way_to_one_is_told():
    async def story(pilot):
        await pilot.press("2")
        await stage.sees(pilot, "No model is chosen yet.", "the library (1)")
        await pilot.press("t", "f", "p", "x", "enter", "space")
        assert "No model is open." in stage.told(pilot.app)

    stage.play(story)


def test_a_file_that_is_gone_meanwhile_is_told(tmp_path):
    async def story(pilot):
        pilot.app.inspect_model(tmp_path / "[/x] gone.safetensors")
        await stage.until(pilot, lambda: "Reading the model failed" in stage.told(pilot.app))
        await stage.until(pilot, lambda: "Reading the model failed" in stage.status(pilot.app))

    stage.play(story)


def test_another_model_takes_the_place_of_the_first(model, tmp_path):
    other = stage.small_file(tmp_path / "other.safetensors", only="vae")

    async def story(pilot):
        await opened(model)(pilot)
        pilot.app.inspect_model(other)
        await stage.until(pilot, lambda: "position_ids" not in stage.shown(pilot.app))
        await stage.sees(pilot, "other.safetensors", "248 tensors")

    stage.play(story)
