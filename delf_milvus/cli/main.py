"""The command line's root."""

from __future__ import annotations

import typer

from delf_milvus.cli import train

app = typer.Typer(no_args_is_help=True)
app.add_typer(train.app, name="train")

if __name__ == "__main__":
    app()
