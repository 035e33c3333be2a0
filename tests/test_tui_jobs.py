"""Jobs: real child processes that end well, badly, by cancelling and with the UI; and the screen that shows them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import slow_child
import tui_stage as stage
from hypothesis import given
from hypothesis import strategies as st

from mergekit_sd.errors import MergekitError
from mergekit_sd_tui import job_rows, jobs
from mergekit_sd_tui.app import Workbench
from mergekit_sd_tui.jobs import Job, JobQueue

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by signals")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of two models and a recipe."""
    folder = tmp_path_factory.mktemp("models")
    slow_child.write_slow_job(folder)
    return folder


@pytest.fixture
def place(models, tmp_path):
    for path in models.glob("*.safetensors"):
        if path.name != "out.safetensors":
            os.link(path, tmp_path / path.name)
    faults.write_recipe(tmp_path / "r.toml")
    return tmp_path


class Queue:
    """A queue, and all it told."""

    def __init__(self):
        self.told, self.ended = [], []
        self.queue = JobQueue(self.told.append, self.ended.append)

    async def until(self, condition, seconds=30.0):
        end = time.monotonic() + seconds
        while not condition(self.queue.jobs):
            assert time.monotonic() < end, self.queue.jobs
            await asyncio.sleep(0.01)

    async def until_over(self):
        await self.until(lambda every: all(job.is_over for job in every))

    def states(self, number=1):
        """What the states of a job were, in their order."""
        found = [job.state for every in self.told for job in every if job.id == number]
        return list(dict.fromkeys(found))


def played(story):
    """The queue after a story."""

    async def run():
        queue = Queue()
        await story(queue)
        await queue.queue.close()
        return queue

    return asyncio.run(run())


def gone(pid):
    """The process is no more, nor is it a zombie."""
    return not slow_child.is_alive(int(pid))


# --- the queue -------------------------------------------------------------------------------------------


def test_a_job_runs_and_tells(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "json.py").write_text("raise SystemExit(9)")  # no module of this folder is taken for Python's

    async def story(q):
        q.queue.submit("run r", ("run", "r.toml"))
        q.queue.submit("again", ("run", "r.toml"))
        await q.until_over()

    q = played(story)
    first, second = q.queue.jobs
    made = place / "out.safetensors"
    assert (first.state, first.files, first.error) == ("done", (made,), None)
    assert first.done == first.total == made.stat().st_size
    assert first.report["outputs"][0]["bytes"] == made.stat().st_size
    assert [line.split()[0] for line in first.log] == ["writing", "wrote"]
    assert q.states(1) == ["queued", "running", "done"]
    # The second is refused, by the words of the command line; it began when the first was over.
    assert second.state == "failed"
    assert type(second.error) is MergekitError
    assert "exists" in second.error.message
    assert "--force" in second.error.hint
    assert any("error: " in line for line in second.log)
    assert not any(sum(job.state == "running" for job in every) > 1 for every in q.told)
    assert [job.id for job in q.ended] == [1, 2]
    assert faults.left_in(place) == []


def test_a_cancelled_job_leaves_nothing(place, tmp_path, monkeypatch):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)

    async def story(q):
        q.queue.submit("run r", ("run", str(place / "r.toml")))
        q.queue.submit("next", ("run", str(place / "r.toml")))
        await q.until(lambda every: mark.exists() and every[0].done)
        assert 0 < q.queue.jobs[0].done < q.queue.jobs[0].total
        assert len(faults.left_in(place)) == 1
        q.queue.cancel(2)
        assert q.queue.jobs[1].state == "cancelled"  # it had not begun
        q.queue.cancel(1)
        assert q.queue.jobs[0].state == "cancelling"
        assert not gone(mark.read_text())
        await q.until_over()
        assert gone(mark.read_text())

    q = played(story)
    assert q.states(1) == ["queued", "running", "cancelling", "cancelled"]
    assert not (place / "out.safetensors").exists()
    assert faults.left_in(place) == []


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.5])
def test_a_job_is_cancelled_while_it_starts(place, seconds):
    async def story(q):
        q.queue.submit("run r", ("run", str(place / "r.toml")))
        await asyncio.sleep(seconds)
        q.queue.cancel(1)
        await q.until_over()

    q = played(story)
    assert q.queue.jobs[0].state == "cancelled"
    assert not (place / "out.safetensors").exists()


