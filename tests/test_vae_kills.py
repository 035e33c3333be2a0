"""Real processes that dedupe or undo, killed at any moment: no file is lost, and the next one finishes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from vae_files import make_shelf

import mergekit_sd as mk
from mergekit_sd.library import journal

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

SEEDS, COPIES = 3, 5
KILLS = {"hard": 11, "sym": 11, "delete": 11}


@pytest.fixture
def shelf(tmp_path, tmp_path_factory):
    made = make_shelf(tmp_path, tmp_path_factory)
    for copy in range(COPIES):
        for seed in range(SEEDS):
            made.put(f"{'sub/' * (copy % 2)}{seed}-{copy}.safetensors", seed)
    mk.list_vaes([made.folder])  # threads that hash do not outlive it: a fork has none
    return made


def lines():
    """Of all records."""
    return sum(path.read_bytes().count(b"\n") for path in journal._folder().glob("*.jsonl"))


def killed(work, after, pause):
    """Whether a process was killed, so many lines of its record and a pause after its start, before it ended."""
    begun = lines()
    process = os.fork()
    if not process:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    while lines() < begun + after and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(1e-4)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def check_nothing_is_lost(shelf, before, link):
    """Every name leads to its bytes; deleted ones are those of a copy that is there."""
    now, bytes_there = shelf.state(), set()
    for name, (digest, _, _) in now.items():
        if not name.endswith(".tmp"):
            assert digest == before[name][0]
            bytes_there.add(digest)
    missing = before.keys() - now.keys()
    assert not missing or link == "delete"
    assert {before[name][0] for name in missing} <= bytes_there


@pytest.mark.slow
@pytest.mark.parametrize("link", KILLS)
def test_killed_at_any_moment(shelf, link, capsys):
    def dedupe():
        return mk.dedupe_vaes([shelf.folder], link=link, apply=True)

    def undo():
        while any(run.pending for run in mk.dedupe_runs()):
            assert mk.undo_dedupe().refused == ()

    before = shelf.state()
    steps = SEEDS * (COPIES - 1)
    chance, seen = random.Random(4), {"killed": 0, "midway": 0, "left": 0, "undo killed": 0}
    for turn in range(5 * KILLS[link]):
        if seen["killed"] == KILLS[link]:
            break
        seen["killed"] += killed(dedupe, chance.randint(1, steps), chance.uniform(0, 0.004))
        check_nothing_is_lost(shelf, before, link)
        seen["left"] += len(shelf.left())
        seen["midway"] += 0 < sum(len(run.pending) for run in mk.dedupe_runs()) < steps
        if turn % 3 == 1:  # the next run finishes it, and sweeps
            dedupe()
            assert shelf.left() == []
            check_nothing_is_lost(shelf, before, link)
            assert sum(len(group.replaced) for group in mk.dedupe_vaes([shelf.folder], link=link).groups) == 0
            assert sum(len(run.steps) for run in mk.dedupe_runs()) >= steps
        if turn % 3 == 0:
            seen["undo killed"] += killed(undo, chance.randint(1, steps), chance.uniform(0, 0.004))
            check_nothing_is_lost(shelf, before, link)
            seen["left"] += len(shelf.left())
        undo()
        assert shelf.state() == before
        assert shelf.left() == []
        shutil.rmtree(journal._folder())
    assert seen["killed"] == KILLS[link]
    assert min(seen["midway"], seen["undo killed"]) > 0
    with capsys.disabled():
        print(f"\n{link}: {seen}")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("link", ["hard", "sym"])
@pytest.mark.parametrize("after", ["dedupe", "undo"])
@pytest.mark.parametrize("next_is", ["dedupe", "undo"])
def test_the_next_run_sweeps_what_was_about_to_be_renamed(shelf, monkeypatch, link, after, next_is):
    works = {"dedupe": lambda: mk.dedupe_vaes([shelf.folder], link=link, apply=True), "undo": mk.undo_dedupe}
    before = shelf.state()
    if after == "undo":
        works["dedupe"]()
    with monkeypatch.context() as context:
        context.setattr("pathlib.Path.replace", die)
        assert killed(works[after], 99, 0)
    assert len(shelf.left()) == 1
    works[next_is]()
    assert shelf.left() == []
    if any(run.pending for run in mk.dedupe_runs()):
        mk.undo_dedupe()
    assert shelf.state() == before
