"""`delf-milvus search` and `delf-milvus match`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.output import data_json, data_line, data_table, flat, say, uncalibrated
from delf_milvus.cli.state import Stages, state_of
from delf_milvus.errors import UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.retrieval.answers import Hit, SearchResult
    from delf_milvus.retrieval.explain import Explanation


MaxFalseAlarm = Annotated[
    float | None,
    typer.Option(help="Bar of an answer: share of queries without a match that may get one. Default: 0.01"),
]


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
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The query photo, or with --features its features.")],
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
        str | None, typer.Option(help="full (match all descriptors) or hits (neighbours only). Default: full")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for match pictures, one an answer.")] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Say what each stage thinks of this stored image instead.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="The preset that the collection was made with.")] = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="IMAGE is a feature file (.npz, .delf), or one photo of many: feats.h5#a.jpg"),
    ] = False,
) -> None:
    """Find the images that show the same thing as a photo, with proof; exit code 1 when there is none.

    Example: delf-milvus search query.jpg --top 5 --out matches/

    Example: delf-milvus search query.jpg --explain photos/tower.jpg

    Example: delf-milvus --collection superpoint search --features feats.h5#query.jpg
    """
    if features and out is not None:
        raise UsageError("Match pictures need photos, and --features searches without: leave --out out.")
    state = state_of(context)
    stages: Stages = {
        "search": {
            **{"top": top, "candidates": candidates, "mode": mode},
            **{"per_region": per_region, "expand": expand, "parts": parts or None, "turned": turned or None},
        },
        "extract": {"preset": preset},
        "verify": {"max_false_alarm": max_false_alarm},
    }
    with state.open(stages, any_model=features) as index:
        query = index.read_features(image) if features else image
        if index.made_elsewhere and not index.calibrated and not state.quiet:
            say(uncalibrated(index.made_elsewhere))
        if explain is not None:
            _explain(index.explain(query, explain, box=_box(box), filter=filter), state.json)
            return
        result = index.search(query, box=_box(box), filter=filter, include_unverified=include_unverified)
        if features:
            result = replace(result, query=str(image))
        _tell(result, state.json)
        pictures = index.draw_hits(image, result, out) if out is not None else []
    if not state.quiet:
        for picture in pictures:
            say(f"picture: {one_line(picture)}")
        if state.verbose:
            say("seconds: " + ", ".join(f"{step} {s:.3f}" for step, s in result.to_dict()["timings"].items()))
    if not result.matched:
        if not (state.quiet or state.json or features or parts or turned):
            say("--turned looks for photos that lie on their side, --parts for small things")
        raise typer.Exit(1)


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
            data_table(tuple(columns), ([cell(hit) for cell in columns.values()] for hit in result.hits))


def match(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="The query photo.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The photo it is compared with.")],
    out: Annotated[Path | None, typer.Option(help="Write a picture with the match lines.")] = None,
    max_false_alarm: MaxFalseAlarm = None,
    preset: Annotated[str | None, typer.Option(help="fast, standard or paper. Default: standard")] = None,
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
