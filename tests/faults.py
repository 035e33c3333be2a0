"""Real runs to be killed, and faults to put into them. Run as a program, it is the server that forks the runs.

A run is a process of its own that goes through the command line's own `main()`, and with `whole`
through the interpreter's shutdown, too; it is forked from a server that has imported torch
already, so that it begins at once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SUFFIX = ".mergekit-sd.tmp"
HERE = Path(__file__).resolve().parent

# --- models and recipes ------------------------------------------------------------------------------


def write_model(path, seed, *, tensors=6, numel=1 << 20, dtype="F16"):
    """A model of a few large tensors of no known architecture, and one small integer tensor."""
    import numpy as np

    from mergekit_sd.formats.dtypes import DTYPES
    from mergekit_sd.formats.header import build_header

    entries = [(f"block.{i}.weight", DTYPES[dtype], (numel // 64, 64)) for i in range(tensors)]
    entries.append(("steps", DTYPES["I64"], (3,)))
    header = build_header(entries, {"format": "pt"})
    random = np.random.default_rng(seed)
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    with path.open("wb") as file:
        file.write(header.raw)
        for info in sorted(header.tensors.values(), key=lambda info: info.offset):
            if info.dtype.is_float:
                file.write(random.standard_normal(info.numel, np.float32).astype(kind).tobytes())
            else:
                file.write(np.arange(info.numel, dtype=np.int64).tobytes())
    return path


def write_recipe(path, *, alpha=0.3, output="out.safetensors", dtype="fp16", more=""):
    """A weighted sum of a.safetensors and b.safetensors, beside them."""
    path.write_text(
        f"""recipe = 1
[models]
a = "a.safetensors"
b = "b.safetensors"
[steps.mix]
op = "weighted_sum"
a = "a"
b = "b"
alpha = {alpha}
[outputs.made]
model = "mix"
file = {json.dumps(output)}
dtype = "{dtype}"
{more}""",
        encoding="utf-8",
    )
    return path


def left_in(folder):
    """Temporary files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith((SUFFIX, ".new")))


def wait_until(condition, seconds=20.0):
    """Poll until something holds; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.001)
    raise AssertionError("it never happened")


# --- faults, as Python source that a run executes before it begins ------------------------------------

# A disk so slow that a sync ends only when the file is cut to nothing under it, as a real one does.
SLOW_SYNC = """
import os, stat, time
real_fsync = os.fsync
def fsync(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        mark("sync")
        end = time.monotonic() + 20
        while os.fstat(descriptor).st_size and time.monotonic() < end:
            time.sleep(0.01)
    real_fsync(descriptor)
os.fsync = fsync
"""

# Every read of a tensor and every write take 20 ms.
SLOW_READS = """
import os, time
real_preadv = os.preadv
def preadv(descriptor, buffers, offset):
    if offset > 4096:
        mark("read")
        time.sleep(0.02)
    return real_preadv(descriptor, buffers, offset)
os.preadv = preadv
"""

SLOW_WRITES = """
import os, time
real_pwrite = os.pwrite
def pwrite(descriptor, buffer, offset):
    mark("write")
    time.sleep(0.02)
    return real_pwrite(descriptor, buffer, offset)
os.pwrite = pwrite
"""

# The first write waits until the test says "release".
HELD_WRITES = """
import os
real_pwrite = os.pwrite
def pwrite(descriptor, buffer, offset):
    mark("write")
    wait_for("release")
    return real_pwrite(descriptor, buffer, offset)
os.pwrite = pwrite
"""

# Computing, without reading or writing.
SLOW_SUMS = """
import time
from mergekit_sd.execute.worker import Worker
real_run = Worker._run
def run(self, *arguments):
    mark("sum")
    time.sleep(0.02)
    return real_run(self, *arguments)
Worker._run = run
"""


# --- the server ---------------------------------------------------------------------------------------


class Server:
    """Starts runs of the command line; `start` gives each as a Run."""

    def __init__(self, folder):
        self._folder = folder
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, *arguments, before="", whole=False):
        """Start `mergekit-sd ARGUMENTS`; `before` is Python source that the process executes first."""
        self._number += 1
        run = Run(self._folder / str(self._number))
        order = {"arguments": [str(each) for each in arguments], "before": before, "whole": whole}
        order["place"] = str(run.place)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        run.pid = int(self._process.stdout.readline())
        return run

    def run(self, *arguments, before=""):
        """Start and wait."""
        return self.start(*arguments, before=before).wait()

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Run:
    """One process: its marks, its exit code (negative: the signal that killed it), its stderr."""

    def __init__(self, place):
        self.place = place
        self.place.mkdir(parents=True)
        self.pid = 0

    def kill(self, number):
        os.kill(self.pid, number)

    def release(self):
        """Let the run go on that waits in HELD_WRITES."""
        (self.place / "release").touch()

    def reached(self, mark):
        """Wait until the process has said `mark(...)`."""
        wait_until(lambda: (self.place / f"mark-{mark}").exists() or self.ended)
        assert (self.place / f"mark-{mark}").exists(), self.wait().stderr
        return self

    @property
    def ended(self):
        return (self.place / "code").exists()

    def wait(self, seconds=30.0):
        wait_until(lambda: self.ended, seconds)
        return self

    @property
    def code(self):
        return int((self.place / "code").read_text())

    @property
    def stderr(self):
        return (self.place / "stderr").read_text(encoding="utf-8")


def serve():
    """Fork a run for each line of stdin; a thread-free parent, so that forking is sound."""
    for name in ("torch", "mergekit_sd.api", "mergekit_sd.cli.run"):
        importlib.import_module(name)
    from mergekit_sd.__main__ import main

    signal.signal(signal.SIGCHLD, lambda *_: reap())
    places = {}

    def reap():
        for pid in list(places):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                place = places.pop(pid)
                (place / "code.new").write_text(str(os.waitstatus_to_exitcode(status)))
                (place / "code.new").rename(place / "code")

    print("ready", flush=True)
    while line := _line():
        order = json.loads(line)
        place = Path(order["place"])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            _become(order, place)
            try:
                main()
            except SystemExit as error:
                if order["whole"]:
                    raise
                os._exit(error.code)
        places[pid] = place
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        print(pid, flush=True)


def _line():
    """A line of stdin, read without a buffer that forks would share."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    return line


def _become(order, place):
    """Turn this fork into a process as a shell would have started it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["mergekit-sd", *order["arguments"]]
    tools = {"mark": lambda name: (place / f"mark-{name}").touch(), "wait_for": lambda name: _wait_for(place / name)}
    exec(order["before"], tools)


def _wait_for(path):
    while not path.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    serve()
