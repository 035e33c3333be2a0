"""The contact sheet: its cells are the pictures, its names can be read, it stays of a size that opens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sampling_reports import hostile, picture, report

from mergekit_sd.sampling import lettering
from mergekit_sd.sampling.groups import groups
from mergekit_sd.sampling.lettering import fitting, in_lines
from mergekit_sd.sampling.parameters import image_bytes
from mergekit_sd.sampling.sheet import LARGEST, layout, sheet, shown_size
from mergekit_sd.sampling.values import SamplingReport, Settings


def made_of(pictures):
    models = tuple(dict.fromkeys(each.model for each in pictures))
    return SamplingReport("A sheet", None, models, (), tuple(pictures))


def cell(image, corner, size):
    return np.asarray(image)[corner[1] : corner[1] + size[1], corner[0] : corner[0] + size[0]]


@pytest.mark.parametrize("made", [report(), report(seeds=(3,)), report(prompts=("", "b", "c")), hostile()])
def test_every_cell_is_its_picture_whole_times_larger(made):
    image = sheet(made)
    found = groups(made)
    plan = layout(found)
    assert image.mode == "RGB"
    seen = 0
    for place, group in enumerate(found):
        for row, model in enumerate(group.models):
            for column, seed in enumerate(group.settings.seeds):
                pixels = group.pictures[model, seed].pixels
                there = cell(image, plan.corner(place, row, column), (256, 256))
                assert np.array_equal(there, np.kron(pixels, np.ones((32, 32, 1), np.uint8)))
                seen += 1
    assert seen == len(made.pictures)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (256, 256)), ((100, 50), (200, 100)), ((300, 200), (300, 200)), ((512, 768), (256, 384))],
)
def test_small_pictures_are_enlarged_and_large_ones_reduced(size, expected):
    made = picture(settings=Settings("a"), width=size[0], height=size[1])
    assert shown_size(made) == expected
    image = sheet(made_of([made]))
    there = cell(image, layout(groups(made_of([made]))).corner(0, 0, 0), expected)
    way = Image.Resampling.LANCZOS if expected < size else Image.Resampling.NEAREST
    assert np.array_equal(there, np.asarray(Image.fromarray(made.pixels).resize(expected, way)))


@given(st.integers(1, 900), st.integers(1, 900), st.integers(64, 384))
def test_a_shown_picture_keeps_its_shape_within_the_limit(width, height, most):
    found = shown_size(picture(width=width, height=height), most)
    assert max(found) <= most
    assert abs(found[0] * height - found[1] * width) <= max(width, height)


@pytest.mark.parametrize("width", [64, 512])
def test_twenty_models_by_twenty_seeds_stay_under_the_limit(width):
    one = picture(width=width, height=width).pixels
    settings = Settings("a", seeds=tuple(range(20)))
    plan = layout(
        groups(
            made_of([type(picture())(f"model {n}", settings, seed, one) for n in range(20) for seed in settings.seeds])
        )
    )
    assert max(plan.width, plan.height) <= LARGEST
    assert min(plan.cell) >= 192


def test_a_missing_picture_leaves_an_empty_cell():
    settings = Settings("a", seeds=(0, 1))
    every = [picture("a", 0, settings), picture("a", 1, settings), picture("b", 1, settings)]
    image = sheet(made_of(every))
    plan = layout(groups(made_of(every)))
    inside = cell(image, plan.corner(0, 1, 0), plan.cell)[1:-1, 1:-1]
    assert (inside == inside[0, 0]).all()


def test_a_report_without_pictures_has_a_sheet_with_its_title():
    image = np.asarray(sheet(report(models=())))
    assert len(np.unique(image)) > 2


def test_names_stand_left_of_their_rows():
    image, blank = sheet(report(models=("mmmm",), parents=())), sheet(report(models=("",), parents=()))
    plan = layout(groups(report(models=("mmmm",))))
    left, top = plan.corner(0, 0, 0)
    label = (slice(top, top + 40), slice(0, left - 1))
    assert (np.asarray(image)[label] < 128).any()
    assert not (np.asarray(blank)[label] < 128).any()


def test_letters_that_no_font_has_are_escaped(monkeypatch):
    monkeypatch.setattr(lettering, "FONTS", ())
    assert fitting("plain 水é\x1b", 16)[0] == "plain \\u6c34\\xe9\\x1b"
    assert fitting("a\nb  c", 16)[0] == "a b c"


def test_another_font_is_taken_for_letters_that_it_has(monkeypatch):
    own = fitting("a", 16)[1]
    monkeypatch.setattr(lettering, "_lacking", lambda name, letters: letters if name != "there.ttf" else "")
    monkeypatch.setattr(lettering, "FONTS", ("absent.ttf", "there.ttf"))
    monkeypatch.setattr(lettering, "_font", lambda name, size: None if name == "absent.ttf" else own)
    assert fitting("水", 16) == ("水", own)


@given(st.text("abc -_", max_size=80), st.integers(30, 200), st.integers(1, 4))
def test_lines_fit_and_say_where_something_is_left_out(text, room, lines):
    text, font = fitting(text, 16)
    written = in_lines(text, font, room, lines)
    assert len(written) <= lines
    assert all(font.getlength(line) <= room for line in written)
    joined = "".join(written).replace(" ", "")
    whole = text.replace(" ", "")
    assert joined == whole or (joined.endswith("...") and whole.startswith(joined[:-3]))


def test_the_same_report_gives_the_same_sheet():
    assert image_bytes(sheet(report())) == image_bytes(sheet(report()))
