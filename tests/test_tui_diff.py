"""The comparison's screen: blocks with numbers, tensors, a merge of blocks, a LoRA; told as stories."""

from __future__ import annotations

import math
import time

import pytest
import small_models
import torch
import tui_stage as stage
from safetensors.torch import load_file

import mergekit_sd as mk
from mergekit_sd.errors import Cancelled
from mergekit_sd_tui import diff_rows
from mergekit_sd_tui.app import Workbench
from mergekit_sd_tui.screens.diff import DiffTable

IN04 = "model.diffusion_model.input_blocks.4."


@pytest.fixture
def pair(tmp_path):
    """Two models: B has IN04 one and a half times as large, the text encoder twice, and a tensor more."""
    tensors = {name: tensor.float() for name, tensor in small_models.small("sd1", 1).items()}
    other = {
        name: tensor * (1.5 if name.startswith(IN04) else 2 if "text_model.encoder" in name else 1)
        for name, tensor in tensors.items()
    }
    other["[/x] more\x1b[31m"] = torch.ones(2)
    a, b = tmp_path / "[b] a.safetensors", tmp_path / "b.safetensors"
    small_models.save(a, tensors)
    small_models.save(b, other)
    return a, b


async def compared(pilot, pair):
    """Compare, and wait for the rows."""
    pilot.app.compare(*pair)
    await stage.sees(pilot, "7 [Diff]", "All weights:", "IN00")
    await pilot.pause(0.05)


def rows(app):
    """The names and changes in the table."""
    table = app.screen.query_one(DiffTable)
    return [tuple(cell.plain for cell in table.get_row_at(row)[1:3]) for row in range(table.row_count)]


def marks(app):
    table = app.screen.query_one(DiffTable)
    return [table.get_row_at(row)[1].plain for row in range(table.row_count) if table.get_row_at(row)[0].plain == "*"]


def test_blocks_with_their_numbers(pair):
    async def story(pilot):
        await compared(pilot, pair)
        await stage.sees(pilot, "A [b] a.safetensors  B b.safetensors", "901 of 971 tensors equal")
        found = dict(rows(pilot.app))
        assert found["IN04"] == "50.00%"
        assert found["IN05"] == "0"
        # Its embeddings, which are the most of it, are the same.
        assert 1 < float(found["text encoder"].rstrip("%")) < 20
        assert found["junk"] == "-"
        names = [name for name, _ in rows(pilot.app)]
        assert names.index("IN00") < names.index("M00") < names.index("OUT00") < names.index("VAE")
        await pilot.press("s")
        assert [name for name, _ in rows(pilot.app)][:2] == ["IN04", "text encoder"]
        await pilot.press("s")
        assert [name for name, _ in rows(pilot.app)] == names

    stage.play(story)


def test_a_block_opens_into_its_tensors(pair):
    async def story(pilot):
        await compared(pilot, pair)
        await pilot.press(*["down"] * 4, "enter")
        await stage.sees(pilot, "IN04: 38 tensors, the most changed first")
        assert len(rows(pilot.app)) == 38
        assert {change for _, change in rows(pilot.app)} == {"50.00%"}
        assert IN04 in str(pilot.app.screen.query_one("#details").render())
        await pilot.press("enter", "space", "s")
        assert "Blocks are marked where all of them are shown." in stage.told(pilot.app)
        await pilot.press("escape")
        assert ("IN04", "50.00%") in rows(pilot.app)
        assert "IN04" in str(pilot.app.screen.query_one("#details").render())
        await pilot.press("end", "enter")
        await stage.sees(pilot, "[/x] more\\x1b[31m", "only in B")
        await pilot.press("escape", "escape")
        assert pilot.app.current_mode == "library"

    stage.play(story)


def test_only_the_marked_blocks_are_merged(pair, tmp_path, monkeypatch):
    """The draft is a recipe, and its run takes these blocks from B and all else from A, bit for bit."""
    monkeypatch.chdir(tmp_path)
    made = []

    async def story(pilot):
        await compared(pilot, pair)
        await pilot.press("b")
        assert "Mark the blocks to take from B: space on each." in stage.told(pilot.app)
        await pilot.press(*["down"] * 4, "space", "space", "up", "space")
        await stage.until(pilot, lambda: marks(pilot.app) == ["IN04"], "IN04 alone")
        await pilot.press("end", "space")
        assert "Only blocks of the UNet" in stage.told(pilot.app)
        await pilot.press("b")
        await stage.until(pilot, lambda: pilot.app.current_mode == "mix")
        made.append(pilot.app.workspace.draft)
        await pilot.press("z")
        assert pilot.app.workspace.draft.text == ""

    stage.play(story)
    (draft,) = made
    recipe = mk.parse_recipe(draft.text, draft.folder, None)
    (output,) = mk.run(recipe).outputs
    result = {name: tensor.float() for name, tensor in load_file(output.path).items()}
    a, b = (load_file(path) for path in pair)
    for name, tensor in a.items():
        want = b[name] if name.startswith(IN04) else tensor
        assert torch.equal(result[name], want.half().float()), name


