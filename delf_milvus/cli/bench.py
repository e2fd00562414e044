"""`delf-milvus bench`: the coefficients of a plan, measured here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delf_milvus.cli.completion import presets as preset_names
from delf_milvus.cli.output import data_json, data_line, data_table, say
from delf_milvus.cli.state import state_of
from delf_milvus.errors import InputError, UsageError, one_line


def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File of coefficients to write (JSON).")] = Path("coefficients.json"),
    minutes: Annotated[
        float, typer.Option(min=0.01, max=600, help="About how long; an index takes what it takes.")
    ] = 5,
    rows: Annotated[int, typer.Option(min=10_000, max=100_000_000, help="Descriptors at most.")] = 1_000_000,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            autocompletion=preset_names,
            help="To extract with; again for more. none: no extraction. Default: all",
        ),
    ] = None,
) -> None:
    """Measure extraction, writing, index, search, memory and disk here, for `plan --coefficients`.

    Synthetic descriptors go to the collection `<collection>_bench`, or with Milvus Lite to a database of their own
    beside yours; both are dropped at the end, after Ctrl-C too. Your own collection is not opened.

    Example: delf-milvus --uri http://localhost:19530 bench --minutes 20 --out coefficients.json
    """
    from delf_milvus.planning.bench import BenchConfig
    from delf_milvus.planning.bench import bench as run
    from delf_milvus.planning.coefficients import DEFAULTS
    from delf_milvus.settings import PRESETS

    state = state_of(context)
    known = {str(name): name for name in PRESETS}
    for name in presets or ():
        if name not in known and name != "none":
            raise UsageError(f"--preset is {', '.join(known)} or none, not {name!r}.")
    # Told before minutes of work rather than after them.
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"{one_line(out)} cannot be written: give the path of a file in a folder that exists.")
    chosen = tuple(known[name] for name in presets if name in known) if presets else tuple(PRESETS)
    config = BenchConfig(minutes, rows, chosen)
    made = run(state.load().settings, config, (lambda _: None) if state.quiet else say)
    made.write(out)
    if state.json:
        data_json(made.model_dump())
    else:
        data_table(
            ("coefficient", "measured", "default", "unit"),
            (
                (name, f"{one.value:.4g}", f"{DEFAULTS[name].value:.4g}", one.unit)
                for name, one in made.coefficients.items()
            ),
        )
        for line in made.held_out:
            data_line(f"held out: {line}")
        for line in made.not_measured:
            data_line(f"not measured: {line}")
    if not state.quiet:
        say(f"written: {one_line(out)}; use it with `delf-milvus plan --coefficients {one_line(out)}`")