def test_a_killed_child_has_failed_and_says_so(place, tmp_path, monkeypatch):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)

    async def story(q):
        q.queue.submit("run r", ("run", str(place / "r.toml")))
        await q.until(lambda every: mark.exists())
        os.kill(int(mark.read_text()), signal.SIGKILL)
        await q.until_over()

    (job,) = played(story).queue.jobs
    assert job.state == "failed"
    assert "killed by SIGKILL" in job.error.message
    assert "memory" in job.error.hint
    assert gone(mark.read_text())


def test_a_child_that_dies_without_a_reason(place, tmp_path, monkeypatch):
    slow_child.disturb(monkeypatch, tmp_path, slow_child.SILENT_DEATH)

    async def story(q):
        q.queue.submit("run r", ("run", str(place / "r.toml")))
        await q.until_over()

    (job,) = played(story).queue.jobs
    assert job.state == "failed"
    assert "code 1" in job.error.message
    assert job.log == ("a last word",)


def test_a_process_that_cannot_be_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))

    async def story(q):
        q.queue.submit("run r", ("run", "r.toml"))
        await q.until_over()
        q.queue.remove(1)

    q = played(story)
    assert "cannot be started" in q.ended[0].error.message
    assert q.queue.jobs == ()


def test_only_what_is_over_is_removed_and_a_retry_is_a_job_of_its_own(tmp_path):
    async def story(q):
        q.queue.submit("none", ("run", str(tmp_path / "none.toml")))
        q.queue.remove(1)
        assert len(q.queue.jobs) == 1
        await q.until_over()
        q.queue.retry(1)
        await q.until_over()
        assert [job.arguments for job in q.queue.jobs] == [("run", str(tmp_path / "none.toml"))] * 2
        assert q.queue.jobs[1].error.message == q.queue.jobs[0].error.message == "There is no such recipe."

    played(story)


UI = """
import asyncio, sys
from mergekit_sd_tui.app import Workbench
class Started(Workbench):
    def on_mount(self):
        super().on_mount()
        self.submit("run", ("run", sys.argv[1]))
Started().run(headless=True)
"""


@pytest.mark.slow
def test_no_child_outlives_a_killed_ui(place, tmp_path, monkeypatch):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)
    with subprocess.Popen([sys.executable, "-c", UI, str(place / "r.toml")], stdout=subprocess.DEVNULL) as ui:
        faults.wait_until(lambda: mark.exists() and faults.left_in(place))
        ui.kill()
        ui.wait(30)
        slow_child.wait_for_the_end(int(mark.read_text()))
    assert faults.left_in(place) == []
    assert not (place / "out.safetensors").exists()


@given(st.lists(st.binary(max_size=9), max_size=9), st.integers(1, 5))
def test_lines_come_whole_however_they_are_cut(parts, chunk):
    lines = [part.replace(b"\n", b"") or b"x" for part in parts]

    async def read():
        stream = asyncio.StreamReader()
        stream.feed_data(b"\n".join(lines))
        stream.feed_eof()
        return [line async for line in jobs._lines(stream)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "CHUNK", chunk)
        assert asyncio.run(read()) == lines


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.01, 1e4))
def test_the_time_left_is_that_of_an_even_pace(done, more, seconds):
    job = Job(1, "a", (), "running", done=done, total=done + more, seconds=seconds)
    assert (seconds + job.seconds_left) / (done + more) == pytest.approx(seconds / done)
    assert replace(job, state="cancelling").seconds_left is None
    assert replace(job, done=0).seconds_left is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40")]
)
def test_durations(seconds, words):
    assert job_rows.duration(seconds) == words


# --- the screen --------------------------------------------------------------------------------------------

