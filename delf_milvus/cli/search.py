"""`delf-milvus search` and `delf-milvus match`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.completion import modes, presets
from delf_milvus.cli.output import (
    check_page,
    data_json,
    data_json_line,
    data_line,
    data_table,
    flat,
    say,
    show_progress,
    uncalibrated,
)
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import Stages, State, state_of
from delf_milvus.cli.thumbnails import Thumbnails
from delf_milvus.errors import InputError, UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.index import DelfIndex
    from delf_milvus.reporting.search_page import SearchPage
    from delf_milvus.retrieval.answers import Hit, SearchResult
    from delf_milvus.retrieval.explain import Explanation


MaxFalseAlarm = Annotated[
    float | None,
    typer.Option(help="Bar of an answer: share of queries without a match that may get one. Default: 0.01"),
]


RESULT = "result.json"


def _box(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--box takes four numbers, x0,y0,x1,y1 in pixels, not {text!r}.") from None
    return x0, y0, x1, y1


def search(
    context: typer.Context,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Query photos, or folders of them; with --features their features."),
    ],
    top: Annotated[int | None, typer.Option(help="Answers at most. Default: 10")] = None,
    box: Annotated[str | None, typer.Option(help="x0,y0,x1,y1: search for this part of the photo.")] = None,
    filter: Annotated[
        str, typer.Option(metavar="EXPR", help="Only images that meet this, in declared fields: 'year >= 2020'.")
    ] = "",
    candidates: Annotated[int | None, typer.Option(help="Images that are verified. Default: 100")] = None,
    expand: Annotated[
        int | None, typer.Option(help="Sure answers whose features join the query for a second look. Default: 0")
    ] = None,
    parts: Annotated[
        bool,
        typer.Option("--parts", help="Search for five parts of the photo too: finds small things, six times slower."),
    ] = False,
    turned: Annotated[
        bool, typer.Option("--turned", help="Search for the photo turned by 90, 180 and 270 degrees too.")
    ] = False,
    per_region: Annotated[
        int | None, typer.Option(help="Answers at most for each thing in a photo of several. Default: no limit")
    ] = None,
    include_unverified: Annotated[
        bool, typer.Option("--include-unverified", help="Show images without proof too, after the others.")
    ] = False,
    max_false_alarm: MaxFalseAlarm = None,
    mode: Annotated[
        str | None,
        typer.Option(
            autocompletion=modes, help="full (match all descriptors) or hits (neighbours only). Default: full"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for match pictures, one an answer, a contact sheet and result.json; of several "
            "queries a folder each."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page of all queries and answers with their pictures (.html).")
    ] = None,
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            "--thumbnails/--no-thumbnails",
            help="Show query and answers in the terminal. Default: where it says that it shows pictures",
        ),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Say what each stage thinks of this stored image instead.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="The preset that the collection was made with.")
    ] = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="IMAGE is a feature file (.npz, .delf), or one photo of many: feats.h5#a.jpg"),
    ] = False,
) -> None:
    """Find the images that show the same thing as a photo, with proof; exit code 1 when there is none.

    Of several queries each gets its table, or with --json one line; what cannot be read is listed and left out. The
    exit code is then 0 if all of them have a match.

    Example: delf-milvus search query.jpg --top 5 --out matches/

    Example: delf-milvus search queries/ --report matches.html

    Example: delf-milvus search query.jpg --explain photos/tower.jpg

    Example: delf-milvus --collection superpoint search --features feats.h5#query.jpg
    """
    state = state_of(context)
    many = len(images) > 1 or (not features and images[0].is_dir())
    queries = _queries(images, features) if many else images
    _check_options(features=features, out=out, report=report, many=many, box=box, explain=explain)
    stages: Stages = {
        "search": {
            **{"top": top, "candidates": candidates, "mode": mode},
            **{"per_region": per_region, "expand": expand, "parts": parts or None, "turned": turned or None},
        },
        "extract": {"preset": preset},
        "verify": {"max_false_alarm": max_false_alarm},
    }
    region = _box(box)
    # Neither JSON nor what a script reads quietly is for looking at, unless somebody says so.
    thumbs = Thumbnails(False if state.json else thumbnails if thumbnails is not None or not state.quiet else False)
    with state.open(stages, any_model=features) as index:
        remark = ""
        if index.made_elsewhere and not index.calibrated and not state.quiet:
            remark = uncalibrated(index.made_elsewhere)
        if explain is not None:
            query = index.read_features(images[0]) if features else images[0]
            if remark:
                say(remark)
            _explain(index.explain(query, explain, box=region, filter=filter), state.json)
            return
        run = _Search(index, state, region, filter, include_unverified, features, out, thumbs, many, remark)
        page = None if report is None else index.search_page()
        done = 0
        try:
            with Bar(many and show_progress(state.quiet) and not sys.stdout.isatty()) as bar:
                for done, query in enumerate(queries, 1):
                    run.one(done, query, page)
                    bar.count("search", done, len(queries), failed=len(run.failures), unit="queries")
        except KeyboardInterrupt:
            run.interrupted = True
        if page is not None and report is not None:
            page.failures = run.failures
            page.write(report, calibrated=index.calibrated)
            if not state.quiet:
                say(f"report: {one_line(report)}")
    if run.interrupted:
        say(f"Interrupted after {done - 1} of {len(queries)} queries.")
        raise typer.Exit(130)
    if not run.matched:
        if not (state.quiet or state.json or features or parts or turned or many):
            say("--turned looks for photos that lie on their side, --parts for small things")
        raise typer.Exit(1)


def _queries(images: list[Path], features: bool) -> list[Path]:
    """The query photos: files as they are named, and all photos of folders. Raises InputError for an empty folder."""
    from delf_milvus.ingestion.scan import scan

    queries: list[Path] = []
    for path in images:
        if features or not path.is_dir():
            queries.append(path)
            continue
        # As the folder was named, which is what people know it by.
        found = [path / photo.path.relative_to(photo.root) for photo in scan([path]).photos]
        if not found:
            raise InputError(f"{one_line(path)} has no photos to search for; check the path.")
        queries += found
    return queries


def _check_options(
    *, features: bool, out: Path | None, report: Path | None, many: bool, box: str | None, explain: str | None
) -> None:
    """Raise UsageError for options that make no sense together, before anything is loaded."""
    if features and out is not None:
        raise UsageError("Match pictures need photos, and --features searches without: leave --out out.")
    if many and box is not None:
        raise UsageError("--box is a part of one photo: search for one at a time with it.")
    if many and explain is not None:
        raise UsageError("--explain is for one query at a time.")
    if report is not None:
        check_page(report)


@dataclass
class _Search:
    """What is done with each query of a call. remark: told once, before the first answer. matched: all of them so far
    have a match."""

    index: DelfIndex
    state: State
    box: tuple[float, float, float, float] | None
    filter: str
    include_unverified: bool
    features: bool
    out: Path | None
    thumbnails: Thumbnails
    many: bool
    remark: str
    matched: bool = True
    interrupted: bool = False
    failures: list[str] = field(default_factory=list)

    def one(self, number: int, image: Path, page: SearchPage | None) -> None:
        """Search for one query, and tell. Of several, one that cannot be read is listed and stops nothing."""
        try:
            query = self.index.read_features(image) if self.features else image
            if self.remark:
                say(self.remark)
                self.remark = ""
            result = self.index.search(
                query, box=self.box, filter=self.filter, include_unverified=self.include_unverified
            )
        except InputError as error:
            if not self.many:
                raise
            self.failures.append(str(error))
            self.matched = False
            say(f"failed: {one_line(error)}")
            return
        if self.features:
            result = replace(result, query=str(image))
        self._tell(number, result)
        photo = None if self.features else image
        if page is not None:
            page.add(result, photo, self.box)
        if self.out is not None:
            self._draw(self.out / _folder_name(number, image) if self.many else self.out, image, result)
        self.thumbnails.show(result, photo, self.index.settings.decode)
        if self.state.verbose and not self.state.quiet:
            say("seconds: " + ", ".join(f"{step} {s:.3f}" for step, s in result.to_dict()["timings"].items()))
        self.matched = self.matched and result.matched

    def _tell(self, number: int, result: SearchResult) -> None:
        if self.many and self.state.json:
            data_json_line(result.to_dict())
            return
        if self.many:
            if number > 1:
                data_line()
            data_line(f"query: {one_line(result.query)}")
        _tell(result, self.state.json)

    def _draw(self, folder: Path, image: Path, result: SearchResult) -> None:
        from delf_milvus.imaging.draw import write_file

        pictures = self.index.draw_hits(image, result, folder, box=self.box, sheet=True)
        written = folder / RESULT
        write_file(written, (json.dumps(result.to_dict(), indent=2) + "\n").encode())
        if self.state.quiet:
            return
        if self.many:
            say(f"written: {one_line(folder)}")
            return
        for picture in pictures:
            say(f"picture: {one_line(picture)}")
        say(f"written: {one_line(written)}")


def _folder_name(number: int, image: Path) -> str:
    from delf_milvus.reporting.pictures import file_name

    return f"{number:04d}_{file_name(image.name)}"


def _explain(found: Explanation, json: bool) -> None:
    if json:
        data_json(found.to_dict())
    else:
        rows = flat({name: value for name, value in found.to_dict().items() if name not in ("transform", "verdict")})
        data_table(("stage", "value"), [(name.replace("_", " "), _short(value)) for name, value in rows])
        data_line(found.verdict)
    if not found.verified:
        raise typer.Exit(1)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def _tell(result: SearchResult, json: bool) -> None:
    if json:
        data_json(result.to_dict())
    elif not result.query_features:
        data_line("no match: the photo has no features")
    else:
        if not result.matched:
            data_line("no match")
        if result.hits:
            columns: dict[str, Callable[[Hit], object]] = {
                "rank": lambda hit: hit.rank,
                "image": lambda hit: hit.image_id,
                "inliers": lambda hit: hit.inliers if hit.compared else "-",
                "putatives": lambda hit: hit.putatives if hit.compared else "-",
                "confidence": lambda hit: f"{hit.confidence:.4f}" if hit.compared else "-",
                "false alarm": lambda hit: f"{hit.false_alarm:.1e}" if hit.compared else "-",
                "verified": lambda hit: "yes" if hit.verified else "no",
                "score": lambda hit: f"{hit.score:.3f}",
            }
            if max(hit.region for hit in result.hits) > 1:
                columns["region"] = lambda hit: hit.region or ""
            rows = ([cell(hit) for cell in columns.values()] for hit in result.hits)
            data_table(tuple(columns), rows, shorten=("image",))


def match(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="The query photo.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The photo it is compared with.")],
    out: Annotated[Path | None, typer.Option(help="Write a picture with the match lines.")] = None,
    max_false_alarm: MaxFalseAlarm = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: standard")
    ] = None,
) -> None:
    """Compare two photos without a database; exit code 1 when nothing proves that they show the same thing.

    Example: delf-milvus match a.jpg b.jpg --out pair.png
    """
    from delf_milvus.matcher import PhotoMatcher

    state = state_of(context)
    stages: Stages = {"extract": {"preset": preset}, "verify": {"max_false_alarm": max_false_alarm}}
    matcher = PhotoMatcher(state.load(stages).settings)
    pair = matcher.match(first, second)
    if out is not None:
        matcher.draw(first, second, pair, out)
    if state.json:
        data_json(pair.to_dict())
    else:
        verdict = "match" if pair.matched else "no match"
        data_line(f"{verdict}: {pair.inliers} inliers of {pair.putatives} putatives, confidence {pair.confidence:.4f}")
        if pair.transform is not None:
            (a, b, tx), (c, d, ty) = pair.transform
            data_line(f"transform: x' = {a:.4f} x + {b:.4f} y + {tx:.2f}; y' = {c:.4f} x + {d:.4f} y + {ty:.2f}")
    if out is not None and not state.quiet:
        say(f"picture: {one_line(out)}")
    if not pair.matched:
        raise typer.Exit(1)
