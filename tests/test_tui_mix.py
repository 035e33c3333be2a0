"""The Mix screen: what it shows of the draft, and what its keys make of it, told as stories."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
import tui_stage as stage
from textual import events
from textual.widgets import Input, OptionList

import mergekit_sd as mk
from mergekit_sd_tui import glyphs
from mergekit_sd_tui.bars import BlockBars, bars_text, short_number
from mergekit_sd_tui.state import Draft


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three small models where the app runs, scanned."""
    for seed, name in enumerate(("apple", "[b] pear", "plum")):
        stage.small_file(tmp_path / f"{name}.safetensors", seed)
    stage.scanned(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def step(app, name="mix"):
    """A step of the draft as plain data."""
    text = app.workspace.draft.text
    mk.parse_recipe(text, Path())
    return tomllib.loads(text)["steps"][name]


def bars(app):
    """The row of bars."""
    return app.screen.query_one(BlockBars)


def mixing(models, story, size=(80, 24), names=("apple", "[b] pear")):
    """A story that begins with a draft of these models, its bars drawn."""

    async def whole(pilot):
        pilot.app.mix([models / f"{name}.safetensors" for name in names])
        await stage.sees(pilot, "[Mix]", "(sd1)", "A draft in no file yet")
        await story(pilot)

    return stage.play(whole, size)


async def presses(pilot, keys, *words):
    """Press keys, one after the other, then answer what is asked."""
    for key in keys.split():
        await pilot.press(key)
    for word in words:
        await stage.until(pilot, lambda: pilot.app.screen.is_modal)
        pilot.app.screen.query_one(Input).insert_text_at_cursor(word)
        await pilot.press("enter")
    await stage.until(pilot, lambda: not words or not pilot.app.screen.is_modal)


# --- bars -----------------------------------------------------------------------------------------------


def test_a_preset_then_one_block_then_undo(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "p", "GRAD_V")
        assert step(app)["alpha"] == {"preset": "GRAD_V", "base": 0.5}
        await presses(pilot, "right right right right right up")
        assert step(app)["alpha"] == {"preset": "GRAD_V", "base": 0.5, "IN04": 0.7166666667}
        await presses(pilot, "shift+down shift+down")
        assert step(app)["alpha"]["IN04"] == 0.6966666667
        await stage.sees(pilot, "alpha at IN04: 0.6967", "GRAD_V, base 0.5, IN04")
        await presses(pilot, "z z z")
        assert step(app)["alpha"] == {"preset": "GRAD_V", "base": 0.5}
        await presses(pilot, "z")
        assert step(app)["alpha"] == 0.5
        await presses(pilot, "Z Z")
        assert step(app)["alpha"]["IN04"] == 0.7166666667

    mixing(models, story)


def test_bars_show_what_the_engine_resolves(models):
    async def story(pilot):
        app = pilot.app
        text = app.workspace.draft.text.replace(
            "alpha = 0.5", 'alpha = { preset = "COSINE", base = 0.25, "OUT03-OUT05" = 0.9, "OUT05.attn2" = 0.1 }'
        )
        app.edit(replace(app.workspace, draft=Draft(text)))
        await stage.until(pilot, lambda: bars(app).numbers["base"].value == 0.25)
        assert bars(app).numbers == mk.block_weights(step(app)["alpha"], "sd1")
        await presses(pilot, "end left left left left left left")
        await stage.sees(pilot, "alpha at OUT05: 0.9 (in parts 0.1 to 0.9)", "90~")

    mixing(models, story)


def test_values_stay_within_bounds_unless_the_step_extrapolates(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "pageup up")
        assert step(app)["alpha"] == {"default": 0.5, "base": 1.0}
        await presses(pilot, "pagedown down")
        assert step(app)["alpha"]["base"] == 0
        app.screen.query_one("#fields", OptionList).focus()
        await presses(pilot, "end enter escape up")
        assert step(app)["extrapolate"] is True
        await presses(pilot, "down down")
        assert step(app)["alpha"]["base"] == -0.05
        await stage.sees(pilot, "base: -0.05")

    mixing(models, story)


def test_a_number_is_typed_and_nonsense_is_refused(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "right 0 . 3 5 enter")
        assert step(app)["alpha"]["IN00"] == 0.35
        await presses(pilot, "right enter 1 x enter")
        await stage.sees(pilot, '"1x" is no number', "write a number such as 0.5")
        await presses(pilot, "backspace enter")
        assert step(app)["alpha"]["IN01"] == 1.0
        await presses(pilot, "right . 9 escape")
        assert "IN02" not in step(app)["alpha"]
        await presses(pilot, "space right right enter", "0.2")
        assert [step(app)["alpha"][f"IN{number:02}"] for number in (2, 3, 4)] == [0.2] * 3

    mixing(models, story)


def test_a_curve_between_two_blocks_and_all_inverted_and_scaled(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "right pagedown space right right right right pageup c", "linear")
        numbers = bars(app).numbers
        assert [numbers[f"IN{number:02}"].value for number in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        await presses(pilot, "i")
        assert [bars(app).numbers[f"IN{number:02}"].value for number in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0.5]
        await presses(pilot, "escape x", "0.5")
        assert [bars(app).numbers[name].value for name in ("base", "IN00", "OUT11")] == [0.25, 0.5, 0.25]
        await presses(pilot, "c", "ease in")
        assert isinstance(step(app)["alpha"], list)

    mixing(models, story)


def test_the_webuis_text_goes_out_and_comes_in(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "p", "WRAP08")
        await presses(pilot, "y")
        copied = app.clipboard
        assert copied == "0.5," + "1," * 4 + "0," * 17 + "1,1,1,1"
        await presses(pilot, "z")
        bars(app).post_message(events.Paste(copied))
        await stage.until(pilot, lambda: step(app)["alpha"] == copied)
        await presses(pilot, "right right down")
        assert step(app)["alpha"] == copied.replace("0.5,1,1", "0.5,1,0.95")
        await presses(pilot, "v", ",".join(["0.3"] * 25))
        assert step(app)["alpha"] == {"weights": ",".join(["0.3"] * 25), "base": 0.5}
        await presses(pilot, "v 1 comma 2 enter")
        await stage.sees(pilot, "These are 2 numbers", "26 numbers (base first) or 25")

    mixing(models, story)


def test_the_mouse_moves_the_cursor(models):
    async def story(pilot):
        app = pilot.app
        await pilot.click(BlockBars, offset=(1 + 3 * 7, 4))
        assert bars(app).block == "IN06"

    mixing(models, story)


def test_sdxl_has_its_own_blocks(tmp_path, monkeypatch):
    for seed in (1, 2):
        small_models.save(tmp_path / f"xl{seed}.safetensors", small_models.small("sdxl", seed))
    monkeypatch.chdir(tmp_path)

    async def story(pilot):
        app = pilot.app
        app.mix([tmp_path / "xl1.safetensors", tmp_path / "xl2.safetensors"])
        await stage.until(pilot, lambda: app.screen.query(BlockBars) and len(bars(app).numbers) == 20)
        await presses(pilot, "p", "GRAD_V")
        await presses(pilot, "y end")
        assert app.clipboard.count(",") == 19
        assert bars(app).block == "OUT08"

    stage.play(story)


# --- steps, operands, methods -----------------------------------------------------------------------------


def test_a_second_step_its_method_and_operand_and_out_again(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "n", "slerp")
        assert step(app, "step1") == {"op": "slerp", "a": "mix", "b": "apple", "alpha": 0.5}
        await stage.sees(pilot, "step1", "slerp of mix, apple", "step1 → mix.safetensors")
        app.screen.query_one("#fields", OptionList).focus()
        await presses(pilot, "home down down enter", "pear")
        assert step(app, "step1")["b"] == "b-pear"
        await presses(pilot, "o", "sum_twice")
        assert step(app, "step1")["op"] == "sum_twice"
        assert step(app, "step1")["c"] == "b-pear" or step(app, "step1")["b"] == "b-pear"
        app.screen.query_one("#graph", OptionList).focus()
        await presses(pilot, "home down down down delete")
        assert "step1" not in tomllib.loads(app.workspace.draft.text)["steps"]
        await stage.sees(pilot, "mix → mix.safetensors")

    mixing(models, story)


def test_another_file_of_the_library_becomes_an_operand(models):
    async def story(pilot):
        app = pilot.app
        app.screen.query_one("#fields", OptionList).focus()
        await presses(pilot, "home down down enter", "another file", "plum")
        assert step(app)["b"] == "plum"
        await presses(pilot, "z")
        assert "plum" not in app.workspace.draft.text

    mixing(models, story)


def test_each_model_of_a_list_has_bars_of_its_own(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "o", "linear")
        await stage.sees(pilot, "weights.0", "weights.1")
        app.screen.query_one("#fields", OptionList).focus()
        await presses(pilot, "end enter down")
        assert step(app)["weights"] == [1.0, {"default": 1.0, "base": 0.95}]
        await stage.sees(pilot, "weights.1 at base: 0.95")

    mixing(models, story)


def test_choices_numbers_and_outputs_are_asked_for(models):
    async def story(pilot):
        app = pilot.app
        await presses(pilot, "o", "tensor_sum")
        app.screen.query_one("#fields", OptionList).focus()
        ids = [option.id for option in app.screen.query_one("#fields", OptionList)._options]
        app.screen.query_one("#fields", OptionList).highlighted = ids.index("parameter:dim")
        await presses(pilot, "enter", "1")
        assert step(app)["dim"] == 1
        app.screen.query_one("#graph", OptionList).focus()
        await presses(pilot, "end enter down down down enter", "fp32")
        assert tomllib.loads(app.workspace.draft.text)["outputs"]["final"]["dtype"] == "fp32"

    mixing(models, story)


def test_a_change_that_would_be_no_recipe_says_why(models):
    async def story(pilot):
        app = pilot.app
        before = app.workspace.draft.text
        app.screen.query_one("#graph", OptionList).focus()
        await presses(pilot, "home delete")
        await stage.until(pilot, lambda: 'There is no model or step "apple"' in stage.told(app))
        assert app.workspace.draft.text == before

    mixing(models, story)


def test_comments_of_the_file_survive_the_bars(models):
    async def story(pilot):
        app = pilot.app
        text = "# mine\n" + app.workspace.draft.text.replace("alpha = 0.5", "alpha = 0.5  # half")
        app.edit(replace(app.workspace, draft=Draft(text)))
        await presses(pilot, "up")
        assert app.workspace.draft.text == text.replace("alpha = 0.5", "alpha = { default = 0.5, base = 0.55 }")

    mixing(models, story)


# --- a picture of what is not written ---------------------------------------------------------------------


def test_a_picture_is_asked_of_a_copy_that_can_be_drawn(models, monkeypatch):
    asked = []

    async def story(pilot):
        app = pilot.app
        monkeypatch.setattr(app, "submit", lambda title, arguments: asked.append(arguments))
        await presses(pilot, "up s enter")
        await stage.sees(pilot, "There is nothing to draw.", "a lantern in the rain")
        await presses(pilot, "", "a cat")
        await presses(pilot, "s enter")  # the prompt is remembered
        assert len(asked) == 2
        for arguments in asked:
            recipe = mk.samples_recipe(Path(arguments[1]), of=["mix"], prompt="a cat")
            assert arguments[2:5] == ["--of", "mix", "--prompt=a cat"]
            assert Path(arguments[1]).parent != models
            assert mk.plan(mk.load(Path(arguments[1]))).outputs  # its models are found from there
            assert recipe.steps["mix"].parameters["alpha"].describe() == {"base": 0.55, "default": 0.5}
        assert not Path(asked[0][-1]).exists()

    mixing(models, story)


# --- nothing, mistakes, odd terminals ---------------------------------------------------------------------


def test_without_a_draft_it_says_what_to_do_and_takes_the_marked(models):
    async def story(pilot):
        app = pilot.app
        await stage.library(pilot)
        await presses(pilot, "3")
        await stage.sees(pilot, "Nothing is mixed yet", "press a")
        await presses(pilot, "up p s n i y")
        paths = tuple(models / f"{name}.safetensors" for name in ("apple", "plum"))
        app.edit(replace(app.workspace, marked=paths))
        await stage.sees(pilot, "2 models marked")
        await presses(pilot, "a")
        await stage.sees(pilot, "weighted_sum", "plum.safetensors")
        assert bars(app).has_focus
        await presses(pilot, "z")
        await stage.sees(pilot, "Nothing is mixed yet")

    stage.play(story)


def test_a_mistake_in_the_text_is_told_with_its_line(models):
    async def story(pilot):
        app = pilot.app
        text = app.workspace.draft.text.replace("alpha", "alpah")
        app.edit(replace(app.workspace, draft=Draft(text)))
        await stage.sees(pilot, "The recipe has a mistake", "line 11:", 'did you mean "alpha"', "Recipe screen (4)")
        app.edit(replace(app.workspace, draft=Draft(text.replace("alpah", "alpha"))))
        await stage.sees(pilot, "alpha at base: 0.5")

    mixing(models, story)


def test_weights_that_do_not_fit_the_family_are_told(models):
    async def story(pilot):
        app = pilot.app
        twenty = "alpha = [" + ", ".join(["0.5"] * 20) + "]"
        app.edit(replace(app.workspace, draft=Draft(app.workspace.draft.text.replace("alpha = 0.5", twenty))))
        await stage.sees(pilot, "weights for 19 blocks, but sd1 has 25")
        await presses(pilot, "up p y v x c i")  # nothing to do, nothing raised

    mixing(models, story)


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (40, 10), (200, 60)])
def test_any_terminal_will_do(models, size):
    async def story(pilot):
        pilot.app.mix([models / "apple.safetensors", models / "plum.safetensors"])
        await stage.until(pilot, lambda: pilot.app.screen.query(BlockBars) and bars(pilot.app).numbers)
        await presses(pilot, "right up p escape tab tab n escape")
        assert step(pilot.app)["alpha"] == {"default": 0.5, "IN00": 0.55}

    stage.play(story, size)


