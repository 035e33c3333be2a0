"""Jobs: commands of the engine in child processes, one at a time, told as frozen values.

Owns the queue, the children and what they say: events as JSON lines on stderr, the report on stdout. A child
ends when its standard input is closed (see `child`): that is how a job is cancelled, and none outlives the UI.
Must not know widgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mergekit_sd.errors import EnvironmentFault, MergekitError
from mergekit_sd_tui import job_words

State: TypeAlias = Literal["queued", "running", "cancelling", "cancelled", "done", "failed"]

MOST_LINES = 500  # of a job's log
TELL_SECONDS = 0.1  # between two tellings of progress
GRACE = 20.0  # seconds that a child has to end when the UI is left; then it is killed
CHUNK = 1 << 16
CANCELLED = 130


@dataclass(frozen=True, slots=True)
class Job:
    """A command: what it is, how far it is, what came of it.

    `done` of `total` bytes (or steps, unless `in_bytes`) of the `stage` after `seconds`; `files` are those that
    it wrote.
    """

    id: int
    title: str
    arguments: tuple[str, ...]
    state: State = "queued"
    stage: str = ""
    done: int = 0
    total: int = 0
    in_bytes: bool = True
    seconds: float = 0.0
    log: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    report: Mapping[str, Any] | None = None
    error: MergekitError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it goes on or is to come."""
        return self.state in ("cancelled", "done", "failed")

    @property
    def seconds_left(self) -> float | None:
        """As long as the rest takes at the pace so far; None where there is no pace yet."""
        if self.state != "running" or not (self.done and self.seconds and self.total):
            return None
        return max(self.total - self.done, 0) * self.seconds / self.done

    @property
    def pictures(self) -> Path | None:
        """The folder of the pictures that it drew."""
        report = self.report or {}
        drawn = report.get("samples") or (report if "pictures" in report else {})
        folder = drawn.get("folder") if isinstance(drawn, Mapping) else None
        return Path(folder).absolute() if folder else None


