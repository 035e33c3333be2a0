"""Outputs whole or not at all: every write call failing in turn (row 35), names, modes, leftovers, other platforms."""

import contextlib
import errno
import os
import stat
import threading
import time
from pathlib import Path

import faults
import pytest

import mergekit_sd as mk
from mergekit_sd.errors import (
    Cancelled,
    DiskFull,
    EnvironmentFault,
    InputChanged,
    NotWritable,
    TargetBusy,
    TargetLocked,
    UsageError,
)
from mergekit_sd.events import CancelToken
from mergekit_sd.execute import run as execution
from mergekit_sd.formats import claims, writing
from mergekit_sd.formats.claims import sweep
from mergekit_sd.formats.open import open_input
from mergekit_sd.formats.reading import Positional
from mergekit_sd.formats.writing import OutputFile, check_folder, check_target

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")

OLD = b"old"
NEW = os.urandom(3 << 20)
SOURCE = os.urandom(1 << 20)
WANTED = NEW + SOURCE


@pytest.fixture
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source"
    path.write_bytes(SOURCE)
    file = open_input(path)
    yield file
    file.close()


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(OLD)
    return path


def fill(output, source, commit=True):
    """Everything that a run does with its output, in several writes and a copy."""
    for start in range(0, len(NEW), 1 << 20):
        output.write(memoryview(NEW)[start : start + (1 << 20)], start)
    output.copy(source, 0, len(NEW), len(SOURCE))
    time.sleep(0.005)
    output.sync()
    if commit:
        output.commit()


def make(target, source):
    with OutputFile(target, len(WANTED)) as output:
        fill(output, source)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def descriptors():
    return set(names_in(Path("/proc/self/fd")))


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path):
    """No test leaves a descriptor or a thread."""
    before, threads = descriptors(), threading.active_count()
    yield
    assert len(descriptors() - before) <= 0
    assert threading.active_count() <= threads


# --- the way it goes ---------------------------------------------------------------------------------


def test_made_whole(target, source):
    with OutputFile(target, len(WANTED)) as output:
        fill(output, source, commit=False)
        assert target.read_bytes() == OLD
        assert len(faults.left_in(target.parent)) == 1
        output.commit()
        assert target.read_bytes() == WANTED
    assert target.read_bytes() == WANTED
    assert names_in(target.parent) == [target.name]


def test_left_without_commit(target, source):
    with OutputFile(target, len(WANTED)) as output:
        fill(output, source, commit=False)
    assert target.read_bytes() == OLD
    assert faults.left_in(target.parent) == []


def test_no_bytes_at_all(target):
    with OutputFile(target, 0) as output:
        output.sync()
        output.commit()
    assert target.read_bytes() == b""


def test_aborted_twice_spares_the_next_run(target):
    with OutputFile(target, 10) as first:
        first.abort()
        with OutputFile(target, 10) as second:
            first.abort()
            second.write(memoryview(b"0123456789"), 0)
            second.sync()
            second.commit()
    assert target.read_bytes() == b"0123456789"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_by_umask(target, source, umask):
    former = os.umask(umask)
    try:
        make(target, source)
    finally:
        os.umask(former)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("dangling", [False, True])
def test_symlinked_target_is_followed(tmp_path, source, dangling):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    if not dangling:
        real.write_bytes(OLD)
    link.symlink_to(Path("elsewhere") / "real")
    make(link, source)
    assert link.is_symlink()
    assert real.read_bytes() == WANTED
    assert names_in(tmp_path / "elsewhere") == ["real"]


@pytest.mark.parametrize("name", ["a", "x" * 255, "ä" * 127, "𝒳" * 63, "[x] *?.safetensors", "a\nb", "\udcff"])
def test_names(tmp_path, source, name):
    make(tmp_path / name, source)
    assert (tmp_path / name).read_bytes() == WANTED
    assert names_in(tmp_path) == [name]


def test_the_folder_is_synced_after_the_rename(target, source, monkeypatch):
    calls = []
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "pwrite"), (os, "close")):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), name, calls))
    make(target, source)
    order = [name for name, what in calls if name != "close" or what == "file"]
    assert order == ["pwrite"] * 3 + ["fsync", "replace", "fsync", "close"]
    assert [what for name, what in calls if name == "fsync"] == ["file", "folder"]


