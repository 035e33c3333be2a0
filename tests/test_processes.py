"""Real runs that are killed, interrupted, starved of disk, and set against each other: rows 30 to 34 of bad-inputs."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import faults
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

OLD = b"what was there before"
KILLS = 50
PATIENCE = 3.0  # seconds from a signal to the end
PATIENCE_WITH_TORCH = 12.0  # a signal waits until torch is imported, which takes its time on a busy machine
CANCELLED = "error: Cancelled"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = faults.Server(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        faults.write_model(folder / f"{name}.safetensors", seed)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reference(server, models):
    """What an undisturbed run makes."""
    run = server.run("run", faults.write_recipe(models / "r.toml"))
    assert run.code == 0, run.stderr
    return (models / "out.safetensors").read_bytes()


@pytest.fixture
def place(models, tmp_path):
    """A folder with the two models, the recipe, and an output of an earlier time."""
    for name in "ab":
        os.link(models / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    faults.write_recipe(tmp_path / "r.toml")
    (tmp_path / "out.safetensors").write_bytes(OLD)
    return tmp_path


def made_in(folder):
    return (folder / "out.safetensors").read_bytes()


def inode(folder):
    path = folder / "out.safetensors"
    return path.stat().st_ino if path.exists() else None


def check_refused(run, code, *words):
    """An exit code, every word of the message, and no traceback."""
    assert run.code == code, run.stderr
    assert "Traceback" not in run.stderr
    assert not run.stderr.startswith("This is a bug")
    for word in words:
        assert re.search(word, run.stderr), run.stderr


def check_untouched(folder):
    assert made_in(folder) == OLD
    assert faults.left_in(folder) == []


# --- row 30: SIGKILL ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_fifty_moments(server, tmp_path, capsys):
    for seed, name in enumerate("ab"):
        faults.write_model(tmp_path / f"{name}.safetensors", seed, numel=1 << 22)
    recipe = faults.write_recipe(tmp_path / "r.toml")

    def command(alpha):
        return ("run", recipe, "--force", "--set", f"steps.mix.alpha={alpha}")

    wanted, life = {}, 0.0
    for alpha in (0.25, 0.75, 0.25, 0.75):
        former = inode(tmp_path)
        begun = time.monotonic()
        run = server.start(*command(alpha))
        faults.wait_until(lambda former=former: inode(tmp_path) != former)
        life = time.monotonic() - begun  # until the rename; of the first runs too long, with first imports
        assert run.wait().code == 0
        wanted[alpha] = made_in(tmp_path)
    assert wanted[0.25] != wanted[0.75]
    now, chance = 0.75, random.Random(30)
    seen = {"old": 0, "new": 0, "left": 0, "ended": 0}
    for _ in range(KILLS):
        fresh = 1 - now
        run = server.start(*command(fresh))
        time.sleep(chance.uniform(0, 1.2 * life))
        with contextlib.suppress(ProcessLookupError):
            run.kill(signal.SIGKILL)
        seen["ended"] += run.wait().code == 0
        left = faults.left_in(tmp_path)
        assert len(left) <= 1
        seen["left"] += len(left)
        found = made_in(tmp_path)
        assert found in (wanted[now], wanted[fresh])
        seen["old" if found == wanted[now] else "new"] += 1
        now = fresh if found == wanted[fresh] else now
    assert server.run(*command(now)).code == 0
    assert made_in(tmp_path) == wanted[now]
    assert faults.left_in(tmp_path) == []
    assert min(seen["old"], seen["new"], seen["left"]) > 0
    with capsys.disabled():
        print(f"\n{KILLS} kills: {seen}")


def test_what_a_killed_run_left_of_its_lock_goes_before_the_next_writes(server, place):
    (place / ".r.lock.new").write_text("half a lo")
    run = server.start("run", place / "r.toml", "--force", before=faults.SLOW_WRITES).reached("write")
    assert not (place / ".r.lock.new").exists()
    run.kill(signal.SIGKILL)
    run.wait()
    assert len(faults.left_in(place)) == 1


def test_next_run_clears_what_a_killed_one_left(server, place, reference):
    run = server.start("run", place / "r.toml", "--force", before=faults.SLOW_WRITES).reached("write")
    run.kill(signal.SIGKILL)
    assert run.wait().code == -signal.SIGKILL
    assert len(faults.left_in(place)) == 1
    assert made_in(place) == OLD
    faults.write_recipe(place / "r.toml", output="other.safetensors")  # another target in the same folder
    assert server.run("run", place / "r.toml").code == 0
    assert faults.left_in(place) == []


# --- row 31: signals ---------------------------------------------------------------------------------

PHASES = {
    "read": faults.SLOW_READS,
    "sum": faults.SLOW_SUMS,
    "write": faults.SLOW_WRITES,
    "sync": faults.SLOW_SYNC,
}
GAPS = {"once": (), "twice": (0.05,), "thrice": (0.001, 0.001), "at once": (0.0,) * 20}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("gaps", GAPS.values(), ids=GAPS)
@pytest.mark.parametrize("phase", PHASES)
def test_interrupted(server, place, phase, gaps, number):
    run = server.start("run", place / "r.toml", "--force", before=PHASES[phase]).reached(phase)
    begun = time.monotonic()
    run.kill(number)
    for gap in gaps:
        time.sleep(gap)
        if not run.ended:
            run.kill(number)
    run.wait()
    assert time.monotonic() - begun < PATIENCE
    check_refused(run, 130, CANCELLED)
    check_untouched(place)


@pytest.mark.parametrize("turn", range(16))
def test_interrupted_at_any_moment(server, place, reference, turn):
    """Also in the moments that no fault holds open: opening, claiming, renaming, after the end."""
    run = server.start("run", place / "r.toml", "--force", whole=True)
    time.sleep(random.Random(turn).uniform(0, 0.12 if turn % 4 else 0.5))
    for _ in range(turn % 3 + 1):
        if not run.ended:
            run.kill((signal.SIGINT, signal.SIGTERM)[turn % 2])
    run.wait()
    # A signal before `main()` has its handlers ends the process in Python's or the system's own way.
    assert run.code in (0, 130, -signal.SIGINT, -signal.SIGTERM), run.stderr
    assert "Traceback" not in run.stderr or run.code < 0 or "_become" in run.stderr
    assert made_in(place) in (OLD, reference)
    assert faults.left_in(place) == []


IMPORT_HOOK = """
import os, sys
class Tell:
    def find_spec(self, name, path=None, target=None):
        if name == "mergekit_sd.cli":  # the first import of main()
            open(os.environ["TELL"], "w").close()
