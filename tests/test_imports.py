"""What `import mergekit_sd` costs and offers. The import contracts are checked by `lint-imports` in the gate."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import story

import mergekit_sd as mk

HEAVY = ("torch", "numpy", "pydantic", "rich", "tomlkit", "textual", "safetensors")


def imported_by(code):
    """The heavy modules that a fresh interpreter has after `code`."""
    code += f"\nimport sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import mergekit_sd") == []


def test_names_and_operations_need_no_torch():
    code = "import mergekit_sd as mk; [getattr(mk, name) for name in mk.__all__]; mk.ops.weighted_sum"
    found = imported_by(code)
    assert "torch" not in found
    assert "textual" not in found


def test_every_module_is_importable_without_textual():
    code = "import pkgutil, importlib, mergekit_sd\n"
    code += "for m in pkgutil.walk_packages(mergekit_sd.__path__, 'mergekit_sd.'):\n"
    code += "    m.name.endswith('__main__') or importlib.import_module(m.name)"
    assert "textual" not in imported_by(code)


@pytest.mark.parametrize("name", mk.__all__)
def test_every_name_of_the_api_resolves(name):
    assert getattr(mk, name) is not None
    assert name in dir(mk)


def test_all_is_what_can_be_had():
    assert sorted(mk.__all__) == sorted(mk._HOME_OF)
    assert len(set(mk.__all__)) == len(mk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mk.nothing  # noqa: B018


@pytest.mark.parametrize(
    "room", ["mergekit_sd.planning.build", "mergekit_sd.demo", "mergekit_sd.graph", "mergekit_sd.inspection"]
)
def test_a_room_does_not_hide_a_name(room):
    code = f"import importlib; importlib.import_module({room!r}); import mergekit_sd as mk\n"
    code += "assert callable(mk.plan) and mk.plan.__module__ == 'mergekit_sd.api', mk.plan\n"
    code += "import mergekit_sd.planning.build; from mergekit_sd import plan; assert plan is mk.plan\n"
    code += "mk.run; assert callable(mk.run) and callable(mk.open) and callable(mk.load)"
    assert "torch" not in imported_by(code)


# --- commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["plan", "r.toml"], ["check", "r.toml"], ["inspect", "base.safetensors"]],
)
def test_what_reads_headers_imports_no_torch(tmp_path_factory, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(story.room(tmp_path_factory, tmp_path))
    found = imported_by(f"from mergekit_sd.cli.main import run; assert run({arguments!r}) == 0")
    assert "torch" not in found
    assert "textual" not in found
    assert "rich" not in found or arguments[0] in ("plan", "inspect")


def test_every_package_is_installed():
    """An editable install finds what a wheel would miss."""
    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {p.parent for p in (root / "mergekit_sd").rglob("*") if p.suffix in (".py", ".toml")}
    there = {".".join(folder.relative_to(root).parts) for folder in folders}
    assert set(listed) - {"mergekit_sd.recipes", "mergekit_sd_tui", "mergekit_sd_tui.screens"} == there


def test_a_signal_waits_for_an_import(tmp_path, monkeypatch):
    """In the middle of it, in C++, an exception would end the process."""
    import signal

    from mergekit_sd.lazy import _LazyModule

    (tmp_path / "slow_module.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\nsignal.raise_signal(signal.SIGINT)\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = []
    former = signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    try:
        lazy = _LazyModule("slow_module")
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "slow_module", raising=False)
            assert lazy.value == 3
        assert told == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is not None
        signal.raise_signal(signal.SIGINT)
        assert told == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, former)