class JobQueue:
    """Runs jobs in their order. All of it belongs to the thread of the event loop.

    `on_change` is told all jobs whenever one of them changes, `on_end` each one that has ended.
    """

    def __init__(self, on_change: Callable[[tuple[Job, ...]], None], on_end: Callable[[Job], None]) -> None:
        self._on_change = on_change
        self._on_end = on_end
        self._jobs: dict[int, Job] = {}
        self._last = 0
        self._process: asyncio.subprocess.Process | None = None
        self._runner: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All of them, in the order of submission."""
        return tuple(self._jobs.values())

    def submit(self, title: str, arguments: Sequence[str]) -> Job:
        """Put `python -m mergekit_sd ARGUMENTS --json` at the end of the queue."""
        self._last += 1
        job = self._jobs[self._last] = Job(self._last, title, tuple(arguments))
        self._tell()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run_all())
        return job

    def cancel(self, number: int) -> None:
        """Stop a job: at once while it is queued, else it is "cancelling" until its process has ended."""
        job = self._jobs[number]
        if job.state == "queued":
            self._end(number, state="cancelled")
        elif job.state == "running":
            self._change(number, state="cancelling")
            self._close_input()

    def retry(self, number: int) -> Job:
        """Put the same command into the queue once more."""
        return self.submit(self._jobs[number].title, self._jobs[number].arguments)

    def remove(self, number: int) -> None:
        """Forget a job that is over."""
        if self._jobs[number].is_over:
            del self._jobs[number]
            self._tell()

    async def close(self) -> None:
        """Cancel everything, and wait until no process is left."""
        for job in self.jobs:
            self.cancel(job.id)
        if self._runner is not None:
            await asyncio.wait([self._runner], timeout=GRACE)
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
            await self._runner
        if self._later is not None:
            self._later.cancel()

    # --- what is told ---

    def _change(self, number: int, **changes: Any) -> None:
        self._jobs[number] = replace(self._jobs[number], **changes)
        self._tell()

    def _end(self, number: int, **changes: Any) -> None:
        self._change(number, **changes)
        self._on_end(self._jobs[number])

    def _tell(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._on_change(self.jobs)

    def _tell_soon(self) -> None:
        """Events come faster than anyone can read."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    # --- the child ---

    async def _run_all(self) -> None:
        while job := next((each for each in self.jobs if each.state == "queued"), None):
            await self._run(job)

    async def _run(self, job: Job) -> None:
        self._change(job.id, state="running")
        try:
            process = self._process = await _started(job.arguments)
        except (OSError, ValueError) as error:
            fault = EnvironmentFault(f"The process cannot be started: {error}.", hint="r tries again")
            self._end(job.id, state="failed", error=fault)
            return
        if self._jobs[job.id].state == "cancelling":
            self._close_input()
        assert process.stdout is not None
        assert process.stderr is not None
        report, _ = await asyncio.gather(process.stdout.read(), self._listen(job.id, process.stderr))
        code = await process.wait()
        self._close_input()
        self._process = None
        self._conclude(self._jobs[job.id], code, _parsed(report))

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _listen(self, number: int, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            job, event = self._jobs[number], _parsed(line)
            if event is not None and "event" in event:
                job = _heard(job, event)
            elif line.strip():
                job = _logged(job, line.decode("utf-8", "replace").rstrip())
            self._jobs[number] = job
            self._tell_soon()

    def _conclude(self, job: Job, code: int, report: Mapping[str, Any] | None) -> None:
        if code == 0:
            files = job.files or job_words.paths_of(report or {})
            self._end(job.id, state="done", report=report, files=files)
        elif code == CANCELLED:
            self._end(job.id, state="cancelled", report=report)
        else:
            told = (report or {}).get("error")
            error = job_words.error_of(told) if isinstance(told, Mapping) else job.error or _death(code)
            self._end(job.id, state="failed", report=report, error=error)


async def _started(arguments: Sequence[str]) -> asyncio.subprocess.Process:
    """The child; it shares no terminal signals with us, and no module of the current folder can stand for its own."""
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        import subprocess

        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "mergekit_sd_tui.child", *arguments, "--json"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        **apart,
    )


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length: an error may name thousands of tensors."""
    rest = b""
    while chunk := await stream.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A JSON object, if it is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _heard(job: Job, event: Mapping[str, Any]) -> Job:
    """The job after an event."""
    kind = event["event"]
    if kind == "output_started":
        job = replace(job, stage=str(event["output"]), done=0, total=event["bytes"], in_bytes=True, seconds=0.0)
    elif kind in ("progress", "hashing_progress"):
        job = replace(job, done=event["done"], total=event["bytes"], in_bytes=True, seconds=event["seconds"])
    elif kind == "sampling":
        stage = f"{event['model']}: {event['stage']}"
        job = _logged(job, stage) if stage != job.stage else job
        job = replace(
            job, stage=stage, done=event["done"], total=event["steps"], in_bytes=False, seconds=event["seconds"]
        )
    elif kind == "output_finished":
        job = replace(
            job, done=event["bytes"], seconds=event["seconds"], files=(*job.files, Path(event["path"]).absolute())
        )
    elif kind == "error":
        job = replace(job, error=job_words.error_of(event))
    words = job_words.told(event)
    return _logged(job, words) if words else job


def _logged(job: Job, line: str) -> Job:
    return replace(job, log=(*job.log, line)[-MOST_LINES:])


def _death(code: int) -> MergekitError:
    """Why a child that gave no reason is no more."""
    if code >= 0:
        return MergekitError(f"The process ended with code {code} and gave no reason.", hint="look at the log")
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = "the system does so when the memory runs out: close other programs" if name == "SIGKILL" else None
        return MergekitError(f"The process was killed by {name}.", hint=hint)
    return MergekitError(f"The process was killed by the signal {-code}.")
