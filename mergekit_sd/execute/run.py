"""A plan becomes files: one streaming pass per output.

Owns the order of a run: checks, threads, the wait, findings, hashes, the rename. Must not know
recipes' syntax or the command line.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_sd.errors import Cancelled, PinMismatch
from mergekit_sd.events import CancelToken, Listener, Noted, OutputFinished, OutputStarted, Progressed, ignore
from mergekit_sd.execute.compare import Comparison
from mergekit_sd.execute.ledger import Leaves, Ledger
from mergekit_sd.execute.making import Nowhere, constants_of, data_hash, made_dtype
from mergekit_sd.execute.memory import check_device, memory_of
from mergekit_sd.execute.packing import Held
from mergekit_sd.execute.surveys import needed_surveys, survey_models
from mergekit_sd.execute.tasks import CHUNK, Task, cut
from mergekit_sd.execute.worker import Sink, Worker
from mergekit_sd.formats.claims import sweep
from mergekit_sd.formats.dtypes import Dtype
from mergekit_sd.formats.hashing import (
    LEAF,
    FileHashes,
    OnBytes,
    auto_v1,
    default_threads,
    leaf_digest,
    sha256_file,
)
from mergekit_sd.formats.open import open_input, read_bytes
from mergekit_sd.formats.reading import InputFile
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.formats.writing import OutputFile
from mergekit_sd.lazy import torch
from mergekit_sd.planning.build import check_targets, layout_output, place_output
from mergekit_sd.planning.expression import Survey
from mergekit_sd.planning.values import How, Plan, PlannedOutput

MEMORY_BUDGET = 64 * 1024 * 1024
MOST_LEFT = LEAF  # bytes of a file that are read for its hash alone
TICK = 0.1  # seconds between progress events


FileHasher: TypeAlias = Callable[[Path, OnBytes], FileHashes]


def _file_hashes(path: Path, on_bytes: OnBytes) -> FileHashes:
    return FileHashes(sha256_file(path, on_bytes), None, auto_v1(path))


@dataclass(frozen=True)
class RunOptions:
    """How to run a plan; none of it changes the bytes, but for `allow_nonfinite` and `device` (the last bits).

    `hashing`: make content hashes while streaming. `sha256`: hash
    every input file, for the lock. `expected`: output name to the content hash
    that a lock demands; `expected_inputs`: the same for model names. `file_hashes`: makes sha256 and
    A1111's old hash of an input, or knows them.
    """

    force: bool = False
    threads: int | None = None
    allow_nonfinite: bool = False
    scan: bool = False
    hashing: bool = True
    sha256: bool = False
    memory: int = MEMORY_BUDGET
    device: str = "cpu"
    expected: Mapping[str, str] = field(default_factory=dict)
    expected_inputs: Mapping[str, str] = field(default_factory=dict)
    file_hashes: FileHasher = _file_hashes


@dataclass(frozen=True)
class OutputReport:
    """What was made: hashes by model name for what was read, clamped elements by tensor."""

    name: str
    path: Path
    bytes: int
    content_hash: str | None
    inputs: Mapping[str, str]
    counts: Mapping[How, int]
    dropped: Mapping[str, int]
    clamped: Mapping[str, int]
    nonfinite: Mapping[str, int]
    seconds: float
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Of a LoRA: what its factors keep of the change."""

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class Made:
    """What a run made, and of what.

    By model name: the content hashes of what was used, and of the whole file where it was as good as
    read (none without hashing); sha256 where known.
    """

    outputs: tuple[OutputReport, ...]
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    sha256: Mapping[str, str]


