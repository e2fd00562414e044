"""`delf-milvus ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delf_milvus.cli.completion import presets
from delf_milvus.cli.output import data_json, data_line, say, show_progress
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import Stages, state_of
from delf_milvus.errors import UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.ingestion.pipeline import IngestReport


def ingest(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Folders (searched recursively) or photos; or their addresses, as in s3://bucket/photos.",
        ),
    ],
    id_prefix: Annotated[str, typer.Option(help="Put before every image id.")] = "",
    ids_from: Annotated[
        Path | None,
        typer.Option(help="CSV, JSONL or Parquet with path, id and metadata; only its photos are ingested."),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove images of these folders that left the disk.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    on_error: Annotated[str | None, typer.Option(help="skip or stop, when a photo fails. Default: skip")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:TYPE",
            help="Declare a field that searches can be filtered by, for a new collection: year:integer=0. Types: text, "
            "integer, number, boolean; again for more.",
        ),
    ] = None,
    tenant_field: Annotated[
        str | None, typer.Option(help="Field that keeps tenants apart (see --tenant), for a new collection.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: standard")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Features kept of a photo. Default: the preset's")] = None,
    features: Annotated[
        bool, typer.Option("--features", help="PATH are feature files (.npz, .delf, .h5), or folders of them.")
    ] = False,
    features_name: Annotated[
        str | None, typer.Option(help="Who made those features, where the files do not say: superpoint-v1.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Take part I of N alone, counted from 0, as one of a job array; when all have ended, run index build.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="local or ray: what reads and extracts, this process or a Ray cluster. Default: local"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="host:port of the Ray cluster. Default: RAY_ADDRESS, or one for the run on this machine"),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Workers on the cluster. Default: as many as it has room for")
    ] = None,
    actor_cpus: Annotated[float | None, typer.Option(help="Processors of each worker. Default: 1")] = None,
    actor_gpus: Annotated[float | None, typer.Option(help="GPUs of each worker, or its share. Default: 0")] = None,
) -> None:
    """Store the photos of folders; what is stored already and unchanged is left alone.

    Example: delf-milvus ingest photos/ --prune

    Example: delf-milvus ingest photos/ --shard 0/8

    Example: delf-milvus ingest s3://bucket/photos --engine ray --actors 8 --actor-gpus 1

    Example: delf-milvus --collection superpoint ingest --features feats.h5 --features-name superpoint-v1
    """
    if features_name is not None and not features:
        raise UsageError("--features-name says who made feature files: give --features too.")
    if features and engine == "ray":
        raise UsageError("--engine ray extracts photos; feature files need none: leave one of it and --features out.")
    part = None if shard is None else _shard(shard)
    state = state_of(context)
    stages: Stages = {
        "ingest": {"on_error": on_error, "engine": engine},
        "ray": {"address": ray_address, "actors": actors, "cpus": actor_cpus, "gpus": actor_gpus},
        "extract": {"preset": preset, "stored_features": count},
        "store": {"fields": _declarations(field or []) or None, "tenant_field": tenant_field},
    }
    with (
        state.open(stages, create=not dry_run, any_model=features) as index,
        Bar(show_progress(state.quiet, state.json), "ingest") as bar,
    ):
        options: dict[str, Any] = {"id_prefix": id_prefix, "ids_from": ids_from, "prune": prune, "dry_run": dry_run}
        options["shard"] = part
        if features:
            report = index.ingest_features(paths, features_name or "", **options, progress=bar.update)
        else:
            report = index.ingest(paths, **options, progress=bar.update)
    _tell(report, state.json, state.quiet, dry_run, shard)
    if shard is not None and not state.quiet and not dry_run:
        say(f"The index is left as it is: when every shard beside {shard} has ended, run `delf-milvus index build`.")
    if report.interrupted:
        say("Interrupted: what was stored stays; run the same command again to go on.")
        raise typer.Exit(130)
    if report.failures:
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    """The option --shard I/N; raises UsageError."""
    from delf_milvus.ingestion.shard import Shard

    shard = Shard.parse(text)
    return shard.number, shard.count


def _declarations(fields: list[str]) -> dict[str, str]:
    declarations = {}
    for field in fields:
        name, colon, declaration = field.partition(":")
        if not colon:
            raise UsageError(f"--field takes NAME:TYPE, as in year:integer=0, not {field!r}.")
        declarations[name] = declaration
    return declarations


def _tell(report: IngestReport, json: bool, quiet: bool, dry_run: bool, shard: str | None) -> None:
    for failure in report.failures:
        say(f"failed: {one_line(failure.error)}")
    if not quiet:
        for image_id in report.sparse:
            say(f"few features: {one_line(image_id)} is stored, but has too few features to be found reliably")
    if json:
        data_json(report.to_dict())
        return
    would = "would be " if dry_run else ""
    others = "" if shard is None else f"; {report.others} of other shards"
    data_line(
        f"{report.added} {would}added, {report.updated} {would}updated, {report.unchanged} unchanged, "
        f"{report.removed} {would}removed, {report.failed} failed; "
        f"{report.features} features in {report.seconds:.1f} s{others}"
    )
