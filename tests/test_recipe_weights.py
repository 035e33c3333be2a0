"""Weights per block: every form, every refusal, and the precedence against a slow plain reference."""

from __future__ import annotations

import fnmatch
import json
import math
import time
from dataclasses import dataclass, field

import pytest
import xxhash
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mergekit_sd.errors import RecipeError
from mergekit_sd.recipe.positions import Where, scan
from mergekit_sd.recipe.presets import PRESETS, SD_BLOCKS, preset
from mergekit_sd.recipe.weights import BlockWeights, parse_weights

SDXL_BLOCKS = (*SD_BLOCKS[:9], "M00", *SD_BLOCKS[13:22])


@dataclass(frozen=True)
class FakePlace:
    component: str | None
    block: str | None = None


@dataclass(frozen=True)
class FakeArchitecture:
    name: str
    family: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class FakeLayout:
    architecture: FakeArchitecture | None
    places: dict[str, FakePlace] = field(default_factory=dict)

    @property
    def names(self):
        return list(self.places)


def make_layout(name, family, blocks, encoders, per_block=3):
    places = {}
    for block in blocks:
        for index in range(per_block):
            part = ("attn1.to_q", "attn2.to_k", "norm")[index % 3]
            places[f"model.diffusion_model.{block.lower()}.{index // 3}.{part}.weight"] = FakePlace("unet", block)
    places["model.diffusion_model.time_embed.0.weight"] = FakePlace("unet", "IN00")
    for number, encoder in enumerate(encoders):
        for index in range(per_block):
            places[f"conditioner.{number}.layers.{index}.mlp.weight"] = FakePlace(encoder)
    for index in range(per_block):
        places[f"first_stage_model.decoder.{index}.norm.weight"] = FakePlace("vae")
    return FakeLayout(FakeArchitecture(name, family, blocks), places)


SD1 = make_layout("sd1", "sd1", SD_BLOCKS, ["text_encoder"])
SD2 = make_layout("sd2", "sd2", SD_BLOCKS, ["text_encoder"])
SDXL = make_layout("sdxl", "sdxl", SDXL_BLOCKS, ["text_encoder", "text_encoder_2"])
UNKNOWN = FakeLayout(None, {f"blocks.{i}.{part}.weight": FakePlace(None) for i in range(4) for part in ("q", "k")})
WHERE = Where("r.toml", ("steps", "mix", "alpha"))


def parse(value, low=0.0, high=1.0, extrapolate=False):
    return parse_weights(value, where=WHERE, low=low, high=high, extrapolate=extrapolate)


def refused(value, **options):
    with pytest.raises(RecipeError) as caught:
        parse(value, **options)
    error = caught.value
    assert (error.exit_code, error.file) == (2, "r.toml")
    assert error.key.startswith("steps.mix.alpha")
    return error


def unresolved(value, layout, names=None):
    with pytest.raises(RecipeError) as caught:
        parse(value).resolve(layout, layout.names if names is None else names)
    assert caught.value.exit_code == 2
    assert caught.value.file == "r.toml"
    assert caught.value.key.startswith("steps.mix.alpha")
    return caught.value


# --- forms -----------------------------------------------------------------------------------------

NUMBERS = [0.25, *(round(i / 25, 2) for i in range(25))]


def test_a_number():
    assert parse(0.5).resolve(SD1, SD1.names) == dict.fromkeys(SD1.names, 0.5)
    assert parse(1) == parse(1.0) == parse({"default": 1}) == BlockWeights.constant(1)
    assert math.copysign(1, parse(-0.0).describe()) == 1
    assert list(parse(1).resolve(SD1, SD1.names[::-1])) == SD1.names[::-1]


@pytest.mark.parametrize("form", [NUMBERS, ", ".join(map(str, NUMBERS)), ",".join(map(str, NUMBERS)) + ",\n"])
def test_arrays_and_pasted_strings(form):
    resolved = parse(form).resolve(SD1, SD1.names)
    for name, place in SD1.places.items():
        expected = NUMBERS[1 + SD_BLOCKS.index(place.block)] if place.block else 0.25
        assert resolved[name] == expected