def test_a_lora_and_the_other_way(pair, monkeypatch):
    submitted = []
    monkeypatch.setattr(Workbench, "submit", lambda _self, title, arguments: submitted.append((title, arguments)))

    async def story(pilot):
        await compared(pilot, pair)
        await pilot.press("l")
        await stage.sees(pilot, "A LoRA of what b.safetensors has over [b] a.safetensors")
        await pilot.press("enter")
        await stage.until(pilot, lambda: submitted)
        await pilot.press("w")
        await stage.sees(pilot, "A b.safetensors  B [b] a.safetensors", "All weights:")
        assert dict(rows(pilot.app))["IN04"] == "33.33%"

    stage.play(story)
    ((title, arguments),) = submitted
    a, b = pair
    assert title == "LoRA of b.safetensors"
    out = str(b.with_name("b-lora.safetensors"))
    assert arguments == ("lora", "extract", str(b), str(a), "-o", out, "--rank", "32")


def test_without_models_it_says_what_to_do(pair):
    async def story(pilot):
        await pilot.press("7")
        await stage.sees(pilot, "Mark two in the library (1, space), then d there, or r here.")
        await pilot.press("enter", "space", "b", "l", "w", "s", "r")
        assert "Mark two models in the library." in stage.told(pilot.app)
        for path in pair:
            pilot.app.edit(pilot.app.workspace.toggled(path))
        await pilot.press("r")
        await stage.sees(pilot, "All weights:")

    stage.play(story)


def test_equal_models_are_told(pair):
    async def story(pilot):
        pilot.app.compare(pair[0], pair[0])
        await stage.sees(pilot, "Both have the same tensors with the same values")

    stage.play(story)


def test_a_comparison_is_stopped(pair, monkeypatch):
    def endless(_a, _b, on_progress, cancel):
        on_progress(1024, 4096)
        while not cancel.cancelled:
            time.sleep(0.01)
        raise Cancelled

    monkeypatch.setattr(mk, "diff_files", endless, raising=False)

    async def story(pilot):
        pilot.app.compare(*pair)
        await stage.sees(pilot, "Comparing: 1.0 KiB of 4.0 KiB")
        await pilot.press("r")
        assert "Mark two models" in stage.told(pilot.app) or "^x stops it" in stage.told(pilot.app)
        await pilot.press("ctrl+x")
        await stage.sees(pilot, "The comparison was stopped", "Nothing was compared. r compares again.")

    stage.play(story)


def test_what_is_no_model_is_told(pair):
    pair[1].write_bytes(b"nothing")

    async def story(pilot):
        pilot.app.compare(*pair)
        await stage.sees(pilot, "The comparison failed", "Nothing was compared.")
        await stage.until(pilot, lambda: "b.safetensors" in stage.told(pilot.app))

    stage.play(story)


@pytest.mark.parametrize("size", [(20, 5), (1, 1)])
def test_a_tiny_terminal(pair, size):
    async def story(pilot):
        pilot.app.compare(*pair)
        await stage.until(pilot, lambda: pilot.app.screen.query(DiffTable))
        await stage.until(pilot, lambda: "All weights" in stage.status(pilot.app))
        await pilot.press("down", "enter", "escape", "space", "l", "escape")
        await pilot.resize_terminal(80, 24)
        await stage.sees(pilot, "IN05", "50.00%")

    stage.play(story, size)


@pytest.mark.parametrize(
    ("squares", "words"),
    [((1, 0), "0"), ((1, 1e-12), "<0.01%"), ((4, 1), "50.00%"), ((1, 10_000), "100 x"), ((0, 1), "new")],
)
def test_changes_in_words(squares, words):
    from mergekit_sd.inspection.distance import Distance

    distance = Distance(squares[0], 1.0, squares[1], 1.0, equal=False)
    tensor = mk.TensorDiff("a", "IN00", "different", (1,), (1,), distance)
    assert diff_rows.tensor_cells(tensor, 1.0)[2].plain == words
    finite = not math.isinf(diff_rows.change_of(tensor))
    assert diff_rows.longest([tensor]) == (math.sqrt(squares[1] / squares[0]) if finite else 0.0)


def test_bars_are_as_long_as_the_change_and_ascii_where_need_be(monkeypatch):
    from mergekit_sd.inspection.distance import Distance

    def bar(change):
        tensor = mk.TensorDiff("a", "IN00", "different", (1,), (1,), Distance(1.0, 1.0, change**2, 1.0, equal=False))
        return diff_rows.tensor_cells(tensor, 1.0)[3].plain

    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    assert [len(bar(change)) for change in (0, 0.001, 0.5, 1)] == [0, 1, 6, 12]
    monkeypatch.setenv("LC_ALL", "C")
    assert bar(1).isascii()


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen(pair, size):
    async def story(pilot):
        await compared(pilot, pair)
        await pilot.press(*["down"] * 4, "space", "up")
        await pilot.pause(0.2)
        await stage.looks(pilot, f"diff-{size[0]}x{size[1]}")

    stage.play(story, size)
