"""`delf-milvus doctor`, `fsck` and `compact`: no network is loaded for these."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from delf_milvus.cli.output import counting, data_json, data_line, data_table, say, show_progress
from delf_milvus.cli.state import state_of
from delf_milvus.errors import one_line


def doctor(
    context: typer.Context,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Write nothing: no scratch collection is made and dropped.")
    ] = False,
) -> None:
    """Check connection, rights, versions, schema, model, clock and space; exit code 3 when a check fails.

    Example: delf-milvus --uri http://localhost:19530 doctor --read-only
    """
    from delf_milvus.index import DelfIndex

    state = state_of(context)
    checks = list(DelfIndex.doctor(state.load().settings, read_only=read_only))
    if state.json:
        counts = {name: sum(check.state == name for check in checks) for name in ("ok", "warn", "fail", "skip")}
        data_json({"checks": [check.to_dict() for check in checks], **counts})
    else:
        data_table(("state", "check", "seen", "to do"), ((c.state, c.name, c.what, c.todo or "-") for c in checks))
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(3)


def fsck(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found; nobody may write meanwhile.")] = False,
) -> None:
    """Find what does not fit together in the database; exit code 1 when something is wrong, or still is after --repair.

    Run it while nobody ingests: what is half written looks like damage.

    Example: delf-milvus fsck --repair
    """
    from delf_milvus.store.fsck import REMEDIES

    state = state_of(context)
    with (
        state.open(any_model=True, create=False) as index,
        counting("rows", show_progress(state.quiet, state.json)) as update,
    ):
        report = index.fsck(repair, update)
    if state.json:
        data_json(report.to_dict())
    else:
        if report.findings:
            data_table(
                ("kind", "image", "rows", "what", "mended"),
                (
                    (f.kind, f.image_id or f"key {f.image_key}", f.rows, f.what, "yes" if f.mended else "no")
                    for f in report.findings
                ),
                shorten=("image",),
            )
        data_line(
            f"{len(report.findings)} findings in {report.images} images and {report.features} features, "
            f"{sum(f.mended for f in report.findings)} mended; {report.seconds:.1f} s"
        )
    if not state.quiet:
        for kind in dict.fromkeys(finding.kind for finding in report.findings):
            say(f"{kind}: {REMEDIES[kind]}")
    if not report.clean:
        raise typer.Exit(1)


def compact(context: typer.Context) -> None:
    """Merge small segments and drop deleted rows of both collections, and wait until that is done.

    Example: delf-milvus --uri http://localhost:19530 compact
    """
    state = state_of(context)
    told = [time.monotonic()]

    def tell(text: str) -> None:
        if not state.quiet and time.monotonic() - told[0] >= 5:
            told[0] = time.monotonic()
            say(one_line(text))

    with state.open(any_model=True, create=False) as index:
        report = index.compact(tell)
    if state.json:
        data_json(report.to_dict())
    else:
        data_line(f"{report.what} {report.seconds:.1f} s")
