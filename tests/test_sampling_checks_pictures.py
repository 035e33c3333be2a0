"""Black, flat, grey, burnt and noisy pictures, by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.sampling.checks import check_pictures
from mergekit_sd.sampling.checks.pictures import look
from mergekit_sd.sampling.checks.thresholds import NOISE_VISIBLE
from mergekit_sd.sampling.values import Check, Picture, Pixels, Settings

SIDE = 48


def drawing(seed: int = 0) -> Pixels:
    """Soft colours with a disc, as photographs and drawings have them."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    shift = np.random.default_rng(seed).uniform(0, 40)
    picture = np.stack([40 + 120 * x + shift, 60 + 120 * y, 200 - 150 * x * y], axis=2)
    picture[np.hypot(x - 0.5, y - 0.5) < 0.25] = (220, 40, 50)
    return picture.clip(0, 255).astype(np.uint8)


def picture(pixels: Pixels, model: str = "mix", prompt: str = "a cat", seed: int = 0) -> Picture:
    return Picture(model, Settings(prompt), seed, pixels)


def looked(pixels: Pixels, parent: Pixels | None = None, **options) -> dict[str, Check]:
    parents = [] if parent is None else [picture(parent, "anime")]
    return {each.name: each for each in check_pictures("mix", [picture(pixels)], parents, **options)}


def levels(checks: dict[str, Check]) -> dict[str, str]:
    return {name: each.level for name, each in checks.items() if each.level != "ok"}


def grey(pixels: Pixels) -> Pixels:
    bright = pixels.mean(axis=2, keepdims=True)
    return (bright + 0.25 * (pixels - bright) + 0.5 * (128 - bright)).clip(0, 255).astype(np.uint8)


def burnt(pixels: Pixels) -> Pixels:
    return ((pixels.astype(float) - 110) * 6 + 110).clip(0, 255).astype(np.uint8)


def test_a_picture_as_its_parents_is_all_well():
    checks = looked(drawing(), drawing(1))
    assert levels(checks) == {}
    assert set(checks) == {"black", "flat", "noise", "grey", "burnt"}
    assert {each.heading for each in checks.values()} == {"looks"}


def test_no_pictures_no_checks():
    assert check_pictures("mix", []) == ()


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (np.zeros((SIDE, SIDE, 3), np.uint8), "black"),
        (np.full((SIDE, SIDE, 3), (90, 40, 30), np.uint8), "flat"),
        (np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8), "noise"),
    ],
)
@pytest.mark.parametrize("parent", [None, drawing()])
def test_what_is_certain_fails_with_and_without_parents(pixels, name, parent):
    assert levels(looked(pixels, parent)) == {name: "failed"}


def test_grey_and_burnt_take_parents_to_tell():
    assert levels(looked(grey(drawing()))) == {}
    assert levels(looked(grey(drawing()), drawing())) == {"grey": "warning"}
    assert levels(looked(burnt(drawing()))) == {}
    assert levels(looked(burnt(drawing()), drawing())) == {"burnt": "warning"}


def test_grey_names_the_mixed_vaes_where_they_were_mixed():
    plain = looked(grey(drawing()), drawing())["grey"].message
    mixed = looked(grey(drawing()), drawing(), mixed_vae=True)["grey"].message
    assert "mixes VAEs" in mixed
    assert "mixes" not in plain
    assert plain.startswith("The picture of mix is far greyer than the parents'")


def test_parents_that_are_grey_themselves_accuse_nobody():
    lead = np.repeat(drawing().mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    assert levels(looked(lead, lead)) == {}


def test_speckles_are_noise_beside_the_parents_only():
    speckled = drawing().astype(float) + np.random.default_rng(0).normal(0, 12, (SIDE, SIDE, 1))
    speckled = speckled.clip(0, 255).astype(np.uint8)
    assert levels(looked(speckled)) == {}
    found = looked(speckled, drawing())
    assert levels(found) == {"noise": "warning"}
    assert found["noise"].message.startswith("The picture of mix is far grainier than the parents'; ")


def test_fine_stripes_are_texture():
    smooth = np.broadcast_to(np.linspace(20, 200, SIDE)[:, None, None], (SIDE, SIDE, 3))
    striped = smooth + 24.0 * (np.arange(SIDE) % 4 == 0)[None, :, None]
    assert look(striped.astype(np.uint8)).fine > NOISE_VISIBLE
    assert levels(looked(striped.astype(np.uint8), smooth.astype(np.uint8))) == {}


@pytest.mark.parametrize(("black", "words"), [(1, "1 of 2 pictures of mix is"), (2, "All 2 pictures of mix are")])
def test_pictures_are_counted_in_words(black, words):
    mine = [picture(np.zeros((SIDE, SIDE, 3), np.uint8) if n < black else drawing(), seed=n) for n in range(2)]
    assert check_pictures("mix", mine)[0].message.startswith(f"{words} black; ")


def test_only_the_parents_picture_of_the_same_prompt_and_seed_counts():
    other = [picture(drawing(), "anime", seed=1), picture(drawing(), "anime", "a dog")]
    assert {each.level for each in check_pictures("mix", [picture(grey(drawing()))], other)} == {"ok"}


def test_one_grey_picture_of_three_is_chance_one_black_is_not():
    parents = [picture(drawing(), "anime", seed=seed) for seed in range(3)]
    mine = [picture(grey(drawing()) if seed == 0 else drawing(), seed=seed) for seed in range(3)]
    checks = {each.name: each for each in check_pictures("mix", mine, parents)}
    assert levels(checks) == {}
    assert "Only 1 of 3 pictures of mix looks far greyer" in checks["grey"].message
    mine[0] = picture(np.zeros((SIDE, SIDE, 3), np.uint8))
    black = check_pictures("mix", mine, parents)[0]
    assert (black.level, black.figures) == ("failed", {"pictures": 3.0, "found": 1.0})
    assert black.message.startswith("1 of 3 pictures of mix is black")


@given(st.integers(0, 2**32), st.floats(0, 60))
def test_white_noise_has_five_quarters_of_its_variance_between_neighbours(seed, spread):
    random = np.random.default_rng(seed)
    bright = random.normal(128, 10 + spread, (64, 64, 1)).clip(0, 255).astype(np.uint8)
    assert look(np.repeat(bright, 3, axis=2)).noise == pytest.approx(1.25, rel=0.12)
