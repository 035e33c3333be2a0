"""The README, the map and the changelog say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import story
from noise_models import write_small_model

from mergekit_sd.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
NAMES = [name for section in COMMANDS.values() for name in section]
PARENTS = ("anything-v3", "orangemix", "my-dreambooth", "v1-5-pruned")


def block(language):
    """The first code block of a language in the README."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


@pytest.fixture
def parents(tmp_path, monkeypatch, shell):
    """The README's models, in little, where it says that they lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_SD_CONFIG", str(tmp_path / "config"))
    (tmp_path / "webui").mkdir()
    for name in PARENTS:
        write_small_model(tmp_path / f"{name}.safetensors", name)
    (tmp_path / "webui" / "v1-5-pruned.safetensors").hardlink_to(tmp_path / "v1-5-pruned.safetensors")
    shell("roots", "add", "webui", "webui")
    return tmp_path


def test_the_readmes_recipe_and_python_make_one_model(parents, shell):
    (parents / "lantern.toml").write_text(block("toml"), encoding="utf-8")
    for command in ("check", "plan", "run"):
        shell(command, "lantern.toml")
    shell("run", "lantern.toml", "--locked", "--force")
    by_recipe = shell.json("hash", "lantern.safetensors")
    (parents / "lantern.safetensors").unlink()
    exec(compile(block("python"), "README.md", "exec"), {})
    assert shell.json("verify", "lantern.safetensors")["same"]
    assert content(shell.json("hash", "lantern.safetensors")) == content(by_recipe)


def content(report):
    """The content hash in a report of `hash`."""
    found = re.search(r"\b[0-9a-f]{32}\b", str(report))
    assert found
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_and_is_told_of(name, shell):
    out, _ = shell(name, "--help")
    assert len(out.splitlines()) >= 5
    assert max(map(len, out.splitlines())) <= 80
    docs = README + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert re.search(rf"`{name}`|mergekit-sd {name}\b", docs), f"{name} is neither in the README nor in docs/"
    assert f"`{name}`" in CHANGELOG


def test_the_list_of_commands_fits_a_terminal(shell):
    out, _ = shell("--help")
    assert all(name in out for name in NAMES)
    assert max(map(len, out.splitlines())) <= 80


def test_the_map_names_every_room():
    package = ROOT / "mergekit_sd"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    assert rooms
    assert [room for room in rooms if f"{room}/" not in MAP] == []
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert [name for name in sorted(files) if name not in MAP] == []


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
