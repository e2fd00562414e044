"""`delf-milvus calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delf_milvus.cli.output import counting, data_json, data_line, say, show_progress
from delf_milvus.cli.state import state_of
from delf_milvus.errors import InputError, UsageError, one_line


def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Calibration file to write (JSON).")],
    no_match: Annotated[
        Path | None,
        typer.Argument(metavar="PHOTOS", help="Folder of photos that show nothing of what is stored."),
    ] = None,
    apart: Annotated[
        str, typer.Option(help="Without PHOTOS, stored images ask: images of another folder (or parent) never match.")
    ] = "folder",
    limit: Annotated[int, typer.Option(min=1, help="Queries at most.")] = 1000,
) -> None:
    """Set the bar of an answer by this collection: measure how strong wrong answers are in it.

    Queries without a right answer are searched, 125 at least: photos of other things, or the stored images themselves,
    for which images of their own folder do not count. Nothing in the database changes. The weights of the evidence
    stay; what a false alarm is, is measured anew, for these settings and this number of images.

    Example: delf-milvus calibrate strangers/ --out shop.calibration.json

    Example: delf-milvus calibrate --apart parent --out shop.calibration.json
    """
    from delf_milvus.evaluation.recalibration import RecalibrationConfig, recalibrate

    if apart not in ("folder", "parent"):
        raise UsageError(f"--apart is folder or parent, not {apart}.")
    state = state_of(context)
    config = RecalibrationConfig(no_match, "folder" if apart == "folder" else "parent", limit)
    # Told before minutes of work rather than after them.
    if not out.absolute().parent.is_dir():
        raise InputError(f"{one_line(out)} cannot be written: there is no such folder; make it first.")
    with state.open(any_model=True) as index, counting("calibrate", show_progress(state.quiet, state.json)) as progress:
        if not index.made_elsewhere:
            index.require_model()
        calibration, report = recalibrate(index, config, progress)
    try:
        calibration.write(out)
    except OSError as error:
        raise InputError(f"{one_line(out)} cannot be written: {error.strerror or 'input/output error'}.") from error
    if state.json:
        data_json(report.to_dict())
    else:
        data_line(
            f"{report.queries} queries without a right answer, {report.failed} unreadable: {report.before:.1%} were "
            f"answered at verify.max_false_alarm = {report.bar:g}; calibrated without the query, {report.after:.1%} are"
        )
    if not state.quiet:
        say(f"written: {one_line(out)}; use it with DELF_MILVUS_VERIFY__CALIBRATION={one_line(out)}")
