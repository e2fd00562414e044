"""Progress bars: what is done of how much, how fast, how long it will take, and what failed so far."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from delf_milvus.cli.output import say

if TYPE_CHECKING:
    from delf_milvus.ingestion.pipeline import Progress


class Bar:
    """A bar on stderr, one task after the other; a context manager. Where it is not visible, nothing is drawn."""

    def __init__(self, visible: bool, title: str = "") -> None:
        self._visible = visible
        self._title = title
        self._bar: Any = None
        self._task: Any = None
        self._what = ""
        self._started = 0.0
        self._first = 0

    def __enter__(self) -> Bar:
        if self._visible:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[failed]}", style="red"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def update(self, progress: Progress) -> None:
        """Show how far an ingest or an extraction is."""
        self.count(
            self._title,
            progress.done,
            progress.total,
            failed=progress.failed,
            rate=f"{progress.extracted / progress.seconds:.1f} photos/s" if progress.seconds > 0 else "",
        )

    def count(
        self, what: str, done: int, total: int | None, *, failed: int = 0, unit: str = "", rate: str = ""
    ) -> None:
        """Show what is done now, of how much. unit: of the rate, which is left out without one."""
        if self._bar is None:
            return
        if self._task is None or self._what != what:
            # A task of its own, or the time left would be that of the work before.
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, rate="", failed="")
            self._what, self._started, self._first = what, time.monotonic(), done
        seconds = time.monotonic() - self._started
        # What was done before, by a run that is gone on with, took none of these seconds.
        if unit and done > self._first and seconds > 0:
            rate = f"{(done - self._first) / seconds:.1f} {unit}/s"
        failures = f"{failed} failed" if failed else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate, failed=failures)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar where there is one."""
        if self._bar is None:
            say(line)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Watched(Bar):
    """A bar that a training tells its lines and its progress; with `quiet` neither is shown."""

    def __init__(self, visible: bool, quiet: bool) -> None:
        super().__init__(visible)
        self._quiet = quiet

    def __enter__(self) -> Watched:
        super().__enter__()
        return self

    def __call__(self, line: str) -> None:
        if not self._quiet:
            self.say(line)

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """Show how far it is."""
        self.count(what, done, total, unit=unit)
