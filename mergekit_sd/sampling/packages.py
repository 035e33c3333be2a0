"""The packages that pictures need, which come with an extra: told in one sentence where they are missing.

Owns how they are imported: quietly, and after torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from functools import cache

from mergekit_sd.errors import EnvironmentFault
from mergekit_sd.lazy import torch
from mergekit_sd.text import listed

INSTALL = "pip install 'mergekit-sd[sample]'"
# By distribution: what is imported of it. openai-clip is read as data.
PACKAGES = {"diffusers": "diffusers", "transformers": "transformers", "openai-clip": None, "Pillow": "PIL.Image"}
# Both packages import their classes one by one, when asked for them; some of these imports warn.
CLASSES = {
    "diffusers": ("AutoencoderKL", "UNet2DConditionModel"),
    "transformers": ("CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"),
}


@cache
def need_packages() -> None:
    """Import what pictures need, without a word from it. Raises EnvironmentFault that says what to install."""
    torch.float32  # noqa: B018  first, through `lazy`: a Ctrl-C inside its import would kill the process
    missing = [package for package, module in PACKAGES.items() if not _is_there(package, module)]
    if missing:
        raise EnvironmentFault(f"Making pictures needs {listed(missing)}, not installed here: {INSTALL}")


def _is_there(package: str, module: str | None) -> bool:
    try:
        if module is None:
            importlib.metadata.distribution(package)
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
            for name in CLASSES.get(package, ()):
                getattr(found, name)
    except (ImportError, RuntimeError):  # RuntimeError: diffusers' own of a class whose import failed
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of diffusers and transformers, which speak to programmers."""
    need_packages()
    logs = [importlib.import_module(f"{name}.utils.logging") for name in CLASSES]
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