BYTES = 2 << 30
FAULT = MergekitError("The output [exists] already.", file="/models/[b] x\x1b.safetensors", hint="give --force")
EVERY = (
    Job(1, "run base.toml", ("run", "base.toml"), "done", "out", BYTES, BYTES, files=(Path("/models/o.safetensors"),)),
    Job(2, "run [b]\x1b mix.toml", ("run", "[b] mix.toml"), "failed", error=FAULT, log=("error: no [/b] \x1b",)),
    Job(
        3,
        "extract a LoRA",
        ("lora", "extract", "a", "b"),
        "running",
        "lora",
        BYTES // 4,
        BYTES,
        seconds=10.0,
        log=("writing /models/lora.safetensors, 2.00 GiB", "warning: 3 tensors are only in a"),
    ),
    Job(4, "sample", ("sample", "a"), "queued"),
)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_the_screen(size):
    async def story(pilot):
        await stage.sees(pilot, "Library")
        await pilot.press("5")
        await stage.sees(pilot, "No jobs yet")
        pilot.app.jobs = EVERY
        await stage.sees(pilot, "1 running", "sample: queued")
        await pilot.press("up")
        await stage.sees(pilot, "30 s left", "log")
        await pilot.pause(0.2)
        await stage.looks(pilot, f"jobs-{size[0]}x{size[1]}")
        await pilot.press("up")
        await stage.sees(pilot, "The output [exists] already.", "give --force", "[b] x\\x1b")

    stage.play(story, size)


@pytest.mark.parametrize("width", [80, 100, 105, 119])
def test_the_time_left_is_seen_whole(width):
    async def story(pilot):
        pilot.app.jobs = EVERY
        await pilot.press("5")
        await stage.sees(pilot, "1 running")
        await pilot.pause(0.2)  # the first frame has no side yet
        assert "25% of 2.00 GiB    30 s" in stage.shown(pilot.app)

    stage.play(story, (width, 24))


@pytest.mark.parametrize("size", [(20, 5), (1, 1)])
def test_small_terminals(size):
    async def story(pilot):
        pilot.app.jobs = EVERY
        await pilot.press("5")
        await stage.until(pilot, lambda: pilot.app.screen.query("#jobs"))
        await pilot.press("up", "up")
        await pilot.pause(0.1)

    stage.play(story, size)


def test_a_job_of_the_ui_from_its_start_to_the_library(place):
    async def story(pilot):
        app = pilot.app
        app.submit("run r.toml", ("run", str(place / "r.toml")))
        app.submit("bad", ("run", str(place / "none.toml")))
        app.submit("bad", ("run", str(place / "none.toml")))  # waits already: no second one
        assert len(app.jobs) == 2
        await pilot.press("5")
        assert "in the queue already" in stage.told(app)
        await stage.sees(pilot, "run r.toml")
        await stage.until(pilot, lambda: all(job.is_over for job in app.jobs), "the end")
        assert "There is no such recipe" in stage.told(app)
        await stage.sees(pilot, "1 done, 1 failed", "did you mean")
        await pilot.press("r")
        await stage.until(pilot, lambda: len(app.jobs) == 3 and app.jobs[2].is_over)
        await pilot.press("enter")
        assert "made no file" in stage.told(app)
        await pilot.press("p", "delete")
        assert "drawn no pictures" in stage.told(app)
        await stage.until(pilot, lambda: len(app.jobs) == 2)
        await pilot.press("x")
        assert "nothing to cancel" in stage.told(app)
        await pilot.press("1")
        await stage.sees(pilot, "out.safetensors")
        await pilot.press("5", "up", "enter")
        await stage.until(pilot, lambda: app.current == place / "out.safetensors")

    stage.play(story, (100, 30))


def test_quitting_asks_cancels_and_waits(place, tmp_path, monkeypatch):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)

    async def story(pilot):
        app = pilot.app
        app.submit("run r.toml", ("run", str(place / "r.toml")))
        await stage.until(pilot, mark.exists, "the child")
        await pilot.press("ctrl+q")
        await stage.sees(pilot, "1 job under way", "Stay", "Leave")
        await pilot.press("enter")
        await pilot.pause(0.1)
        assert app.jobs[0].state == "running"
        await pilot.press("ctrl+q", "down", "enter")
        await stage.until(pilot, lambda: app.jobs[0].state == "cancelled", "the end of the job")
        await stage.until(pilot, lambda: not app.is_running or app._exit, "the end")

    stage.play(story)
    assert gone(mark.read_text())
    assert faults.left_in(place) == []


def test_a_ui_that_ends_otherwise_leaves_no_child(place, tmp_path, monkeypatch):
    mark = slow_child.disturb(monkeypatch, tmp_path, slow_child.SLOW_WRITES)

    async def story(pilot):
        pilot.app.submit("run r.toml", ("run", str(place / "r.toml")))
        await stage.until(pilot, mark.exists, "the child")

    app = stage.play(story, app=Workbench())
    assert app.jobs[0].state == "cancelled"
    assert gone(mark.read_text())
    assert faults.left_in(place) == []