def recorded(real, name, calls):
    def call(*arguments):
        what = None
        if name in ("fsync", "close"):
            what = "folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "file"
        calls.append((name, what))
        return real(*arguments)

    return call


# --- what cannot be a target -------------------------------------------------------------------------


def test_folder_as_target(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        OutputFile(tmp_path, 1)


def test_pipe_and_device_as_target(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(UsageError, match="device or a pipe"):
            OutputFile(tmp_path / name, 1)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_loop_of_links_as_target(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="loop of links"):
        OutputFile(tmp_path / "a", 1)
    assert (tmp_path / "a").is_symlink()


def test_too_long_name(tmp_path):
    with pytest.raises(UsageError, match="too long"):
        check_target(tmp_path / ("x" * 256))


def test_folder_checks(tmp_path, monkeypatch):
    with pytest.raises(NotWritable, match="does not exist"):
        check_folder(tmp_path / "nowhere", 1)
    with pytest.raises(DiskFull, match=r"[\d,]+ bytes .* needed, [\d,]+ bytes .* free"):
        check_folder(tmp_path, 1 << 60)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(NotWritable, match="cannot be written to"):
        check_folder(tmp_path, 1)


# --- row 35: every call failing in turn --------------------------------------------------------------

CALLS = [
    (os, "open"),
    (os, "pwrite"),
    (os, "posix_fallocate"),
    (os, "ftruncate"),
    (os, "copy_file_range"),
    (os, "fdatasync"),
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (os, "fstat"),
    (os, "stat"),
    (fcntl, "flock"),
]


NOT_ALWAYS = ("unlink", "ftruncate", "replace", "fdatasync")  # not called on every way, or not in time
OF_THE_DISK = ("open", "pwrite", "posix_fallocate", "fsync", "fdatasync", "replace")


class Fault:
    """A call that fails the Nth time; `hit` tells whether it came to that."""

    def __init__(self, real, number, code):
        self.real, self.number, self.code = real, number, code
        self.hit = False

    def __call__(self, *arguments, **named):
        self.number -= 1
        if self.number == 0:
            self.hit = True
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **named)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("committed", [True, False], ids=["committed", "aborted"])
def test_every_call_fails_in_turn(target, source, monkeypatch, owner, name, code, committed):
    monkeypatch.setattr(writing, "FLUSH_INTERVAL", 0.001)
    monkeypatch.setattr(claims, "CLAIM_PAUSE", 0)
    for number in range(1, 200):
        target.write_bytes(OLD)
        before = descriptors()
        fault = Fault(getattr(owner, name), number, code)
        error = None
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            try:
                with OutputFile(target, len(WANTED)) as output:
                    fill(output, source, commit=committed)
            except EnvironmentFault as caught:
                error = caught
        check_one_fault(target, fault, error, committed, name)
        assert descriptors() == before
        if not fault.hit:
            assert number > 1 or name in NOT_ALWAYS
            return
    raise AssertionError("it fails for ever")


def check_one_fault(target, fault, error, committed, name):
    found = target.read_bytes()
    assert found in (OLD, WANTED)
    if error is None:
        assert found == (WANTED if committed else OLD)
    else:
        assert fault.hit
        assert error.exit_code == 4
        assert error.hint
        if fault.code in (errno.ENOSPC, errno.EDQUOT) and name in OF_THE_DISK:
            assert type(error) is DiskFull
            assert f"{len(WANTED):,} bytes" in error.message
    sweep(target.parent)  # where the removal itself failed, the next run's sweep does it
    assert faults.left_in(target.parent) == []


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate", "fsync", "replace", "fdatasync"])
def test_runs_fail_in_turn(tmp_path, monkeypatch, name):
    """The same through the engine, with its threads."""
    monkeypatch.setattr(writing, "FLUSH_INTERVAL", 0.001)
    for seed, letter in enumerate("ab"):
        faults.write_model(tmp_path / f"{letter}.safetensors", seed, tensors=2, numel=1 << 18)
    recipe = faults.write_recipe(tmp_path / "r.toml")
    target = tmp_path / "out.safetensors"
    mk.run(recipe)
    new = target.read_bytes()
    for number in range(1, 100):
        target.write_bytes(OLD)
        (tmp_path / "r.lock").unlink(missing_ok=True)
        fault = Fault(getattr(os, name), number, errno.EIO)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fault)
            sure = number == 1 and name != "fdatasync"
            with pytest.raises(NotWritable) if sure else contextlib.suppress(NotWritable):
                mk.run(recipe, force=True)
        assert target.read_bytes() in (OLD, new)
        assert faults.left_in(tmp_path) == []
        if not fault.hit:
            return
    raise AssertionError("it fails for ever")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_tells_the_bytes_even_where_they_cannot_be_asked(target, monkeypatch, code):
    monkeypatch.setattr(os, "posix_fallocate", Fault(os.posix_fallocate, 1, code))
    answers = [writing.free_bytes(target.parent)]

    def free(_):
        if answers:
            return answers.pop()
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(writing, "free_bytes", free)
    with pytest.raises(DiskFull, match=r"5 bytes \(5 B\) needed, 0 bytes \(0 B\) free"):
        OutputFile(target, 5)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES])
