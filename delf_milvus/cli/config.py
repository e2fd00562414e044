"""`delf-milvus config`."""

from __future__ import annotations

import typer

from delf_milvus.cli.output import data_json, data_table
from delf_milvus.cli.state import state_of

app = typer.Typer(no_args_is_help=True, help="Settings.", epilog="Example: delf-milvus config show")


@app.callback()
def config() -> None:
    """Keeps `show` a sub-command while it is the only one."""


@app.command()
def show(context: typer.Context) -> None:
    """Print every setting, its value and where the value came from.

    Example: DELF_MILVUS_SEARCH__TOP=5 delf-milvus config show
    """
    state = state_of(context)
    rows = state.load().rows()
    if state.json:
        data_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        data_table(("setting", "value", "source"), ((name, "-" if v is None else v, s) for name, v, s in rows))
