"""What the Jobs screen shows of a job: a row with a bar, and all of it beside.

Must not know widgets.
"""

from __future__ import annotations

import shlex

from rich.text import Text

from mergekit_sd.text import shown, size
from mergekit_sd_tui.jobs import Job

COLUMNS = {"state": 10, "job": 23, "": 12, "progress": 17, "left": 8}
STYLES = {"running": "bold", "failed": "bold", "cancelling": "italic", "queued": "dim", "cancelled": "dim"}


def cells(job: Job) -> tuple[Text, ...]:
    """A row, in the order of the columns."""
    left = job.seconds_left
    words = (job.state, shown(job.title), _bar(job), _share(job), "" if left is None else duration(left))
    return tuple(Text(each, style=STYLES.get(job.state, ""), no_wrap=True, overflow="ellipsis") for each in words)


def _bar(job: Job) -> str:
    if job.state == "queued" or not job.total:
        return ""
    width = COLUMNS[""] - 2
    full = width * min(job.done, job.total) // job.total
    return f"[{'#' * full}{'-' * (width - full)}]"


def _share(job: Job) -> str:
    if job.state == "queued" or not job.total:
        return ""
    whole = size(job.total) if job.in_bytes else f"{job.total:,} steps"
    return f"{100 * min(job.done, job.total) // job.total}% of {whole}"


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `1 h 05`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02}"


def details(job: Job) -> Text:
    """Command, progress, result or error, log."""
    text = Text()
    text.append(f"{shown(job.title)}: {job.state}\n", style="bold")
    text.append(f"mergekit-sd {shown(shlex.join(job.arguments))}\n", style="dim")
    if job.state in ("running", "cancelling"):
        text.append(_progress(job) + "\n")
    if job.error and job.state == "failed":
        where = f"\n{shown(job.error.file)}" if job.error.file else ""
        where += f", line {job.error.line}" if where and job.error.line else ""
        text.append(f"\n{shown(job.error.message)}", style="bold")
        text.append(f"{where}\n")
        if job.error.hint:
            text.append(f"{shown(job.error.hint)}\n", style="italic")
    for path in job.files:
        text.append(f"\n{shown(str(path))}\n")
    if job.pictures:
        text.append(f"\npictures: {shown(str(job.pictures))}\n")
    if job.log:
        text.append("\nlog\n", style="bold")
        text.append("\n".join(shown(line) for line in job.log))
    return text


def _progress(job: Job) -> str:
    if job.state == "cancelling":
        return "stopping, and removing what was begun …"
    if not job.total:
        return "starting …"
    left = job.seconds_left
    pace = f"{size(round(job.done / job.seconds))}/s" if job.in_bytes and job.seconds else ""
    rest = f"{duration(left)} left" if left is not None else ""
    done = f"{size(job.done)} of {size(job.total)}" if job.in_bytes else f"{job.done:,} of {job.total:,} steps"
    return ", ".join(part for part in (shown(job.stage), done, pace, rest) if part)
