"""The jobs: what is queued, under way and over, with a bar, the time left and the log.

Owns how jobs are shown. The queue is the application's.
"""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.widgets import DataTable, Footer, Static

from mergekit_sd.text import count
from mergekit_sd_tui import job_rows
from mergekit_sd_tui.actions import bindings
from mergekit_sd_tui.jobs import Job
from mergekit_sd_tui.screens.working import WorkingScreen

EMPTY = "No jobs yet.\n\nWhat takes long runs here, in a process of its own. {run} on the Recipe screen runs a recipe."


class JobsScreen(WorkingScreen):
    """Screen 5."""

    place = "jobs"
    BINDINGS: ClassVar = bindings(place)
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012  # beside a list of all columns
    CSS = """
    JobsScreen #list { height: 1fr; width: 1fr; }
    JobsScreen.-wide #list { height: 1fr; width: 2fr; }
    JobsScreen #jobs { height: 1fr; scrollbar-size: 1 1; }
    JobsScreen #empty { display: none; padding: 1 2; height: 1fr; }
    JobsScreen.empty #empty { display: block; }
    JobsScreen.empty #jobs { display: none; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[int, tuple[Text, ...]] = {}

    def compose(self) -> ComposeResult:
        """List and details, the line that tells, the keys."""
        yield self.places()
        with Container(id="body"):
            with Vertical(id="list"):
                yield DataTable(id="jobs", cursor_type="row", zebra_stripes=False)
                yield Static(Text(EMPTY.format(run=self.workbench.keys_of("recipe.run"))), id="empty")
            with VerticalScroll(classes="side", can_focus=False):
                yield Static(id="details")
        yield Static(id="status", classes="status")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """The jobs as they are, then as they change."""
        for name, width in job_rows.COLUMNS.items():
            self._table.add_column(name, key=name, width=width)
        self._table.focus()
        self.watch(self.app, "jobs", self._jobs_changed)

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    @property
    def _chosen(self) -> Job | None:
        """The job under the cursor."""
        row = self._table.cursor_row
        jobs = self.workbench.jobs
        return jobs[row] if 0 <= row < len(jobs) else None

    def _jobs_changed(self, jobs: tuple[Job, ...]) -> None:
        table = self._table
        rows = {job.id: job_rows.cells(job) for job in jobs}
        new = rows.keys() - self._shown.keys()
        for gone in self._shown.keys() - rows.keys():
            table.remove_row(str(gone))
        for number, cells in rows.items():
            if number in new:
                table.add_row(*cells, key=str(number))
            else:
                self._renew(number, cells)
        self._shown = rows
        self.set_class(not jobs, "empty")
        if new:
            table.move_cursor(row=len(jobs) - 1)
        self.tell(_summary(jobs))
        self._show_details()

    def _renew(self, number: int, cells: tuple[Text, ...]) -> None:
        for column, old, cell in zip(job_rows.COLUMNS, self._shown[number], cells, strict=True):
            if cell != old:
                self._table.update_cell(str(number), column, cell)

    @on(DataTable.RowHighlighted)
    def _show_details(self) -> None:
        job = self._chosen
        side = self.query_one(".side", VerticalScroll)
        at_end = side.scroll_offset.y >= side.max_scroll_y
        self.query_one("#details", Static).update(job_rows.details(job) if job else Text(""))
        if job and not job.is_over and at_end:  # the log goes on there
            side.scroll_end(animate=False)

    # --- actions ---

    def action_cancel(self) -> None:
        """Stop the job; it is over when its process has ended."""
        job = self._chosen
        if job is None or job.is_over:
            self.workbench.say("There is nothing to cancel.")
        elif job.state == "cancelling":
            self.workbench.say("It is being cancelled: what it had begun is being removed.")
        else:
            self.workbench.queue.cancel(job.id)

    def action_retry(self) -> None:
        """The same once more."""
        job = self._chosen
        if job is None or not job.is_over:
            self.workbench.say("Only a job that is over can be run once more.")
        else:
            self.workbench.queue.retry(job.id)

    def action_remove(self) -> None:
        """Forget the job; its files stay."""
        job = self._chosen
        if job is None or not job.is_over:
            self.workbench.say("Only a job that is over can be taken from the list.")
        else:
            self.workbench.queue.remove(job.id)

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        """Look into what the job made."""
        job = self._chosen
        file = next((path for path in job.files if path.exists()), None) if job else None
        if file is None:
            self.workbench.say("This job has made no file.")
        else:
            self.workbench.inspect_model(file)

    def action_pictures(self) -> None:
        """What the job drew."""
        folder = self._chosen.pictures if self._chosen else None
        if folder is None:
            self.workbench.say("This job has drawn no pictures.")
        else:
            self.workbench.show_pictures(folder)


def _summary(jobs: tuple[Job, ...]) -> str:
    states = [job.state for job in jobs]
    found = {state: states.count(state) for state in dict.fromkeys(states)}
    return ", ".join(f"{number:,} {state}" for state, number in found.items()) or count(0, "job")
