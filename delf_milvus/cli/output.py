"""How the command line speaks: data on stdout, everything else on stderr, errors in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from delf_milvus.errors import UsageError, one_line


def data_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    # ASCII: control characters of file names stay escaped, and any terminal or pipe takes it.
    typer.echo(json.dumps(value, indent=2))


def data_json_line(value: Any) -> None:
    """Print one JSON object on stdout, in one line."""
    typer.echo(json.dumps(value))


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


def data_table(header: Sequence[str], rows: Iterable[Sequence[object]], shorten: Collection[str] = ()) -> None:
    """Print a table on stdout: numbers to the right, no lines around it, so that it pastes and cuts well.

    On a terminal it is made to fit the width: the columns named in `shorten` lose the middle of their long cells, and
    then the last column is wrapped. Elsewhere every cell is printed whole.
    """
    from rich.cells import cell_len

    cells = [[one_line(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    table = [list(header), *cells]
    widths = [max(cell_len(line[i]) for line in table) for i in range(len(header))]
    if (terminal := _terminal_width()) is not None:
        widths = _fitted(widths, [name in shorten for name in header], terminal, wraps=not numeric[-1])
    for line in table:
        parts = [
            _wrapped(cell, width) if i == len(header) - 1 and not numeric[i] else [shortened(cell, width)]
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for row in range(max(map(len, parts))):
            columns = [part[row] if row < len(part) else "" for part in parts]
            columns = [
                " " * (width - cell_len(cell)) + cell if right else cell + " " * (width - cell_len(cell))
                for cell, width, right in zip(columns, widths, numeric, strict=True)
            ]
            typer.echo("  ".join(columns).rstrip())


def shortened(text: str, width: int) -> str:
    """The text without its middle, where it takes more than so many columns of a terminal: paths differ at the ends."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, width).rstrip()
    head = set_cell_size(text, width // 2).rstrip()
    tail = text[::-1]
    return head + "…" + set_cell_size(tail, width - width // 2 - 1).rstrip()[::-1]


def _terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _fitted(widths: list[int], elastic: list[bool], terminal: int, *, wraps: bool) -> list[int]:
    """Widths of columns that fit a terminal together, as far as they can: elastic ones have 16 columns at least, a last
    one that wraps 24."""
    fitted = list(widths)
    least = [16 if one else width for one, width in zip(elastic, widths, strict=True)]
    if wraps:
        least[-1] = min(least[-1], 24)
    for columns in ([i for i, one in enumerate(elastic) if one], [len(widths) - 1] if wraps else []):
        over = sum(fitted) + 2 * (len(fitted) - 1) - terminal
        for i in columns:
            fitted[i] -= max(0, min(over, fitted[i] - least[i]))
            over = sum(fitted) + 2 * (len(fitted) - 1) - terminal
    return fitted


def _wrapped(text: str, width: int) -> list[str]:
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return [text]
    return textwrap.wrap(text, width) or [""]


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


def check_page(path: Path) -> None:
    """Raise UsageError, before minutes of work, for what cannot be the file of a page."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report writes a page: {one_line(path)} must end with .html.")
    if path.is_dir():
        raise UsageError(f"--report names a file to write, and {one_line(path)} is a folder.")


def show_progress(quiet: bool, json: bool = False) -> bool:
    """Whether a moving progress bar helps: someone watches a terminal, and no JSON goes to the same one."""
    return not quiet and sys.stderr.isatty() and not (json and sys.stdout.isatty())


@contextmanager
def counting(title: str, visible: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, which counts what is done of what there is; None where nobody would see it."""
    if not visible:
        yield None
        return
    from delf_milvus.cli.progress import Bar

    with Bar(visible) as bar:
        yield lambda done, total: bar.count(title, done, total)
