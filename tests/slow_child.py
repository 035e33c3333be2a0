"""Children of the job queue that can be watched: `sitecustomize` modules on PYTHONPATH."""

from __future__ import annotations

import os
import time

import faults

# Each write takes a while, and the first says who writes.
SLOW_WRITES = """
import os, pathlib, time
real_pwrite = os.pwrite
def pwrite(descriptor, buffer, offset):
    pathlib.Path(os.environ["CHILD_MARK"]).write_text(str(os.getpid()))
    time.sleep(0.1)
    return real_pwrite(descriptor, buffer, offset)
os.pwrite = pwrite
"""

SILENT_DEATH = """
import os, sys
if "run" in sys.orig_argv:
    print("a last word", file=sys.stderr, flush=True)
    os._exit(1)
"""


def disturb(monkeypatch, folder, code):
    """Let every child run this code first; the file in which it leaves its process id."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    mark = folder / "site" / "pid"
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    monkeypatch.setenv("CHILD_MARK", str(mark))
    return mark


def is_alive(pid):
    """Whether there is such a process, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_the_end(pid, seconds=20.0):
    end = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < end, f"{pid} lives on"
        time.sleep(0.02)


def write_slow_job(folder):
    """A recipe of which the output takes many writes; its path."""
    for seed, name in enumerate("ab"):
        faults.write_model(folder / f"{name}.safetensors", seed, tensors=40, numel=1 << 12)
    faults.write_recipe(folder / "r.toml")
    return folder / "r.toml"