sys.meta_path.insert(0, Tell())
"""


@pytest.mark.parametrize(
    ("delay", "number"), list(zip([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.1], SIGNALS[:2] * 4, strict=True))
)
def test_interrupted_while_importing(place, tmp_path_factory, delay, number):
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(IMPORT_HOOK)
    told = site / "told"
    process = subprocess.Popen(
        [sys.executable, "-m", "mergekit_sd", "run", str(place / "r.toml"), "--force"],
        env=os.environ | {"PYTHONPATH": str(site), "TELL": str(told)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    faults.wait_until(told.exists)
    time.sleep(delay)
    begun = time.monotonic()
    process.send_signal(number)
    time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert time.monotonic() - begun < PATIENCE_WITH_TORCH
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    check_untouched(place)


@pytest.mark.parametrize("error", ["ImportError('cannot load module more than once')", "SystemError('no exception')"])
def test_interrupt_that_an_import_made_something_else_of(server, place, error):
    before = f"""
import os, signal, sys
def open_model(path):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for("never")
    except KeyboardInterrupt as error:
        raise {error} from error
sys.modules["mergekit_sd.planning.build"].open_model = open_model
"""
    check_refused(server.run("run", place / "r.toml", "--force", before=before), 130, CANCELLED)
    check_untouched(place)


def test_a_token_is_cancelled_within_its_own_handler():
    """A second signal may interrupt the handler of the first, anywhere in `cancel()`."""
    from mergekit_sd.events import CancelToken

    token = CancelToken()
    depth = 0

    def again(frame, event, _):
        nonlocal depth
        if depth < 3 and frame.f_code.co_name in ("cancel", "set", "notify_all"):
            depth += 1
            token.cancel()
            depth -= 1
        return again

    def nested():
        sys.settrace(again)
        token.cancel()
        sys.settrace(None)

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert token.cancelled


# --- row 32: the disk --------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path_factory):
    """Makes small file systems of their own; needs root."""
    made = []

    def mount(megabytes):
        folder = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


# The free bytes that are told are those of a larger disk.
BLIND = "import shutil; real = shutil.disk_usage; shutil.disk_usage = lambda folder: real('/')\n"
NO_RESERVE = "import os; del os.posix_fallocate\n"
ROOM = r"12,5\d\d,\d\d\d bytes .* needed, [\d,]+ bytes .* free"


def test_full_disk_is_seen_before_computing(server, place, disk):
    small = disk(8)
    run = server.run("run", place / "r.toml", "--output-root", small, before=faults.SLOW_READS)
    check_refused(run, 4, ROOM, "--output-root", r"8,388,608 bytes \(8.0 MiB\) free")
    assert not (run.place / "mark-read").exists()
    assert list(small.iterdir()) == []


def test_full_disk_is_seen_by_reserving_the_room(server, place, disk):
    small = disk(8)
    run = server.run("run", place / "r.toml", "--output-root", small, before=BLIND + faults.SLOW_READS)
    check_refused(run, 4, ROOM, "ran full")
    assert not (run.place / "mark-read").exists()
    assert list(small.iterdir()) == []


def test_disk_that_fills_up_in_the_middle(server, place, disk):
    small = disk(16)
    (small / "out.safetensors").write_bytes(OLD)
    before = NO_RESERVE + faults.SLOW_WRITES
    run = server.start("run", place / "r.toml", "--force", "--output-root", small, before=before).reached("write")
    (small / "other").write_bytes(bytes(10 << 20))
    check_refused(run.wait(), 4, ROOM, "ran full")
    check_untouched(small)


@pytest.mark.parametrize(
    "before", ["", NO_RESERVE, "import os; del os.posix_fallocate; os.ftruncate = lambda *_: None"]
)
def test_file_size_limit(server, place, before):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    run = server.run("run", place / "r.toml", "--force", before=limit + before)
    check_refused(run, 4, "not allowed here", ROOM, "ulimit")
    check_untouched(place)


def test_read_only_disk(server, place, disk):
    small = disk(64)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    run = server.run("run", place / "r.toml", "--output-root", small, before=faults.SLOW_READS)
    check_refused(run, 4, "cannot be written to", "permissions")
    assert not (run.place / "mark-read").exists()


def test_folder_of_another_user(server, place):
    if os.geteuid() != 0:
        pytest.skip("needs root to become someone else")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        shared.chmod(0o755)
        for name in ("a.safetensors", "b.safetensors", "r.toml"):
            shutil.copy(place / name, shared)
        before = "import os; os.environ['MERGEKIT_SD_CONFIG'] = '/nowhere'; os.setuid(65534)"
        run = server.run("run", shared / "r.toml", before=before)
        check_refused(run, 4, "cannot be written to", "permissions")
        assert len(list(shared.iterdir())) == 3


def test_missing_folder(server, place):
    faults.write_recipe(place / "r.toml", output="nowhere/out.safetensors")
    check_refused(server.run("run", place / "r.toml"), 4, "does not exist", "create it")
    assert not (place / "nowhere").exists()


# --- row 33: two runs --------------------------------------------------------------------------------


def test_second_run_onto_one_output_is_refused(server, place, reference):
    first = server.start("run", place / "r.toml", "--force", before=faults.HELD_WRITES).reached("write")
    link = place.parent / f"{place.name}-link"
    link.symlink_to(place)
    for recipe in (place / "r.toml", link / "r.toml"):
        check_refused(server.run("run", recipe, "--force"), 4, "Another run is writing this file", "wait for it")
    assert not first.ended
    assert made_in(place) == OLD
    first.release()
    assert first.wait().code == 0
    assert made_in(place) == reference
    assert faults.left_in(place) == []


def test_runs_beside_each_other(server, place, reference):
    targets = [f"out-{number}.safetensors" for number in range(4)]
    for name in targets:
        faults.write_recipe(place / f"{name}.toml", output=name)
    runs = [server.start("run", place / f"{name}.toml", before=faults.HELD_WRITES) for name in targets]
    for run in runs:
        run.reached("write")
    assert len(faults.left_in(place)) == len(targets)
    for run in runs:
        run.release()
    for run in runs:
        assert run.wait().code == 0, run.stderr
    sizes = {(place / name).stat().st_size for name in targets}
    assert len(sizes) == 1
    assert all((place / name).read_bytes()[-4096:] == reference[-4096:] for name in targets)
    assert faults.left_in(place) == []


# --- row 34: inputs that change ----------------------------------------------------------------------


def replaced(path):
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def truncated(path):
    os.truncate(path, 1 << 20)


def emptied(path):
    os.truncate(path, 0)


def written(path):
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")


def removed(path):
    path.unlink()


@pytest.mark.parametrize("change", [replaced, truncated, emptied, written, removed])
@pytest.mark.parametrize("name", ["a", "b"])
def test_input_changes(server, place, name, change):
    path = place / f"{name}.safetensors"
    shutil.copy(path, place / "copy")
    (place / "copy").replace(path)  # a file of its own, no link
    run = server.start("run", place / "r.toml", "--force", before=faults.SLOW_READS).reached("read")
    change(path)
    check_refused(run.wait(), 3, "replaced, truncated or written to", re.escape(str(path)), "run again")
    check_untouched(place)