def test_folders_that_cannot_be_synced(target, source, monkeypatch, code):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "no")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    make(target, source)
    assert target.read_bytes() == WANTED


def test_interrupt_right_after_the_rename(target, source, monkeypatch):
    """A caller without a token: KeyboardInterrupt comes as soon as the call returns."""
    real = os.replace

    def replace(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        make(target, source)
    assert target.read_bytes() == WANTED
    assert faults.left_in(target.parent) == []


def test_no_thread_for_the_flusher(target, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError):
        OutputFile(target, 10)
    monkeypatch.undo()
    assert faults.left_in(target.parent) == []


# --- the flusher -------------------------------------------------------------------------------------


def test_error_that_only_the_flusher_saw(target, source, monkeypatch):
    """The kernel reports a lost write once: to whichever flush comes first."""
    monkeypatch.setattr(writing, "FLUSH_INTERVAL", 0.001)
    fault = Fault(os.fdatasync, 1, errno.EIO)
    monkeypatch.setattr(os, "fdatasync", fault)
    with OutputFile(target, len(WANTED)) as output:
        faults.wait_until(lambda: fault.hit)
        with pytest.raises(NotWritable, match="Input/output error"):
            fill(output, source)
    assert target.read_bytes() == OLD
    assert faults.left_in(target.parent) == []


@pytest.mark.parametrize("ending", ["commit", "abort"])
def test_flusher_ends_before_the_descriptor(target, monkeypatch, ending):
    """Also where `commit` comes without `sync`: a closed number may be another file's at once."""
    monkeypatch.setattr(writing, "FLUSH_INTERVAL", 0.001)
    flushing, late = threading.Event(), []

    def fdatasync(descriptor):
        flushing.set()
        time.sleep(0.05)
        try:
            os.fstat(descriptor)
        except OSError as error:
            late.append(error)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with OutputFile(target, 10) as output:
        assert flushing.wait(5)
        getattr(output, ending)()
        assert not [thread for thread in threading.enumerate() if thread.name == "flusher"]
    assert late == []


def test_impatient_caller_waits_for_the_threads():
    """A second KeyboardInterrupt while threads are joined: they still use files that are closed next."""
    ended, interrupts = [], iter([KeyboardInterrupt(), KeyboardInterrupt()])

    class Impatient(threading.Thread):
        def join(self, timeout=None):
            for interrupt in interrupts:
                raise interrupt
            super().join(timeout)

    def work():
        time.sleep(0.2)
        ended.append(True)

    thread = Impatient(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        execution._joined([thread])
    assert ended == [True]


# --- leftovers and locks -----------------------------------------------------------------------------


def test_sweep_removes_only_dead_leftovers(tmp_path, source):
    dead = tmp_path / f".dead{claims.TEMPORARY_SUFFIX}"
    dead.write_bytes(b"x")
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / f".link{claims.TEMPORARY_SUFFIX}").symlink_to("kept")
    os.mkfifo(tmp_path / f".pipe{claims.TEMPORARY_SUFFIX}")
    (tmp_path / f".folder{claims.TEMPORARY_SUFFIX}").mkdir()
    (tmp_path / f"no dot{claims.TEMPORARY_SUFFIX}").write_bytes(b"x")
    before = set(names_in(tmp_path)) - {dead.name}
    with OutputFile(tmp_path / "live", 10) as live:
        before.add(live.temporary.name)
        make(tmp_path / "out", source)
        assert set(names_in(tmp_path)) == before | {"out"}
        dead.write_bytes(b"x")
        sweep(tmp_path)
        assert set(names_in(tmp_path)) == before | {"out"}
        assert live.temporary.exists()
    assert not live.temporary.exists()
    assert not dead.exists()
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_sweep_does_without_the_folder(tmp_path):
    sweep(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_second_writer_is_refused(target, source):
    with OutputFile(target, len(WANTED)) as first:
        for name in (target, target.parent / "." / target.name):
            with pytest.raises(TargetLocked, match="Another run"):
                OutputFile(name, 10)
        fill(first, source)
    assert target.read_bytes() == WANTED


def test_without_locks_nothing_is_swept(target, monkeypatch):
    """On a disk that has no locks, a live run cannot be told from a dead one."""
    monkeypatch.setattr(claims, "CLAIM_PAUSE", 0)
    monkeypatch.setattr(fcntl, "flock", Fault(fcntl.flock, -1, errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with OutputFile(target, 10) as first:
        with pytest.raises(TargetLocked) as caught:
            OutputFile(target, 10)
        assert first.temporary.name in caught.value.hint
        first.write(memoryview(b"0123456789"), 0)
        first.sync()
        first.commit()
    assert target.read_bytes() == b"0123456789"


def test_sweepers_and_claimers_do_not_meet(tmp_path):
    """Writers of different targets in one folder sweep each other's files in the moment before the lock."""
    refused = []

    def write(number):
        for _ in range(60):
            try:
                with OutputFile(tmp_path / f"out-{number}", 1) as output:
                    output.commit()
            except TargetLocked as error:
                refused.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == []
    assert faults.left_in(tmp_path) == []


def test_a_sweep_between_creating_and_locking(target, monkeypatch):
    """The worst moment: another sweep has just locked the new file, and holds it while we try again."""
    real, held = claims._lock, []

    def lock(descriptor):
        if not held:
            other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            assert real(other)
            held.append(other)
            threading.Timer(0.05, os.close, [other]).start()
        return real(descriptor)

    monkeypatch.setattr(claims, "_lock", lock)
    with OutputFile(target, 1) as output:
        output.write(memoryview(b"x"), 0)
        output.sync()
        output.commit()
    assert target.read_bytes() == b"x"
    assert faults.left_in(target.parent) == []


# --- platforms that lack calls -----------------------------------------------------------------------

LACKING = ["preadv", "pwrite", "copy_file_range", "posix_fallocate", "fdatasync"]


def bare(monkeypatch, windows):
    for name in LACKING:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(claims, "WINDOWS", windows)
    monkeypatch.setattr(writing, "RENAME_PAUSE", 0)


@pytest.mark.parametrize("windows", [False, True])
def test_without_the_calls(target, source, monkeypatch, windows):
    bare(monkeypatch, windows)
    make(target, source)
    assert target.read_bytes() == WANTED
    with OutputFile(target, 10) as output:
        output.write(memoryview(b"x"), 0)
    assert target.read_bytes() == WANTED
    dead = target.parent / f".dead{claims.TEMPORARY_SUFFIX}"
    dead.write_bytes(b"x")
    with OutputFile(target, 10) as live:
        assert not dead.exists()
        before = descriptors()
        sweep(target.parent)  # of a live file: its descriptor must not stay open
        assert descriptors() == before
        assert live.temporary.exists()
        with pytest.raises(TargetLocked):
            OutputFile(target, 10)
    assert faults.left_in(target.parent) == []


@pytest.mark.parametrize("windows", [False, True])
def test_a_run_without_the_calls(tmp_path, monkeypatch, windows):
    for seed, letter in enumerate("ab"):
        faults.write_model(tmp_path / f"{letter}.safetensors", seed, tensors=3, numel=1 << 20)
    recipe = faults.write_recipe(tmp_path / "r.toml")
    mk.run(recipe)
    wanted = (tmp_path / "out.safetensors").read_bytes()
    bare(monkeypatch, windows)
    mk.run(recipe, force=True, threads=4)
    assert (tmp_path / "out.safetensors").read_bytes() == wanted
    assert faults.left_in(tmp_path) == []


def test_seeks_do_not_cross(tmp_path, monkeypatch):
    """Without positional calls, threads share one position."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096)
    bare(monkeypatch, False)
    descriptor = os.open(path, os.O_RDWR)
    file, wrong = Positional(descriptor), []

    def work(number):
        buffer = bytearray(256)
        for at in range(number * 256, 1 << 20, 2048):
            file.read(memoryview(buffer), at)
            if buffer != bytes(range(256)):
                wrong.append(at)
            file.write(memoryview(buffer), at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert wrong == []
    assert path.read_bytes() == bytes(range(256)) * 4096


def test_target_held_open_on_windows(target, source, monkeypatch):
    bare(monkeypatch, True)
    (target.parent / "out.finished.safetensors").write_bytes(b"of an earlier time")
    real, tries = os.replace, []

    def replace(one, other):
        if Path(other) == target:
            tries.append(other)
            raise PermissionError(errno.EACCES, "held")
        real(one, other)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(TargetBusy, match=r"out\.finished-2\.safetensors") as caught:
        make(target, source)
    assert caught.value.exit_code == 4
    assert "unload" in caught.value.hint
    assert len(tries) == writing.RENAME_TRIES
    assert target.read_bytes() == OLD
    assert (target.parent / "out.finished-2.safetensors").read_bytes() == WANTED
    assert (target.parent / "out.finished.safetensors").read_bytes() == b"of an earlier time"
    assert faults.left_in(target.parent) == []


def test_target_held_for_a_moment_on_windows(target, source, monkeypatch):
    bare(monkeypatch, True)
    fault = Fault(os.replace, 1, errno.EACCES)
    monkeypatch.setattr(os, "replace", fault)
    make(target, source)
    assert fault.hit
    assert target.read_bytes() == WANTED


def test_rename_refused_elsewhere(target, source, monkeypatch):
    """Not on Windows, a refused rename is what it says."""
    monkeypatch.setattr(os, "replace", Fault(os.replace, 1, errno.EACCES))
    with pytest.raises(NotWritable):
        make(target, source)
    assert target.read_bytes() == OLD
    assert faults.left_in(target.parent) == []


@pytest.mark.parametrize("name", ["a" * 240 + ".safetensors", "ä" * 120 + ".safetensors", "x" * 255])
def test_spare_names_fit(tmp_path, name):
    spare = writing._spare(tmp_path / name)
    assert ".finished" in spare.name
    spare.write_bytes(b"")
    assert writing._spare(tmp_path / name) != spare


# --- copies and changing inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False])
def test_source_cut_short_while_copying(target, source, monkeypatch, kernel):
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    os.truncate(source.path, 1000)
    with pytest.raises(InputChanged), OutputFile(target, len(SOURCE)) as output:
        output.copy(source, 0, 0, len(SOURCE))
    assert target.read_bytes() == OLD
    assert faults.left_in(target.parent) == []


def test_closed_input_stays_closed(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    file = open_input(tmp_path / "file")
    number, _ = file.in_file(0)
    file.close()
    other = os.open(tmp_path / "file", os.O_RDONLY)
    assert other == number
    file.close()
    os.fstat(other)
    os.close(other)


# --- cancelling through the API ----------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    for seed, letter in enumerate("ab"):
        faults.write_model(tmp_path / f"{letter}.safetensors", seed, tensors=1, numel=1 << 18)
    return faults.write_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("metadata", ["full", "webui"])
def test_cancelled_before_a_byte_is_written(tmp_path, recipe, metadata):
    token, events = CancelToken(), []
    token.cancel()
    with pytest.raises(Cancelled):
        mk.run(recipe, cancel=token, metadata=metadata, on_event=events.append)
    assert metadata == "full" or events == []  # not even the parents are hashed to their ends
    assert not (tmp_path / "out.safetensors").exists()
    assert faults.left_in(tmp_path) == []


def test_a_token_listens_while_there_is_something_to_remove(tmp_path, recipe, monkeypatch):
    """Then a signal handler leaves the ending to the run, which cannot be torn out of its cleaning up."""
    token, seen = CancelToken(), []
    for name in ("claim", "sync_folder"):
        real = getattr(writing, name)
        monkeypatch.setattr(writing, name, lambda *args, real=real: seen.append(token.listening) or real(*args))
    mk.run(recipe, cancel=token)
    assert seen == [True, True]
    assert not token.listening
