"""A folder of samples read back: what was written is what is found; what is none is refused."""

from __future__ import annotations

import json
import os

import pytest
import sampling_reports

import mergekit_sd as mk
from mergekit_sd.errors import MalformedFile, MissingInput, UnreadableInput
from mergekit_sd.sampling.folder import LARGEST
from mergekit_sd.sampling.values import Check


@pytest.fixture
def written(tmp_path):
    """A folder as `sample` writes it, with the report that it is of."""
    checks = (
        Check("blank", "sound", "ok", "night", "No picture is blank."),
        Check("contrast", "looks", "warning", "mix", "Pale."),
    )
    report = sampling_reports.report(checks=checks)
    mk.write_samples(report, tmp_path / "drawn")
    return report, tmp_path / "drawn"


def test_what_was_written_is_read(written):
    report, folder = written
    found = mk.read_samples(folder)
    assert (found.title, found.models, found.page) == ("A merge", report.models, folder / "report.html")
    assert [(each.model, each.seed, each.prompt) for each in found.pictures] == [
        (each.model, each.seed, each.settings.prompt) for each in report.pictures
    ]
    assert all(each.path.is_file() and each.path.parent == folder for each in found.pictures)
    assert "20 steps, CFG 7" in found.pictures[0].settings
    assert found.checks == 2
    assert [(each.name, each.level, each.model, each.message) for each in found.findings] == [
        ("contrast", "warning", "mix", "Pale.")
    ]


def test_hostile_texts_are_texts(tmp_path):
    mk.write_samples(sampling_reports.hostile(), tmp_path / "drawn")
    found = mk.read_samples(tmp_path / "drawn")
    assert found.title == sampling_reports.HOSTILE
    assert found.findings[0].message == sampling_reports.PROMPT


def test_folders_of_samples_are_found_once(written, tmp_path):
    _, folder = written
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    assert mk.samples_in([tmp_path, folder, tmp_path / "nowhere"]) == (folder,)


def test_no_report_is_refused(tmp_path):
    with pytest.raises(MissingInput, match="no samples"):
        mk.read_samples(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MissingInput, match="no samples"):
        mk.read_samples(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '"\\ud800"', "[" * 100_000, '{"checks": []}', "\xff"])
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(MalformedFile, match="report"):
        mk.read_samples(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "", ".", "..", "a\\b.png", "a\0.png"])
def test_a_picture_of_elsewhere_is_refused(written, name):
    _, folder = written
    data = json.loads((folder / "report.json").read_text())
    data["pictures"][1]["file"] = name
    (folder / "report.json").write_text(json.dumps(data))
    with pytest.raises(MalformedFile, match="no report of samples"):
        mk.read_samples(folder)


def test_a_report_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(MalformedFile, match="too large"):
        mk.read_samples(tmp_path)


def test_a_report_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UnreadableInput, match="cannot be read"):
        mk.read_samples(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_may_not_be_looked_into_is_left_out(written, tmp_path):
    assert written
    tmp_path.chmod(0)
    try:
        assert mk.samples_in([tmp_path]) == ()
    finally:
        tmp_path.chmod(0o700)
