"""What a prompt says: emphasis, schedules, AND, network tags. Tables worked out by hand from the rules, and laws."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergekit_sd.errors import RecipeError
from mergekit_sd.sampling.prompts.parse import parse
from mergekit_sd.sampling.prompts.schedule import parts_of, steps_of
from mergekit_sd.sampling.prompts.tags import HypernetTag, take_tags

MARKS = st.text(alphabet="()[]:|\\<>. ,19ab\n", max_size=40)
ANY = st.one_of(MARKS, st.text(max_size=40))


# --- emphasis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", []),
        ("plain words", [("plain words", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a [minor] word", [("a ", 1), ("minor", 1 / 1.1), (" word", 1)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: +.5 )", [("x", 0.5)]),
        ("(x:-1)", [("x", -1)]),
        ("((a) b:2) c", [("a", 2.2), (" b", 2), (" c", 1)]),
        ("(((a", [("a", 1.1**3)]),
        ("([a", [("a", 1)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"(a\):2)", [("a)", 2)]),
        (r"a\b", [("ab", 1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("()", []),
        ("(a::1.5)", [("a:", 1.5)]),
    ],
)
def test_weights(text, spans):
    (section,) = parse(text)
    assert [span.text for span in section] == [each for each, _ in spans]
    assert [span.weight for span in section] == pytest.approx([weight for _, weight in spans])


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("BREAK a", [[], ["a"]]),
        ("a\nBREAK\nBREAK", [["a"], [], []]),
        ("BREAKING aBREAK break BREAK_", [["BREAKING aBREAK break BREAK_"]]),
        ("(a BREAK b:1.2) c", [["a"], ["b", " c"]]),
    ],
)
def test_breaks(text, sections):
    assert [[span.text for span in section] for section in parse(text)] == sections


def test_a_bracket_around_a_break_weighs_both_sides():
    assert [[span.weight for span in section] for section in parse("(a BREAK b:1.2)")] == [[1.2], [1.2]]


@given(st.text().filter(lambda text: not re.search(r"\bBREAK\b", text)))
def test_escaped_text_comes_back(text):
    (section,) = parse(re.sub(r"([()\[\]\\])", r"\\\1", text))
    assert [tuple(span) for span in section] == ([(text, 1.0)] if text else [])


@given(st.lists(st.sampled_from("(["), max_size=12))
def test_brackets_that_are_not_closed_count_like_closed_ones(brackets):
    closed = "".join(brackets) + "a" + "".join({"(": ")", "[": "]"}[each] for each in reversed(brackets))
    ((one,),), ((other,),) = parse("".join(brackets) + "a"), parse(closed)
    assert one.weight == pytest.approx(other.weight)
    assert one.weight == pytest.approx(1.1 ** (brackets.count("(") - brackets.count("[")))


@pytest.mark.parametrize("weight", ["1.2.3", ".", "+.", "9" * 400])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(RecipeError, match="is no number") as caught:
        parse(f"words before (a cat:{weight})")
    assert f"{weight[-20:]})" in caught.value.message
    assert parse(f"a cat:{weight})")[0][0].text == f"a cat:{weight})"


def test_too_many_brackets():
    with pytest.raises(RecipeError, match="no finite number"):
        parse("(" * 8000 + "a")


# --- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", [(6, "plain")]),
        ("a [b:3]", [(3, "a "), (6, "a b")]),
        ("a [:b: 3 ]", [(3, "a "), (6, "a b")]),
        ("a [b::3]", [(3, "a b"), (6, "a ")]),
        ("[b:c:0.5]", [(3, "b"), (6, "c")]),
        ("[b:c:.34]", [(2, "b"), (6, "c")]),
        ("[b:c:1.0]", [(6, "b")]),
        ("[b:c:1]", [(1, "b"), (6, "c")]),
        ("[b:c:0]", [(6, "c")]),
        ("[b:c:-1]", [(6, "c")]),
        ("[b:c:60]", [(6, "b")]),
        ("[b:c:" + "9" * 400 + ".5]", [(6, "b")]),
        ("[a|b]", [(1, "a"), (2, "b"), (3, "a"), (4, "b"), (5, "a"), (6, "b")]),
        ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (6, "male")]),
        ("[a:[b:c:0.75]:2] x", [(2, "a x"), (4, "b x"), (6, "c x")]),
        ("[a|[b:c:2]]", [(1, "a"), (2, "b"), (3, "a"), (4, "c"), (5, "a"), (6, "c")]),
        ("[a|b] [c:d:1]", [(1, "a c"), (2, "b d"), (3, "a d"), (4, "b d"), (5, "a d"), (6, "b d")]),
        ("([a:b:3]:1.2)", [(3, "(a:1.2)"), (6, "(b:1.2)")]),
        ("[(a:1.2):b:3]", [(3, "(a:1.2)"), (6, "b")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (6, "((a][:b:c d")]),
        ("a [[[b]]:2]", [(2, "a "), (6, "a [[b]]")]),
        (r"[a\:b:c:3]", [(3, r"a\:b"), (6, "c")]),
        (r"\[a:b:3\]", [(6, r"\[a:b:3\]")]),
        ("[a]", [(6, "[a]")]),
        ("[a:b:c]", [(6, "[a:b:c]")]),
        ("[a:b:c:3]", [(6, "[a:b:c:3]")]),
        ("[a|b:3]", [(6, "[a|b:3]")]),
        ("[a (b:c:3]", [(6, "[a (b:c:3]")]),
        (
            "[a:b:[3|4]]",
            [(1, "[a:b:3]"), (2, "[a:b:4]"), (3, "[a:b:3]"), (4, "[a:b:4]"), (5, "[a:b:3]"), (6, "[a:b:4]")],
        ),
    ],
)
def test_schedules(text, expected):
    assert steps_of(text, 6) == tuple(expected)


@given(ANY, st.integers(1, 12))
def test_a_schedule_covers_the_steps(text, steps):
    found = steps_of(text, steps)
    lasts = [last for last, _ in found]
    assert lasts == sorted(set(lasts))
    assert lasts[-1] == steps
    assert all(one != two for (_, one), (_, two) in itertools.pairwise(found))
    if not re.search(r"[:|]", text):
        assert found == ((steps, text),)


def test_depth_is_no_matter():
    text = "[" * 3000 + "a" + ":1]" * 3000
    assert steps_of(text, 2) == ((1, ""), (2, "a"))


# --- AND -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :1.2 AND a dog AND a fox :2", [("a cat", 1.2), (" a dog ", 1), (" a fox", 2)]),
        ("a:-.5 AND b: +1. ", [("a", -0.5), (" b", 1)]),
        ("(a:1.2) AND b", [("(a:1.2) ", 1), (" b", 1)]),
        ("ANDROID and BAND", [("ANDROID and BAND", 1)]),
        (" AND ", [(" ", 1), (" ", 1)]),
        ("16:9", [("16", 9)]),
        ("a:b", [("a:b", 1)]),
    ],
)
def test_parts(text, parts):
    assert parts_of(text) == tuple(parts)


def test_a_weight_of_a_part_that_is_too_large():
    with pytest.raises(RecipeError, match='weight of "a cat" is too large'):
        parts_of("a cat:" + "9" * 400)


# --- tags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "encoder", "unet"),
    [
        ("<lora:a b>", 1, 1),
        ("<lora:a b:0.5>", 0.5, 0.5),
        ("<lora:a b:0.5:0.8>", 0.5, 0.8),
        ("<lora:a b:te=0>", 0, 0),
        ("<lora:a b:unet=0.3>", 1, 0.3),
        ("<lora:a b:0.5:unet=-1>", 0.5, -1),
        ("<lyco:a b:2>", 2, 2),
    ],
)
def test_loras(tag, encoder, unet):
    found = take_tags(f"a {tag}, cat")
    assert found.text == "a , cat"
    ((use),) = found.loras
    assert (use.lora, use.text_encoder, use.text_encoder_2, use.strength) == ("a b", encoder, encoder, unet)


def test_tags_keep_their_order_and_the_text():
    found = take_tags("<hypernet:x><lora:b>1 < 2 <3 <|a|> <foo:bar<lora:a> <hypernet:y:-.5>")
    assert found.text == "1 < 2 <3 <|a|> <foo:bar "
    assert [use.lora for use in found.loras] == ["b", "a"]
    assert found.hypernets == (HypernetTag("x"), HypernetTag("y", -0.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<lora:a", '"<lora:a" is not closed'),
        ("<lora:a <hypernet:b>", '"<lora:a " is not closed'),
        ("<lora:>", '"<lora:>" is no LoRA'),
        ("<lora:a:much>", '"much" in "<lora:a:much>" is no number'),
        ("<lora:a:1:2:3>", "more than a LoRA takes"),
        ("<lora:a:x=1>", "more than a LoRA takes"),
        ("<hypernet:>", '"<hypernet:>" is no hypernetwork'),
        ("<hypernet:a:>", '"<hypernet:a:>" is no hypernetwork'),
        ("<hypernet:a:1:2>", "is no hypernetwork"),
        ("<hypernet:a:1e999>", "is no hypernetwork"),
        ("<laro:a:1>", '"<laro:a:1>" is a tag of an unknown kind'),
    ],
)
def test_tags_that_are_refused(text, said):
    with pytest.raises(RecipeError) as caught:
        take_tags(f"a cat {text}")
    assert said in caught.value.message
    assert caught.value.hint


# --- everything at once ----------------------------------------------------------------------------------


@given(ANY)
@example("(:.)")
@example("[[:1][|]")
@example("<lora:[a|b]:1>")
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(RecipeError):
        for part, _ in parts_of(take_tags(text).text):
            for _, each in steps_of(part, 3):
                assert parse(each)
