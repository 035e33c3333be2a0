"""roots, doctor, completion, and streams that cannot encode our signs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mergekit_sd import doctor
from mergekit_sd.cli import streams
from mergekit_sd.cli.main import run

NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    folder = tmp_path / "config"
    monkeypatch.setenv("MERGEKIT_SD_CONFIG", str(folder))
    return folder


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def ran(capsys, *arguments, code=0):
    assert run(list(arguments)) == code
    return capsys.readouterr()


# --- roots ---


def test_a_root_is_added_and_listed(capsys, models, config):
    assert ran(capsys, "roots", "add", "webui", str(models)).out == f"webui: {models}\n"
    assert ran(capsys, "roots", "list").out == f"webui  {models}\n"
    listed = json.loads(ran(capsys, "roots", "list", "--json").out)
    assert listed == {
        "file": str(config / "roots.json"),
        "roots": [{"name": "webui", "path": str(models), "exists": True}],
    }


def test_a_known_name_gets_the_new_folder_and_says_so(capsys, models, tmp_path):
    ran(capsys, "roots", "add", "webui", str(tmp_path))
    assert f"was {tmp_path} until now" in ran(capsys, "roots", "add", "webui", str(models)).err
    told = json.loads(ran(capsys, "roots", "add", "webui", str(tmp_path), "--json").out)
    assert told == {"name": "webui", "path": str(tmp_path), "replaced": str(models)}


def test_no_roots_are_an_empty_list(capsys):
    listed = ran(capsys, "roots", "list")
    assert listed.out == ""
    assert "roots add NAME DIR" in listed.err
    assert json.loads(ran(capsys, "roots", "list", "--json").out)["roots"] == []


def test_a_root_that_went_away_is_marked(capsys, models):
    ran(capsys, "roots", "add", "webui", str(models))
    models.rmdir()
    assert "(not there)" in ran(capsys, "roots", "list").out
    assert json.loads(ran(capsys, "roots", "list", "--json").out)["roots"][0]["exists"] is False


@pytest.mark.parametrize("name", ["w", "", "a b", "a:b", "a/b", "a\\b", "a\tb", "a\x1b[31m", 'a"b'])
def test_a_name_that_cannot_be_is_refused(capsys, models, name, config):
    refusal = ran(capsys, "roots", "add", name, str(models), code=2)
    assert refusal.err.startswith("error: ")
    assert "\x1b[31m" not in refusal.err
    assert not config.exists()


def test_a_folder_that_is_none_is_refused(capsys, tmp_path, config):
    (tmp_path / "file").touch()
    for folder in ("nowhere", "file"):
        assert "This is not a folder." in ran(capsys, "roots", "add", "webui", str(tmp_path / folder), code=2).err
    assert not config.exists()


def test_a_broken_list_is_refused_and_kept(capsys, models, config):
    config.mkdir()
    for text in ("{", "[]", '{"webui": 1}'):
        (config / "roots.json").write_text(text)
        assert "cannot be read" in ran(capsys, "roots", "list", code=2).err
        assert "cannot be read" in ran(capsys, "roots", "add", "webui", str(models), code=2).err
        assert (config / "roots.json").read_text() == text


def test_a_list_that_cannot_be_written_is_the_environments_fault(capsys, models, config, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    error = json.loads(ran(capsys, "roots", "add", "webui", str(models), "--json", code=4).out)["error"]
    assert (error["type"], error["file"]) == ("NotWritable", str(config / "roots.json"))


def test_a_list_that_cannot_be_reached_is_the_environments_fault(capsys, models, config):
    config.write_text("a file where the folder should be")
    for command in (["list"], ["add", "webui", str(models)]):
        assert "cannot be read" in ran(capsys, "roots", *command, code=4).err


def test_an_empty_variable_names_no_folder(monkeypatch):
    from mergekit_sd.recipe.roots import config_folder

    monkeypatch.setenv("MERGEKIT_SD_CONFIG", "")
    assert config_folder().is_absolute()


def test_a_misspelt_subcommand_is_refused(capsys):
    assert "list" in ran(capsys, "roots", "lst", code=2).err


# --- doctor ---


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_doctor_checks_this_machine(capsys, monkeypatch, models):
    monkeypatch.chdir(models)
    report = json.loads(ran(capsys, "doctor", "--json").out)
    names = [check["name"] for check in report["checks"]]
    assert names[:7] == ["python", "torch", "device", "cores", "memory", "this folder", "this folder, disk"]
    assert names[-2:] == ["roots", "configuration"]
    assert report["ok"] is True
    assert {check["state"] for check in report["checks"]} <= {"ok", "note"}
    assert list(models.iterdir()) == []


def test_doctor_exits_4_for_a_problem_and_says_what_to_do(capsys, monkeypatch, models):
    ran(capsys, "roots", "add", "webui", str(models))
    models.rmdir()
    monkeypatch.setattr("mergekit_sd.doctor._torch", lambda: doctor.judge_torch("2.10.0"))
    told = ran(capsys, "doctor", code=4).out
    assert "problem  root webui" in told
    assert "roots add webui DIR" in " ".join(told.split())
    assert "1 problem." in told
    report = json.loads(ran(capsys, "doctor", "--json", code=4).out)
    assert report["ok"] is False


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.10.0", "ok"), ("2.13.1+cpu", "ok"), ("3.0.0a0", "ok"), ("2.9.1+cu128", "problem"), ("1.13.1", "problem")],
)
def test_torch_must_be_safe(version, state):
    finding = doctor.judge_torch(version)
    assert finding.state == state
    assert state == "ok" or "CVE-2025-32434" in (finding.todo or "")


def test_a_missing_or_broken_torch_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    assert by_name([doctor._torch()])["torch"].todo == doctor.NO_TORCH
    assert doctor._device().state == "note"


def fake_torch(monkeypatch, *, cuda=None, devices=0, mps=False):
    properties = types.SimpleNamespace(name="GPU", total_memory=8 << 30)
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(device_count=lambda: devices, get_device_properties=lambda _: properties),
        backends=types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: mps)),
        version=types.SimpleNamespace(cuda=cuda, hip=None),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)


def test_devices_are_told(monkeypatch):
    fake_torch(monkeypatch, cuda="12.8", devices=2)
    assert doctor._device() == doctor.Finding("device", "ok", "cuda:0 GPU, 8.00 GiB; cuda:1 GPU, 8.00 GiB")
    fake_torch(monkeypatch, mps=True)
    assert doctor._device().found == "Apple GPU (mps)"
    fake_torch(monkeypatch, cuda="12.8")
    assert (doctor._device().state, doctor._device().todo) == ("note", doctor.NO_DRIVER)
    fake_torch(monkeypatch)
    assert (doctor._device().state, doctor._device().found) == ("ok", "CPU")


def test_memory_is_judged():
    assert doctor.judge_memory(8 << 30, 16 << 30) == doctor.Finding("memory", "ok", "8.00 GiB free of 16.00 GiB")
    assert doctor.judge_memory(1 << 30, 16 << 30).state == "note"
    assert doctor.judge_memory(100 << 20, 16 << 30).state == "problem"
    assert doctor.judge_memory(None, 16 << 30).found == "16.00 GiB in all"
    assert doctor.available_memory() is not None


def test_a_system_that_does_not_tell_its_memory_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: None)
    assert doctor._memory().state == "note"


def test_a_containers_cores_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda: 0.5)
    assert doctor._cores().state == "note"
    assert "--threads 1" in doctor._cores().todo


def test_a_disk_is_judged():
    can = dict.fromkeys(doctor.TRIALS, True)
    assert doctor.judge_disk("disk", can).state == "ok"
    for what in can:
        finding = doctor.judge_disk("disk", can | {what: False})
        assert finding.state == ("problem" if what == "atomic rename" else "note")
        assert (finding.found, finding.todo) == (f"no {what}", doctor.WITHOUT[what])
    assert set(doctor.WITHOUT) == set(doctor.TRIALS)


def test_a_full_disk_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1 << 30))
    (finding,) = doctor.check_folder("this folder", tmp_path, trial=False)
    assert (finding.state, finding.found) == ("note", f"{tmp_path}: 1.00 GiB free")


def test_a_folder_that_is_gone_is_a_problem(tmp_path):
    (finding,) = doctor.check_folder("this folder", tmp_path / "gone")
    assert finding.state == "problem"


def test_a_trial_that_cannot_write_is_a_note_and_leaves_nothing(monkeypatch, tmp_path):
    def full(_folder: Path) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(doctor.TRIALS, "locks", full)
    assert "No space left" in doctor._try_out("disk", tmp_path).found
    assert list(tmp_path.iterdir()) == []


def test_calls_that_the_system_lacks_are_found_lacking(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert doctor._try_out("disk", tmp_path).found == "no preallocation, no kernel copies"


def test_locks_that_do_not_lock_are_seen(monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert not doctor._locks(tmp_path)


def test_a_broken_list_of_roots_is_a_problem(config):
    config.mkdir()
    (config / "roots.json").write_text("{")
    (finding,) = doctor.check_roots()
    assert finding.state == "problem"
    assert "mend or delete" in finding.todo


def test_a_configuration_that_cannot_be_written_is_a_problem(config):
    assert doctor.check_config().state == "ok"
    assert not config.exists()
    config.write_text("a file where the folder should be")
    assert doctor.check_config().state == "problem"


@NOT_ROOT
def test_a_folder_without_permission_is_seen(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert doctor._try_out("disk", tmp_path).state == "note"
    finally:
        tmp_path.chmod(0o700)


def test_doctors_names_are_escaped(capsys, models, config, monkeypatch):
    config.mkdir()
    (config / "roots.json").write_text(json.dumps({"a\x1b[31m": str(models)}))
    monkeypatch.setattr(doctor, "_torch", lambda: doctor.judge_torch("2.10.0"))
    out = ran(capsys, "doctor").out
    assert "a\\x1b[31m" in out
    assert "\x1b[31m" not in out
    assert "\x1b[31m" not in ran(capsys, "roots", "list").out


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script_and_where_it_goes(capsys, monkeypatch, shell):
    told = ran(capsys, "completion", shell)
    assert f"_MERGEKIT_SD_COMPLETE={shell}_complete" in told.out
    assert len(told.err.splitlines()) == 1
    assert "Put it into ~/" in told.err
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert ran(capsys, "completion").out == told.out
    report = json.loads(ran(capsys, "completion", "--json").out)
    assert (report["shell"], report["script"].strip()) == (shell, told.out.strip())


def test_a_shell_that_is_not_known_is_refused(capsys, monkeypatch):
    assert "no completion" in ran(capsys, "completion", "tcsh", code=2).err
    assert 'did you mean "bash"?' in ran(capsys, "completion", "bsh", code=2).err
    monkeypatch.setenv("SHELL", "/bin/ksh")
    assert 'no completion for "ksh"' in ran(capsys, "completion", code=2).err
    monkeypatch.delenv("SHELL")
    assert "$SHELL is not set" in ran(capsys, "completion", code=2).err


def completed(words, cword=None):
    environment = os.environ | {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1 if cword is None else cword),
        "_MERGEKIT_SD_COMPLETE": "bash_complete",
    }
    command = [sys.executable, "-X", "importtime", "-m", "mergekit_sd"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "| torch" not in result.stderr
    return [line.removeprefix("plain,") for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mergekit-sd pre", ["presets"]),
        ("mergekit-sd ops add_d", ["add_difference"]),
        ("mergekit-sd presets cos", ["COSINE"]),
        ("mergekit-sd roots ", ["add", "list"]),
        ("mergekit-sd ops --j", ["--json"]),
    ],
)
def test_words_are_completed(words, expected):
    assert completed(words) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_takes_the_script(capsys):
    script = ran(capsys, "completion", "bash").out
    result = subprocess.run(["bash", "-c", f"{script}\ncomplete -p mergekit-sd"], capture_output=True, check=True)
    assert b"_mergekit_sd_completion mergekit-sd" in result.stdout


# --- streams ---


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("cp1252", "(1 - alpha)·a 18 Omega ?"),
        ("ascii", "(1 - alpha)*a 18 Omega ?"),
        ("utf-8", "(1 − alpha)·a ▁█ Ω 加"),
    ],
)
def test_what_cannot_be_encoded_is_spelt_plainly(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(stream):
        streams.make_speakable()
        print("(1 − alpha)·a ▁█ Ω 加", end="")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == shown