def execute(
    plan: Plan,
    options: RunOptions = RunOptions(),
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> Made:
    """Make every output of a plan, one after the other, each appearing as it is done."""
    for output in plan.outputs:
        sweep(output.path.resolve().parent)  # before the room is looked at: killed runs' leftovers take some
    check_targets(plan, options.force)
    check_device(options.device)
    cancel = cancel or CancelToken()
    files = check_pins(plan, cancel, every=options.sha256 or plan.metadata == "webui", hasher=options.file_hashes)
    run = _Run(plan, options, files, Leaves(), on_event, cancel)
    for warning in plan.warnings:
        on_event(Noted(warning))
    reports = tuple(write_output(run, output) for output in plan.outputs)
    sha256 = {plan.inputs[number].name: each.sha256 for number, each in files.items()}
    if not options.hashing:
        return Made(reports, {}, {}, sha256)
    return Made(reports, run.input_hashes(plan.outputs), run.file_hashes(plan.outputs), sha256)


def compare(
    plan: Plan,
    path: Path,
    options: RunOptions = RunOptions(),
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> tuple[str, ...]:
    """Compute a plan's only output and compare it with the file at `path`; nothing is written.

    Returns the names of the tensors that differ ("(header)" for the header); raises PinMismatch
    where the file's size shows it at once.
    """
    cancel = cancel or CancelToken()
    files = check_pins(plan, cancel, every=plan.metadata == "webui", hasher=options.file_hashes)
    run = _Run(plan, options, files, Leaves(), on_event, cancel)
    output = plan.outputs[0]
    output = place_output(plan, made_output(run, output) if output.making else output, files)
    there = open_input(path)
    try:
        if there.state.size != output.size:
            raise PinMismatch(f"The file has {there.state.size:,} bytes, its recipe makes {output.size:,}.", file=path)
        sink = Comparison(there, [tensor.info for tensor in output.tensors])
        on_event(OutputStarted(output.name, str(path), output.size))
        stream(run, output, sink)
        there.check_unchanged()
    finally:
        there.close()
    return tuple(sorted(sink.different))


@dataclass(frozen=True)
class _Run:
    """What all passes of a run share."""

    plan: Plan
    options: RunOptions
    files: Mapping[int, FileHashes]
    leaves: Leaves
    on_event: Listener
    cancel: CancelToken

    def input_hashes(self, outputs: Sequence[PlannedOutput]) -> dict[str, str]:
        """The content hash of what these outputs use of each model, once they are computed."""
        used = _used(outputs)
        return {self.plan.inputs[n].name: self.leaves.content_hash(n, used[n]) for n in sorted(used)}

    def file_hashes(self, outputs: Sequence[PlannedOutput]) -> dict[str, str]:
        """The content hash of each model's whole file, where hardly more was left to read of it."""
        found = {}
        for number, tensors in _used(outputs).items():
            source = self.plan.inputs[number]
            rest = [tensor for name, tensor in source.file.tensors.items() if name not in tensors]
            if sum(tensor.nbytes for tensor in rest) > MOST_LEFT:
                continue
            for tensor in rest:
                self.leaves.keep(
                    number, tensor.name, 0, [leaf_digest(read_bytes(source.file, tensor))] if tensor.nbytes else []
                )
            found[source.name] = self.leaves.content_hash(number, source.file.tensors)
        return found


def _used(outputs: Sequence[PlannedOutput]) -> dict[int, dict[str, TensorInfo]]:
    """What outputs read of each model, by its number and the tensors' names."""
    used: dict[int, dict[str, TensorInfo]] = {}
    for output in outputs:
        for number, reads in output.reads().items():
            used.setdefault(number, {}).update({name: read.tensor for name, read in reads.items()})
    return used


def check_pins(
    plan: Plan, cancel: CancelToken | None = None, *, every: bool = False, hasher: FileHasher = _file_hashes
) -> dict[int, FileHashes]:
    """The file hashes that are pinned or asked for (`every`), by input. Raises PinMismatch before a byte is written."""
    pins = {number: plan.recipe.models[source.name].sha256 for number, source in enumerate(plan.inputs)}
    wanted = [n for n, pin in pins.items() if pin or every]
    for source in (plan.inputs[n] for n in wanted):
        if source.file.parts:
            raise plan.recipe.error(
                f'"{source.name}" is a folder of several files, which has no sha256.',
                ("models", source.name),
                hint="do without sha256 and --metadata webui, or write it as one file first: mergekit-sd prune",
            )
    files = dict(zip(wanted, _hashed([plan.inputs[n].file.path for n in wanted], cancel, hasher), strict=True))
    for number, hashes in files.items():
        pin, source = pins[number], plan.inputs[number]
        if pin and hashes.sha256 != pin.lower():
            place = plan.recipe.error("", ("models", source.name, "sha256"))
            raise PinMismatch(
                f'"{source.name}" is pinned to another file: its sha256 is {hashes.sha256}.',
                file=source.file.path,
                key=place.key,
                line=place.line,
                column=place.column,
                hint="take the file that was meant, or change the pin",
            )
    return files


def _hashed(paths: Sequence[Path], cancel: CancelToken | None, hasher: FileHasher) -> list[FileHashes]:
    """sha256 and A1111's old hash of files, several at a time; a path that stands twice is read once."""

    def check(_done: int) -> None:
        if cancel and cancel.cancelled:
            raise Cancelled

    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(default_threads()) as pool:
        found = dict(zip(distinct, pool.map(lambda path: hasher(path, check), distinct), strict=True))
    return [found[path] for path in paths]


def write_output(run: _Run, output: PlannedOutput) -> OutputReport:
    """One pass: the finished file stands under its name, or nothing has changed."""
    torch.float32  # noqa: B018  import torch before a temporary file exists: Ctrl-C may cut it short
    begun = time.monotonic()
    output = place_output(run.plan, made_output(run, output) if output.making else output, run.files)
    run.on_event(OutputStarted(output.name, str(output.path), output.size))
    with run.cancel.guarded(), contextlib.ExitStack() as stack:
        if output.is_pickle:
            held = Held(output.size)
            report = stream(run, output, held)
            packed = held.packed(output)
            report = replace(report, bytes=len(packed))
            target = stack.enter_context(OutputFile(output.path, len(packed)))
            target.write(memoryview(packed), 0)
        else:
            target = stack.enter_context(OutputFile(output.path, output.size))
            report = stream(run, output, target)
        _wait([target.sync], lambda: None, run.cancel, target.give_up)
        target.commit()
    seconds = time.monotonic() - begun
    run.on_event(OutputFinished(output.name, str(output.path), report.bytes, report.content_hash, seconds))
    return replace(report, seconds=seconds)


def made_output(run: _Run, output: PlannedOutput) -> PlannedOutput:
    """An output whose tensors had to be made first, with them as constants."""
    assert output.making
    survey, begun, total = output.making.survey, time.monotonic(), output.read_bytes
    ledger = Ledger(run.leaves)
    run.on_event(OutputStarted(output.name, str(output.path), total))

    def tell() -> None:
        run.on_event(Progressed(output.name, min(ledger.done, total), total, time.monotonic() - begun))

    if not survey.done:
        _pass(run, replace(output, tensors=()), Nowhere(), ledger, tell)
    made = constants_of(output, survey.result.tensors)
    labels = dict(output.making.metadata(survey.result))
    if not output.tensors:  # else, the hash of the bytes is known only once they are written
        labels["sshs_model_hash"] = data_hash(made)
    return replace(output, tensors=(*made, *output.tensors), labels=labels, is_made=True)


def stream(run: _Run, output: PlannedOutput, sink: Sink) -> OutputReport:
    """Compute a placed output into a sink, the header last (it holds hashes). Raises on findings."""
    begun = time.monotonic()
    ledger = Ledger(run.leaves)

    def tell() -> None:
        run.on_event(Progressed(output.name, ledger.done, output.size, time.monotonic() - begun))

    _pass(run, output, sink, ledger, tell)
    ledger.check(output.name, run.options.allow_nonfinite)
    content, made = {}, None
    if run.options.hashing:
        content = run.input_hashes([output])
        made = ledger.made.content_hash(0, {tensor.info.name: tensor.info for tensor in output.tensors})
        _check_locked(run, output, made)
    by_number = {n: content[each.name] for n, each in enumerate(run.plan.inputs) if each.name in content}
    raw = layout_output(run.plan, output, by_number, run.files).raw
    sink.write(memoryview(raw), 0)
    ledger.advance(len(raw))
    tell()
    return OutputReport(
        output.name,
        output.path,
        output.size,
        made,
        content,
        dict(output.counted()),
        {reason: len(names) for reason, names in output.dropped.items()},
        {name: finding.elements for name, finding in sorted(ledger.clamped.items())},
        {name: finding.elements for name, finding in sorted(ledger.nonfinite.items())},
        time.monotonic() - begun,
        output.making.report(output.making.survey.result) if output.making else {},
    )


def compute(
    plan: Plan,
    output: PlannedOutput,
    sink: Sink,
    options: RunOptions = RunOptions(),
    on_event: Listener = ignore,
    cancel: CancelToken | None = None,
) -> None:
    """Compute a placed output's tensors into a sink, whatever is found in them: no header, no hashes."""
    run = _Run(plan, replace(options, hashing=False), {}, Leaves(), on_event, cancel or CancelToken())
    ledger, begun = Ledger(run.leaves), time.monotonic()
    total = sum(tensor.info.nbytes for tensor in output.tensors)

    def tell() -> None:
        on_event(Progressed(output.name, ledger.done, total, time.monotonic() - begun))

    _pass(run, output, sink, ledger, tell)
    tell()


def _pass(run: _Run, output: PlannedOutput, sink: Sink, ledger: Ledger, tell: Callable[[], None]) -> None:
    """All tasks of an output, of inputs that stay as they were."""
    with _opened(run.plan) as inputs:
        _work(output, inputs, sink, ledger, run, tell)
        for source in inputs:
            source.check_unchanged()


def _check_locked(run: _Run, output: PlannedOutput, made: str) -> None:
    """Before the rename: the output is the locked one, and with the last output, so are the inputs."""
    options = run.options
    if options.expected.get(output.name, made) != made:
        raise PinMismatch(
            f'The output "{output.name}" differs from its lock: its content hash is {made}.',
            hint="run without --locked to make a new lock",
        )
    if not options.expected_inputs or output.name != run.plan.outputs[-1].name:
        return
    for name, digest in run.input_hashes(run.plan.outputs).items():
        if options.expected_inputs.get(name, digest) != digest:
            raise PinMismatch(
                f'"{name}" is not the model that the lock pins: its content hash is {digest}.',
                hint="find the model that was used, or run without --locked to make a new lock",
            )


@contextlib.contextmanager
def _opened(plan: Plan) -> Iterator[list[InputFile]]:
    """The inputs by number; a file that two models name is opened once."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, InputFile] = {}
        for source in plan.inputs:
            path = source.file.path
            if path not in files:
                files[path] = InputFile.of(source.file)
                stack.callback(files[path].close)
        yield [files[source.file.path] for source in plan.inputs]


def thread_count(output: PlannedOutput, options: RunOptions) -> int:
    """As many threads as cores (or as asked for), as far as their buffers fit the memory budget."""
    registers = max((t.program.registers for t in output.tensors if t.how in ("merged", "cast")), default=0)
    each = CHUNK * 4 * (registers + 4)  # float32 registers; a raw buffer in and one out, of up to 8 bytes an element
    return max(1, min(options.threads or default_threads(), options.memory // each))


class _Stopped(Exception):
    """Another thread failed, or the run was cancelled: leave the task."""


def _work(
    output: PlannedOutput,
    inputs: Sequence[InputFile],
    sink: Sink,
    ledger: Ledger,
    run: _Run,
    tell: Callable[[], None],
) -> None:
    """Do all tasks of an output on threads; the first error stops them all and is raised."""
    tasks = cut(output)
    lock = threading.Lock()
    stop = threading.Event()
    number = thread_count(output, run.options)

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def next_task() -> Task | None:
        with lock:
            return next(tasks, None)

    def new_worker() -> Worker:
        clamp = output.spec.overflow == "clamp"
        options, memory = run.options, memory_of(run.options.device)
        return Worker(
            inputs, sink, ledger, check, memory=memory, hashing=options.hashing, scan=options.scan, clamp=clamp
        )

    def work() -> None:
        torch.set_num_threads(1)
        worker = new_worker()
        with worker.at_work():
            while task := next_task():
                check()
                worker.do(task)

    threads = torch.get_num_threads()
    try:
        for survey in needed_surveys(output):
            run.on_event(Noted(f'step "{survey.step}": looking at the whole models first'))
            _wait([partial(survey_models, survey, new_worker, number, run.options.memory)], tell, run.cancel, stop.set)
        if output.making and not output.making.survey.done:
            making, memory = output.making.survey, run.options.memory
            dtype = _only_dtype(run.plan, making)
            make = partial(survey_models, making, new_worker, number, memory, kept=run.options.hashing, dtype=dtype)
            _wait([make], tell, run.cancel, stop.set)
        _wait([work] * number, tell, run.cancel, stop.set)
    finally:
        torch.set_num_threads(threads)  # the workers' 1 is also what threads begun later would get


def _only_dtype(plan: Plan, making: Survey) -> Dtype | None:
    """What a survey's tensors are rounded to, where all outputs are made of them and round alike."""
    dtypes = {made_dtype(each) if each.making and each.making.survey is making else None for each in plan.outputs}
    return dtypes.pop() if len(dtypes) == 1 else None


def _wait(
    calls: Sequence[Callable[[], None]],
    tell: Callable[[], None],
    cancel: CancelToken,
    hurry: Callable[[], None],
) -> None:
    """Run calls on threads of their own until all are done; raises the first error among them.

    `hurry` makes the calls end early: it is called on the first error, and on cancellation.
    """
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=_caught, args=(call, errors, hurry), name=f"merge-{number}")
        for number, call in enumerate(calls)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(TICK)
                tell()
                if cancel.cancelled:
                    raise Cancelled
    except BaseException:
        hurry()
        raise
    finally:
        _joined(threads)
    if errors:
        raise errors[0]


def _joined(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads to end, whatever comes: what they read and write is closed next."""
    interrupt: KeyboardInterrupt | None = None
    while alive := [thread for thread in threads if thread.is_alive()]:
        try:
            alive[0].join()
        except KeyboardInterrupt as error:  # a caller without a token, impatient
            interrupt = error
    if interrupt:
        raise interrupt


def _caught(call: Callable[[], None], errors: list[BaseException], hurry: Callable[[], None]) -> None:
    """Make a call; its error is handed to the waiting thread, which raises it."""
    try:
        call()
    except _Stopped:
        pass
    except BaseException as error:
        errors.append(error)
        hurry()