def test_arrays_without_base_have_base_0():
    assert parse(NUMBERS[1:]) == parse([0, *NUMBERS[1:]])
    twenty = NUMBERS[:20]
    assert parse(twenty[1:]) == parse([0, *twenty[1:]])
    resolved = parse(twenty).resolve(SDXL, SDXL.names)
    for name, place in SDXL.places.items():
        assert resolved[name] == (twenty[1 + SDXL_BLOCKS.index(place.block)] if place.block else 0.25)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_on_both_families(name):
    base, values = preset(name)
    numbers = dict(zip(SD_BLOCKS, values, strict=True))
    for layout in (SD1, SDXL):
        resolved = parse(name).resolve(layout, layout.names)
        assert resolved == {key: numbers[place.block] if place.block else base for key, place in layout.places.items()}
    assert parse(name) == parse({"preset": name.lower()})
    assert parse(name).describe() == name


def test_describe_is_plain_and_stable():
    table = {"OUT05": 1, "preset": "grad_v", "base": 0.5}
    weights = parse(table)
    assert weights == parse(dict(reversed(table.items())))
    assert weights.describe() == {"preset": "GRAD_V", "OUT05": 1.0, "base": 0.5}
    for value in (0.5, NUMBERS, "GRAD_V", table, {"default": 0.5}):
        described = parse(value).describe()
        assert parse(json.loads(json.dumps(described))) == parse(value)
        assert hash(parse(described)) == hash(parse(value))
    assert parse(0.5).describe() == 0.5
    assert parse({"base": 0.5}).describe() == {"base": 0.5}


def test_a_list_in_a_table():
    table = {"weights": NUMBERS, "OUT05": 1, "base": 0.5}
    resolved = parse(table).resolve(SD1, SD1.names)
    for name, place in SD1.places.items():
        expected = 1 if place.block == "OUT05" else NUMBERS[1 + SD_BLOCKS.index(place.block)] if place.block else 0.5
        assert resolved[name] == expected
    assert parse(table).describe() == {"weights": NUMBERS, "OUT05": 1.0, "base": 0.5}
    assert parse({"weights": NUMBERS}) == parse(NUMBERS) == parse({"weights": ",".join(map(str, NUMBERS))})
    assert parse({"weights": NUMBERS[1:]}) == parse(NUMBERS[1:])
    assert parse({"weights": NUMBERS}).describe() == NUMBERS


# --- random numbers --------------------------------------------------------------------------------


def drawn(seed, name, block, low, high):
    """The contract: three decimals of low to high, by a hash of the text seed/name/block."""
    return round(low + (high - low) * xxhash.xxh3_64_intdigest(f"{seed}/{name}/{block}".encode()) / 2**64, 3)


@pytest.mark.parametrize("layout", [SD1, SDXL])
def test_random_numbers_by_block(layout):
    resolved = parse({"random": [0.2, 0.8]}).resolve(layout, layout.names, seed=7)
    assert resolved == {
        name: drawn(7, "alpha", place.block or "base", 0.2, 0.8) for name, place in layout.places.items()
    }
    assert len(set(resolved.values())) > 15
    assert all(0.2 <= value <= 0.8 for value in resolved.values())
    some = layout.names[::7]
    assert parse({"random": [0.2, 0.8]}).resolve(layout, some, seed=7) == {name: resolved[name] for name in some}


def test_random_numbers_depend_on_seed_and_parameter():
    random = {"random": [0, 1]}
    first = parse(random).resolve(SD1, SD1.names, seed=3)
    assert parse(random).resolve(SD1, SD1.names, seed=4) != first
    assert parse(random).resolve(SD1, SD1.names) == parse(random).resolve(SD1, SD1.names, seed=0)
    assert parse(random | {"seed": 3}).resolve(SD1, SD1.names, seed=4) == first
    beta = parse_weights(random, where=Where("r.toml", ("steps", "mix", "beta")))
    assert beta.name == "beta"
    assert beta.resolve(SD1, SD1.names, seed=3) != first
    listed = parse_weights(random, where=Where("r.toml", ("steps", "mix", "weights", 1)))
    assert listed.name == "weights.1"
    elsewhere = parse_weights(random, where=Where("r.toml", ("steps", "other", "alpha")))
    assert elsewhere.resolve(SD1, SD1.names, seed=3) == first
    # known answers: recipes in the world depend on them
    assert [first[name] for name in (SD1.names[0], SD1.names[-1])] == [0.532, 0.655]


