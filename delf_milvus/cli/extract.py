"""`delf-milvus extract`: no database is opened for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.completion import formats, presets
from delf_milvus.cli.output import data_json, data_line, say, show_progress
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import Stages, state_of
from delf_milvus.errors import UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.featurefiles.formats import Format
    from delf_milvus.ingestion.extraction import ExtractReport


def extract(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders (searched recursively) or photos.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the feature files; for hloc also the .h5 file itself.")
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of pictures: each photo's keypoints and its attention map."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            autocompletion=formats,
            help="npz or delf (one file a photo), or hloc (one .h5 file, features.h5 in a folder).",
        ),
    ] = "npz",
    id_prefix: Annotated[str, typer.Option(help="Put before the name of every photo.")] = "",
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: standard")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Features of a photo at most. Default: the preset's")] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Take part I of N alone, counted from 0, as one of a job array."),
    ] = None,
) -> None:
    """Write the features of photos into files, for other pipelines or for `ingest --features`, and pictures of them.

    What is there already is left alone; photos that fail are listed, and the exit code is 1. Shards may share their
    folders: for hloc each writes a file of its own, features.I-of-N.h5.

    Example: delf-milvus extract photos/ --out features/ --format hloc

    Example: delf-milvus extract tower.jpg --show attention/
    """
    from delf_milvus.featurefiles.folder import FeatureFolder
    from delf_milvus.ingestion.extraction import AttentionPictures, extract_photos
    from delf_milvus.ingestion.scan import scan
    from delf_milvus.ingestion.shard import Shard
    from delf_milvus.matcher import PhotoMatcher

    if out is None and show is None:
        raise UsageError("Say what to write: --out DIR for feature files, --show DIR for pictures, or both.")
    part = None if shard is None else Shard.parse(shard)
    state = state_of(context)
    stages: Stages = {"extract": {"preset": preset, "stored_features": count}}
    matcher = PhotoMatcher(state.load(stages).settings)
    writer = "" if part is None else f"{part.number}-of-{part.count}"
    folder = None if out is None else FeatureFolder(out, _format(format), matcher.fingerprint, writer)
    pictures = None if show is None else AttentionPictures(show)
    scanned = scan(paths, id_prefix=id_prefix, follow_links=matcher.settings.ingest.follow_links)
    if part is not None:
        scanned = part.of(scanned)
    with Bar(show_progress(state.quiet, state.json), "extract") as bar:
        report = extract_photos(
            scanned, folder, lambda: matcher.extractor, matcher.settings, pictures=pictures, progress=bar.update
        )
    _tell(report, state.json, shard)
    if report.interrupted:
        say("Interrupted: what was written stays; run the same command again to go on.")
        raise typer.Exit(130)
    if report.failures:
        raise typer.Exit(1)


def _format(name: str) -> Format:
    from delf_milvus.featurefiles.formats import SUFFIX_OF

    for known in SUFFIX_OF:
        if known == name:
            return known
    raise UsageError(f"--format is one of {', '.join(SUFFIX_OF)}, not {name!r}.")


def _tell(report: ExtractReport, json: bool, shard: str | None) -> None:
    for failure in report.failures:
        say(f"failed: {one_line(failure.error)}")
    if json:
        data_json(report.to_dict())
    else:
        others = "" if shard is None else f"; {report.others} of other shards"
        data_line(
            f"{report.extracted} extracted, {report.skipped} there already, {len(report.failures)} failed; "
            f"{report.features} features in {report.seconds:.1f} s{others}"
        )
