"""How the command line speaks: data on stdout, everything else on stderr, errors in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from delf_milvus.errors import one_line


def data_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    # ASCII: control characters of file names stay escaped, and any terminal or pipe takes it.
    typer.echo(json.dumps(value, indent=2))


def data_line(text: str = "") -> None:
    """Print one line on stdout."""
    typer.echo(text)


def say(text: str) -> None:
    """Print one line on stderr."""
    typer.echo(text, err=True)


def uncalibrated(made_elsewhere: str) -> str:
    """The remark about answers among features that the calibration was not measured with."""
    return (
        f"confidence and false alarm were calibrated with the bundled model, not with {one_line(made_elsewhere)}: "
        "measure them with `delf-milvus calibrate`"
    )


def data_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout: numbers to the right, no lines around it, so that it pastes and cuts well."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    for line in [list(header), *cells]:
        columns = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        typer.echo("  ".join(columns).rstrip())


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested values as rows of a table: dotted name and value."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, "-" if value in (None, "") else value))
    return rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in ("", "-")
    return True


def show_progress(quiet: bool) -> bool:
    """Whether a moving progress bar helps: someone watches a terminal."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def counting(title: str, visible: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, which counts what is done of what there is; None where nobody would see it."""
    if not visible:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