def test_random_numbers_lie_under_selectors():
    table = {"random": [0.2, 0.8], "seed": 3, "vae": 0, "OUT05": 1}
    resolved = parse(table).resolve(SD1, SD1.names)
    plain = parse({"random": [0.2, 0.8], "seed": 3}).resolve(SD1, SD1.names)
    for name, place in SD1.places.items():
        assert resolved[name] == (0 if place.component == "vae" else 1 if place.block == "OUT05" else plain[name])
    assert parse(table).describe() == {"random": [0.2, 0.8], "seed": 3, "vae": 0.0, "OUT05": 1.0}
    assert parse({"random": [0.2, 0.8]}).describe() == {"random": [0.2, 0.8]}
    assert set(parse({"random": [0.12345, 0.12345]}).resolve(SD1, SD1.names).values()) == {0.12345}
    wide = parse({"random": [-1, 2]}, extrapolate=True).resolve(SD1, SD1.names).values()
    assert min(wide) < 0
    assert max(wide) > 1


# --- refusals of form ------------------------------------------------------------------------------

BAD = {
    "bool": (True, "takes a number, not true", "1.0"),
    "nan": (math.nan, "finite", "0.5"),
    "inf": (-math.inf, "finite", "0.5"),
    "huge": (10**400, "finite", "0.5"),
    "quoted": ("0.5", "takes a number", "write 0.5 without quotes"),
    "quoted_nan": ("nan", "takes a number", "0.5"),
    "nothing": (None, "takes a number, not nothing", "0.5"),
    "unknown_preset": ("GRAD_W", 'no preset "GRAD_W"', '"GRAD_V"'),
    "unlike_any_preset": ("zzzzzz", 'no preset "zzzzzz"', "mergekit-sd presets"),
    "escaped": ("a\x1b", "a\\x1b", "presets"),
    "count": ([0.5] * 12, "12 numbers", "26 numbers (base first) or 25, SDXL 20 or 19"),
    "count_text": ("0,0.1", "2 numbers", "26 numbers"),
    "empty_list": ([], "0 numbers", "26"),
    "high": (1.5, "is 1.5; it must be between 0 and 1", "extrapolate = true"),
    "low": (-0.1, "is -0.1; it must be between 0 and 1", "extrapolate = true"),
    "high_item": ([*NUMBERS[:25], 2], "Item 26 of alpha is 2", "extrapolate = true"),
    "item_text": ("0.1,x" + ",0" * 23, 'Item 2 of alpha is "x"', None),
    "item_nan": ("0.1,nan" + ",0" * 23, 'Item 2 of alpha is "nan"', None),
    "high_text": ("0,2" + ",0" * 23, "Item 2 of alpha is 2", "extrapolate = true"),
    "empty_table": ({}, "empty table", "default = 0.5"),
    "try": ({"try": [0.1, 0.2]}, "only a sweep", "sweep"),
    "try_in_selector": ({"OUT05": {"try": [1]}}, "only a sweep", "one value"),
    "preset_number": ({"preset": 0.5}, "name of a preset", "GRAD_V"),
    "weights_count": ({"weights": [0.5] * 12}, "weights has 12 numbers", "26 numbers"),
    "weights_item": ({"weights": [*NUMBERS[:25], 2]}, "Item 26 of weights is 2", "extrapolate = true"),
    "weights_text": ({"weights": "0.1,x" + ",0" * 23}, 'Item 2 of weights is "x"', None),
    "weights_preset": ({"weights": "GRAD_V"}, "takes a list of numbers", "26 numbers"),
    "two_bases": ({"preset": "GRAD_V", "weights": NUMBERS}, "both preset and weights", "one of the two"),
    "random_and_preset": ({"random": [0, 1], "preset": "GRAD_V"}, "both random and preset", "one of the two"),
    "random_number": ({"random": 0.5}, "takes two numbers", "[0.2, 0.8]"),
    "random_three": ({"random": [0, 0.5, 1]}, "takes two numbers", "[0.2, 0.8]"),
    "random_down": ({"random": [0.8, 0.2]}, "runs from 0.8 down to 0.2", "[0.2, 0.8]"),
    "random_high": ({"random": [0, 2]}, "Item 2 of random is 2", "extrapolate = true"),
    "seed_alone": ({"preset": "GRAD_V", "seed": 3}, "seed is for random weights", "random ="),
    "seed_text": ({"random": [0, 1], "seed": "x"}, "seed takes a whole number", "such as 7"),
    "seed_bool": ({"random": [0, 1], "seed": True}, "seed takes a whole number", "such as 7"),
    "seed_low": ({"random": [0, 1], "seed": -1}, "seed takes a whole number", "such as 7"),
    "seed_big": ({"random": [0, 1], "seed": 2**63}, "seed takes a whole number", "such as 7"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_forms(name):
    value, says, hint = BAD[name]
    error = refused(value)
    assert says in error.message
    assert hint is None or hint in error.hint


BAD_KEYS = {
    "selector_text": ({"OUT05": "0.5"}, "OUT05", "takes a number", "without quotes"),
    "selector_bool": ({"OUT05": True}, "OUT05", "takes a number", "1.0"),
    "selector_high": ({"base": 0.1, "OUT05": 1.5}, "OUT05", '"OUT05" is 1.5', "extrapolate = true"),
    "selector_list": ({"OUT05": [1]}, "OUT05", "takes a number, not a list", "0.5"),
    "nested": ({"OUT05": {"attn2": 1}}, "OUT05.attn2", "Without quotes", '"OUT05.attn2" in quotes'),
    "nested_deep": ({"a": {"b": {"c": 1}}}, "a.b.c", "Without quotes", '"a.b.c" in quotes'),
    "nested_two": ({"OUT05": {"attn1": 1, "attn2": 1}}, "OUT05", "takes a number, not a table", None),
    "typo": ({"defualt": 1}, "defualt", "not a selector", '"default"'),
    "block": ({"OUT5": 1}, "OUT5", "not a block", '"OUT05"'),
    "backwards": ({"IN05-IN00": 1}, "IN05-IN00", "backwards", '"IN00-IN05"'),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_selectors(name):
    value, key, says, hint = BAD_KEYS[name]
    error = refused(value)
    assert error.key == f"steps.mix.alpha.{key}"
    assert says in error.message
    assert hint is None or hint in error.hint


def test_places_of_refusals():
    text = "[steps.mix]\nalpha = { base = 1,\tOUT05.attn2 = 1 }\nbeta = [\n  0,\n  x, 0]"
    where = Where("r.toml", ("steps", "mix"), scan(text))
    with pytest.raises(RecipeError) as caught:
        parse_weights({"base": 1, "OUT05": {"attn2": 1}}, where=where.at("alpha"))
    assert (caught.value.line, caught.value.column) == (2, 27)
    with pytest.raises(RecipeError) as caught:
        parse_weights([0.0, math.nan, *[0] * 24], where=where.at("beta"))
    assert (caught.value.line, caught.value.column, caught.value.key) == (5, 3, "steps.mix.beta.1")


def test_bounds_and_extrapolation():
    assert parse(1.5, extrapolate=True).describe() == 1.5
    assert parse(1e9, low=None, high=None).describe() == 1e9
    assert "at least 1" in refused(0.5, low=1.0, high=None).message
    assert "at most 1" in refused(2, low=None, high=1.0).message
    assert "ALL_B" in refused("ALL_B", high=0.5).message
    assert "finite" in refused(math.inf, extrapolate=True).message


# --- refusals of matching --------------------------------------------------------------------------


def test_a_wrong_count_names_what_was_expected():
    error = unresolved(NUMBERS, SDXL)
    assert "25 blocks, but sdxl has 19" in error.message
    assert error.hint == "sdxl takes 20 numbers (base first) or 19"
    error = unresolved(NUMBERS[:19], SD1)
    assert "19 blocks, but sd1 has 25" in error.message
    assert error.hint == "sd1 takes 26 numbers (base first) or 25"


def test_a_selector_that_matches_nothing():
    error = unresolved({"default": 0, "OUT09": 1, "IN07-IN09": 1}, SDXL)
    assert error.message == '"IN07-IN09", "OUT09" match no tensor.'
    assert error.details == ("IN07-IN09", "OUT09")
    assert "OUT08" in error.hint
    error = unresolved({"default": 0, "clip_l": 1}, SD2)
    assert error.message == '"clip_l" matches no tensor.'
    assert "text_encoder, unet, vae" in error.hint
    assert error.key == "steps.mix.alpha.clip_l"
    assert "matches no" in unresolved({"default": 0, "clip_g": 1}, SD1).message
    assert "matches no" in unresolved({"default": 0, "*.nothing": 1}, SD1).message
    assert "matches no" in unresolved({"default": 0, "OUT05.zzz": 1}, SD1).message
    error = unresolved({"default": 0, "first_stage_model.decoder.0.nrm.weight": 1}, SD1)
    assert '"first_stage_model.decoder.0.norm.weight"' in error.hint
    # one that matches only what more specific ones take has matched
    assert parse({"default": 0, "M00": 0.5, "M00.weight": 1}).resolve(SD1, SD1.names)


def test_a_tensor_that_nothing_matches():
    error = unresolved({"unet": 0.5, "vae": 0.5}, SD1)
    assert error.message.startswith("No weight for 3 tensors: conditioner.0")
    assert len(error.details) == 3
    assert "default" in error.hint
    assert parse({"unet": 0.5, "base": 0}).resolve(SD1, SD1.names)


def test_two_selectors_of_one_rank():
    error = unresolved({"default": 0, "IN00-IN05": 0.1, "IN05-IN08": 0.2}, SD1)
    assert error.message == '"IN00-IN05" and "IN05-IN08" give 3 tensors different values.'
    assert len(error.details) == 3
    assert error.key == "steps.mix.alpha.IN05-IN08"
    assert parse({"default": 0, "IN00-IN05": 0.1, "IN05-IN08": 0.1}).resolve(SD1, SD1.names)
    # a more specific word settles it
    assert parse({"default": 0, "IN00-IN05": 0.1, "IN05-IN08": 0.2, "IN05": 1}).resolve(SD1, SD1.names)
    assert "different" in unresolved({"default": 0, "*attn*": 0.1, "*.weight": 0.2}, SD1).message


def test_an_unknown_layout_takes_numbers_globs_and_names():
    names = UNKNOWN.names
    resolved = parse({"default": 0.5, "*.q.weight": 1, names[0]: 0}).resolve(UNKNOWN, names)
    assert resolved[names[0]] == 0
    assert resolved[names[1]] == 0.5
    assert resolved[names[2]] == 1
    assert set(parse(0.3).resolve(UNKNOWN, names).values()) == {0.3}
    some = {"random": [0, 1]}, {"default": 0, "elemental": ":q:1"}
    for value in (
        NUMBERS,
        "GRAD_V",
        *some,
        {"default": 0, "base": 1},
        {"default": 0, "OUT05": 1},
        {"default": 0, "M00.q": 1},
    ):
        error = unresolved(value, UNKNOWN)
        assert "needs a known architecture" in error.message
        assert "globs" in error.hint
    assert "matches no" in unresolved({"default": 0, "vae": 1}, UNKNOWN).message


def test_nothing_to_weigh():
    assert parse(0.5).resolve(SD1, []) == {}
    assert parse("GRAD_V").resolve(SD1, []) == {}


# --- precedence ------------------------------------------------------------------------------------


def word_level(key, place, layout):
    two = any(each.component == "text_encoder_2" for each in layout.places.values())
    matches = {
        "clip_g": place.component == "text_encoder_2",
        "clip_l": place.component == "text_encoder" and (two or layout.architecture.family == "sd1"),
        "text_encoder": place.component in ("text_encoder", "text_encoder_2"),
        "vae": place.component == "vae",
        "unet": place.component == "unet",
        "base": place.component != "unet",
        "preset": True,
        "default": True,
    }
    ranks = {"clip_g": 4, "clip_l": 4, "text_encoder": 3, "vae": 3, "unet": 2, "base": 2, "preset": 1, "default": 0}
    return ranks[key] if matches[key] else None


def level(key, name, layout):
    """How specific a key is for a tensor, or None where it does not mean it."""
    place, order = layout.places[name], list(layout.architecture.blocks)
    if key in layout.places:
        return 9 if key == name else None
    if any(c in key for c in "*?["):
        return 8 if fnmatch.fnmatchcase(name, key) else None
    if not key.startswith(("IN", "M0", "OUT")):
        return word_level(key, place, layout)
    head, _, part = key.partition(".")
    first, _, last = head.partition("-")
    inside = place.block in order[order.index(first) : order.index(last or first) + 1]
    return (7 if part else 5 if "-" in key else 6) if inside and part in name else None


def reference(table, layout, name):
    """The contract, read aloud: the value of one tensor, or "clash", or None."""
    levels = [(level(key, name, layout), key) for key in table if level(key, name, layout) is not None]
    if not levels:
        return None
    best = max(levels)[0]
    if best == 1:
        base, values = preset(table["preset"])
        block = layout.places[name].block
        return dict(zip(SD_BLOCKS, values, strict=True))[block] if block else base
    found = {table[key] for rank, key in levels if rank == best}
    return found.pop() if len(found) == 1 else "clash"


def keys_for(layout):
    order = layout.architecture.blocks
    block = st.sampled_from(order)
    span = st.tuples(block, block).map(lambda ends: "-".join(sorted(ends, key=order.index)))
    part = st.tuples(block | span, st.sampled_from(["attn1", "attn2.to_k", "norm", "weight"])).map(".".join)
    globs = st.sampled_from(["*.attn1.*", "*norm.weight", "model.*", "*.[01].*", "conditioner.?.layers.1.*"])
    words = ["default", "unet", "base", "text_encoder", "vae", "clip_l"] + ["clip_g"] * (layout is SDXL)
    return st.sampled_from(words) | block | span | part | globs | st.sampled_from(layout.names)


tables = st.sampled_from([SD1, SDXL]).flatmap(
    lambda layout: st.tuples(
        st.just(layout),
        st.dictionaries(keys_for(layout), st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=8),
        st.none() | st.sampled_from(PRESETS),
    )
)


@given(tables)
@example((SD1, {"default": 0.0, "base": 1.0, "vae": 0.25, "clip_l": 0.0, "M00": 1.0}, "GRAD_V"))
def test_precedence(case):
    layout, table, chosen = case
    table = table | ({"preset": chosen} if chosen else {})
    expected = {name: reference(table, layout, name) for name in layout.names}
    weights = parse(table)
    try:
        resolved = weights.resolve(layout, layout.names)
    except RecipeError as error:
        resolved = error
    if "clash" in expected.values():
        assert isinstance(resolved, RecipeError)
        assert "different values" in resolved.message
        return
    assume(not (isinstance(resolved, RecipeError) and "no tensor" in resolved.message))
    if None in expected.values():
        assert isinstance(resolved, RecipeError)
        assert list(resolved.details) == [name for name, value in expected.items() if value is None]
    else:
        assert resolved == expected


@pytest.mark.parametrize(("blocks", "encoders", "per_block"), [(SD_BLOCKS, 1, 40), (SDXL_BLOCKS, 2, 110)])
def test_whole_models_are_fast(blocks, encoders, per_block):
    layout = make_layout("x", "sd1", blocks, ["text_encoder", "text_encoder_2"][:encoders], per_block)
    names = layout.names
    assert len(names) > 1000
    table = {"preset": "GRAD_V", "base": 0.5, "vae": 0, "clip_l": 0.1, "OUT05": 1, "OUT03-OUT05": 0.8}
    table |= {"OUT05.attn2": 1, "IN00-IN05.attn1": 0.2, "*.attn1.to_q.weight": 0.3, "*.norm.*": 0.4, names[3]: 0}
    weights = parse(table)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        weights.resolve(layout, names)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02
