"""Shared fixtures: a clean configuration, and small models of real layouts beside each other."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch: two workers with two threads each would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import models
import pytest
from hypothesis import settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("quiet", deadline=None, max_examples=50)
# In CI the same examples every time: a new find belongs to the one who looks, not to who comes by.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "quiet")


@pytest.fixture(autouse=True)
def _no_user_configuration(tmp_path_factory, monkeypatch):
    """No test sees the user's roots, nor the user's library."""
    monkeypatch.setenv("MERGEKIT_SD_CONFIG", str(tmp_path_factory.mktemp("config")))
    monkeypatch.setenv("MERGEKIT_SD_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """A folder of small checkpoints that tests only read: sd1-a, -b, -c (fp16, fp32, bf16), sd2-…, sdxl-…"""
    folder = tmp_path_factory.mktemp("library")
    for name in ("sd1", "sd2", "sdxl"):
        for seed, (letter, dtype) in enumerate((("a", "fp16"), ("b", "fp32"), ("c", "bf16"))):
            models.write(folder / f"{name}-{letter}.safetensors", models.checkpoint(name, seed, dtype))
    return folder


@pytest.fixture
def room(library, tmp_path) -> Path:
    """A folder of this test's own with hard links to the library's models."""
    for path in library.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path
