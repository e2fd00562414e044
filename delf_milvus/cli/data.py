"""`delf-milvus export` and `delf-milvus import`: no model is loaded for these."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delf_milvus.cli.output import counting, data_json, data_line, show_progress
from delf_milvus.cli.state import state_of
from delf_milvus.errors import one_line

Prefix = Annotated[str, typer.Option(help="Only images whose id starts so.")]


def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder, or one of an export that was killed.")],
    prefix: Prefix = "",
) -> None:
    """Write the collection into a folder of Parquet files with checksums: a backup, or a move to another database.

    Example: delf-milvus --uri photos.db export backup/
    """
    state = state_of(context)
    with state.open(any_model=True) as index, counting("export", show_progress(state.quiet, state.json)) as progress:
        report = index.export(folder, prefix=prefix, progress=progress)
    if state.json:
        data_json(report.to_dict())
    else:
        data_line(
            f"{report.images} images with {report.features} features exported to {one_line(report.folder)}: "
            f"{report.files} files, {report.bytes / 1e6:.1f} MB in {report.seconds:.1f} s"
        )


def import_(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that an export wrote.")],
    prefix: Prefix = "",
) -> None:
    """Store what an export wrote; the collection is made where it is absent, other images of it stay.

    Example: delf-milvus --uri http://localhost:19530 import backup/
    """
    state = state_of(context)
    with (
        state.open(create=True, any_model=True) as index,
        counting("import", show_progress(state.quiet, state.json)) as progress,
    ):
        report = index.import_(folder, prefix=prefix, progress=progress)
    if state.json:
        data_json(report.to_dict())
    else:
        data_line(
            f"{report.added} added, {report.replaced} replaced, {report.unchanged} unchanged; "
            f"{report.features} features in {report.seconds:.1f} s"
        )