def test_bars_are_drawn_in_ascii_where_the_locale_has_nothing_else(monkeypatch):
    numbers = mk.block_weights({"preset": "GRAD_V", "base": 0.5}, "sd1")
    monkeypatch.delenv("LC_CTYPE", raising=False)
    for locale, is_ascii in (("C", True), ("POSIX", True), ("de_DE.ISO-8859-1", True), ("en_US.UTF-8", False)):
        monkeypatch.setenv("LC_ALL", locale)
        text = bars_text(numbers, width=78, height=10, cursor="IN00").plain
        assert text.isascii() is is_ascii
        assert max(map(len, text.splitlines())) == 78
        assert len(text.splitlines()) == 10
    monkeypatch.delenv("LC_ALL")
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")  # Python's own, in a locale of C
    monkeypatch.setenv("LANG", "C")
    assert glyphs.glyphs() is glyphs.ASCII


def test_higher_numbers_have_higher_bars():
    numbers = mk.block_weights({"weights": [0.0, *[index / 24 for index in range(25)]]}, "sd1")
    lines = bars_text(numbers, width=78, height=12).plain.splitlines()[1:-3]
    heights = [sum(line[3 * column] != " " for line in lines) for column in range(26)]
    assert heights[1:] == sorted(heights[1:])
    assert (heights[0], heights[-1]) == (0, 8)


@pytest.mark.parametrize(
    ("number", "two", "four"), [(0, "0", "0.00"), (0.05, "05", "0.05"), (0.999, "1", "1.00"), (-0.5, "-0", "-0.5")]
)
def test_numbers_fit_their_cells(number, two, four):
    assert (short_number(number, 2), short_number(number, 4)) == (two, four)
    assert len(short_number(number, 3)) <= 3


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen(models, size):
    async def story(pilot):
        await presses(pilot, "n", "add_difference")
        await presses(pilot, "p", "GRAD_V")
        await presses(pilot, "right right right up space right right")
        await pilot.pause(0.3)
        await stage.looks(pilot, f"mix-{size[0]}x{size[1]}")

    mixing(models, story, size, ("apple", "[b] pear", "plum"))
