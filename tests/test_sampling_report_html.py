"""The page: well formed, whole, without a network, and nothing in it is taken for more than text."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from sampling_reports import HOSTILE, PROMPT, hostile, picture, report

from mergekit_sd.sampling.html import as_html
from mergekit_sd.sampling.html.words import fact, number
from mergekit_sd.sampling.parameters import parameters
from mergekit_sd.sampling.values import HEADINGS, Chart, Check, Settings
from mergekit_sd.text import shown

VOID = {"meta", "link", "img", "br", "input"}
ALLOWED_SCRIPTS = 1


class Page(HTMLParser):
    """The page's elements and texts; fails where tags do not balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in {"line"}, tag  # in drawings only
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, *but):
        return "".join(data for tag, data in self.texts if tag not in ("style", "script", *but))


def images(page):
    found = {}
    for attributes in page.every("img"):
        if "data-model" in attributes:
            kind, data = attributes["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                image.load()
                key = attributes["data-model"], attributes["data-shot"]
                assert key not in found
                found[key] = np.asarray(image), image.text["parameters"], attributes
    return found


REPORTS = {
    "usual": report(),
    "hostile": hostile(),
    "one seed": report(seeds=(3,)),
    "one model": report(models=("base",), parents=()),
    "empty": report(models=(), recipe=None),
}


@pytest.mark.parametrize("made", REPORTS.values(), ids=REPORTS)
def test_the_page_is_whole_and_needs_no_network(made):
    text = as_html(made)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|[\"'(=]//|@import|url\(", text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for attributes in page.every("a"):
        assert attributes["href"].removeprefix("#") in names
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, names[0]) in names


@pytest.mark.parametrize("made", REPORTS.values(), ids=REPORTS)
def test_the_page_holds_every_picture_once(made):
    found = list(images(Page(as_html(made))).values())
    assert len(found) == len(made.pictures)
    for each in made.pictures:
        [attributes] = [
            how for pixels, text, how in found if text == parameters(each) and np.array_equal(pixels, each.pixels)
        ]
        assert (attributes["width"], attributes["height"]) == ("8", "8")
        assert f"seed {each.seed}" in attributes["alt"]


def test_only_the_pages_own_script_and_style_may_run():
    page = Page(as_html(hostile()))
    [policy] = [each["content"] for each in page.every("meta") if "http-equiv" in each]
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        [text] = [data for inside, data in page.texts if inside == tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert len(page.every("script")) == ALLOWED_SCRIPTS


def test_hostile_texts_are_shown_as_they_are():
    page = Page(as_html(hostile()))
    told = page.text()
    assert shown(HOSTILE) in told
    assert PROMPT in told
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert not [each for each in page.every("img") if each.get("src") == "x"]
    [recipe] = [data for tag, data in page.texts if tag == "code" and data.startswith("#")]
    assert recipe == f"# {PROMPT}\n"


def test_the_same_report_gives_the_same_page():
    assert as_html(hostile()) == as_html(hostile())


def test_every_check_stands_under_its_heading_with_sign_word_and_figures():
    checks = tuple(
        Check(f"{heading} {level}", heading, level, "mix", f"A sentence on {heading}, {level}.", {"share": 0.31415})
        for heading in HEADINGS
        for level in ("ok", "warning", "failed")
    )
    text = as_html(report(checks=checks))
    for heading, title in HEADINGS.items():
        part = text.split(f'id="{heading}"')[1].split('class="heading"')[0]
        assert title in part
        told = Page(f"<div>{part.split('>', 1)[1].split('<section')[0].rsplit('</div>', 1)[0]}</div>").text()
        places = [told.index(f"A sentence on {heading}, {level}.") for level in ("failed", "warning", "ok")]
        assert places == sorted(places)
        for words in ("✕ failed", "▲ warning", "✓ ok", "share0.3141"):
            assert words in told
    assert Page(text).text().count("✓ 1 ok") == 2 * len(HEADINGS)


def test_many_checks_that_are_ok_are_folded_and_others_never():
    checks = tuple(Check(f"check {n}", "sound", "ok", "mix", f"Sentence {n}.") for n in range(13))
    text = as_html(report(checks=(*checks, Check("bad", "sound", "failed", "mix", "Bad."))))
    assert text.index("Bad.") < text.index("13 checks are ok") < text.index("Sentence 0.")
    assert "checks are ok" not in as_html(report(checks=checks[:12]))


def test_without_checks_the_page_says_so():
    assert "Nothing was checked." in as_html(report())
    assert "not checked" in as_html(report(checks=(Check("a", "sound", "ok", "mix", "Well."),)))


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_chart_draws_each_number_in_proportion_and_tells_it(rows):
    blocks = {"IN00": 0.5, "M00": -1.0, "OUT00": 0.25}
    chart = Chart("Drift", "A note.", {f"model {n}": {k: v * (n + 1) for k, v in blocks.items()} for n in range(rows)})
    page = Page(as_html(report(charts=(chart,))))
    bars = [each for each in page.every("rect") if each["class"] in ("bar", "heat", "heat below")]
    assert len(bars) == 3 * rows
    share = [float(each["height"]) if rows < 5 else float(each["fill-opacity"]) for each in bars]
    wanted = np.array([abs(v) for values in chart.values.values() for v in values.values()])
    np.testing.assert_allclose(np.array(share) / max(share), wanted / wanted.max(), atol=0.002)
    lefts = [float(each["x"]) for each in bars[:3]]
    assert lefts == sorted(lefts)
    told = [data for tag, data in page.texts if tag == "title"]
    cells = [data for tag, data in page.texts if tag == "td"]
    for row, values in chart.values.items():
        for block, value in values.items():
            assert f"{row}, {block}: {number(value)}" in told
            assert number(value) in cells


def test_a_bar_below_zero_hangs_from_where_the_others_stand():
    chart = Chart("Drift", "", {"mix": {"a": 1.0, "b": -1.0}})
    up, down = [each for each in Page(as_html(report(charts=(chart,)))).every("rect") if each["class"] == "bar"]
    assert float(up["y"]) + float(up["height"]) == pytest.approx(float(down["y"]))


@pytest.mark.parametrize("values", [{}, {"a": 0.0}, {"a": float("nan")}])
def test_a_chart_of_nothing_is_drawn_without_numbers(values):
    page = Page(as_html(report(charts=(Chart("Drift", "", {"mix": values}),))))
    assert "Drift" in page.text()
    assert len([each for each in page.every("rect") if each["class"] == "bar"]) == (values == {"a": 0.0})


def test_a_parent_and_the_last_model_are_compared_first():
    [section] = [each for each in Page(as_html(report())).every("section") if "data-left" in each]
    assert (section["data-left"], section["data-right"]) == ("base", "mix")
    assert "hidden" in section  # until the script runs
    assert 'id="compare"' not in as_html(report(models=("base",)))


def test_the_models_to_compare_first_have_a_picture_of_one_prompt():
    made = report(models=("base", "night", "mix"), prompts=("a red circle",))
    more = report(models=("base", "half"), prompts=("a blue square",))
    both = replace(made, models=(*made.models, "half"), pictures=(*made.pictures, *more.pictures))
    [section] = [each for each in Page(as_html(both)).every("section") if "data-left" in each]
    assert (section["data-left"], section["data-right"]) == ("base", "mix")


def test_how_a_model_was_made_stands_beside_it():
    page = as_html(report(made={"mix": "mix = weighted_sum(a = <base>)"}))
    assert "mix = weighted_sum(a = &lt;base&gt;)" in page


def test_the_models_of_the_page_say_where_they_are_from():
    told = Page(as_html(report())).text()
    assert "mix made of base, night." in told
    assert "0123456789" in told


def test_a_missing_picture_is_said():
    settings = Settings("a", seeds=(0, 1))
    every = (picture("a", 0, settings), picture("a", 1, settings), picture("b", 1, settings))
    assert Page(as_html(report(models=("a", "b"), pictures=every))).text().count("no picture") == 1


def test_large_pictures_are_smoothed_and_small_ones_not():
    settings = Settings("a")
    every = (picture("a", 0, settings, 256, 256), picture("a", 1, settings, 257, 8))
    kinds = [how["class"] for *_, how in images(Page(as_html(report(models=("a",), pictures=every)))).values()]
    assert kinds == ["small", "large"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("peak_memory_bytes", 3 << 20, "3.0 MiB"),
        ("seconds", 83.4172, "83.42"),
        ("threads", 2, "2"),
        ("cuda", False, "no"),
        ("versions", {"torch": "2 <b>", "x": [1, None]}, "torch 2 &lt;b&gt;, x 1, unknown"),
    ],
)
def test_facts_about_the_machine_are_for_people(key, value, expected):
    assert fact(key, value) == expected


def palettes():
    """The colours of day, night and paper, by name."""
    style = files("mergekit_sd.sampling.html").joinpath("style.css").read_text(encoding="utf-8")
    roots = re.findall(r":root \{([^}]*)\}", style)
    assert len(roots) == 3
    return [dict(re.findall(r"--(\w+): (#\w+);", root)) for root in roots]


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark", "print"])
@pytest.mark.parametrize("ink", ["ink", "muted", "accent", "ok", "warning", "failed"])
def test_every_text_has_the_contrast_of_wcag_aa(palette, ink):
    for ground in ("paper", "card"):
        light, dark = sorted((luminance(palette[ink]), luminance(palette[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
