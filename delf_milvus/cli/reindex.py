"""`delf-milvus reindex`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.completion import presets
from delf_milvus.cli.output import data_json, data_line, say, show_progress
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import state_of
from delf_milvus.errors import one_line

if TYPE_CHECKING:
    from delf_milvus.ingestion.reindex import ReindexReport


def reindex(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="Weight file of the new model. Default: the global --model")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: standard")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Switch without the images whose photo is gone.")
    ] = False,
    drop_old: Annotated[
        bool,
        typer.Option("--drop-old", help="Afterwards drop every other generation; who has one open loses it."),
    ] = False,
) -> None:
    """Rebuild the collection for another model beside the old one, then switch; exit code 1 when photos are missing.

    Searches go on meanwhile, and whoever has the old collection open keeps it until it is dropped. Interrupted or
    killed, the same command goes on where it ended.

    Example: delf-milvus reindex --model new.safetensors
    """
    state = state_of(context)
    if model is not None:
        state.flags["model"] = str(model)
    stages = {"extract": {"preset": preset}}
    with state.open(stages, any_model=True) as index, Bar(show_progress(state.quiet, state.json), "reindex") as bar:
        report = index.reindex(allow_missing=allow_missing, drop_old=drop_old, progress=bar.update)
    _tell(report, state.json)
    if report.interrupted:
        say("Interrupted: what was extracted stays; run the same command again to go on.")
        raise typer.Exit(130)
    if not report.switched:
        say("Not switched: bring the photos back and run this again, or go without them with --allow-missing.")
    if report.missing:
        raise typer.Exit(1)


def _tell(report: ReindexReport, json: bool) -> None:
    for failure in report.missing:
        say(f"missing: {one_line(failure.error)}")
    if json:
        data_json(report.to_dict())
        return
    current = report.generation if report.switched else report.previous
    data_line(
        f"{report.images} images in {report.generation}, {report.extracted} extracted, {report.removed} removed, "
        f"{len(report.missing)} missing; current is {current}; {report.seconds:.1f} s"
    )
    if report.dropped:
        data_line(f"dropped: {', '.join(report.dropped)}")
