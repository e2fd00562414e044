"""`delf-milvus eval`: judge a collection, or the matching of pairs, by ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.completion import presets
from delf_milvus.cli.output import check_page, data_json, data_line, data_table, say, show_progress
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import Stages, State, state_of
from delf_milvus.errors import UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.evaluation.comparison import Comparison
    from delf_milvus.evaluation.dataset import DataSet
    from delf_milvus.evaluation.report import EvaluationReport
    from delf_milvus.evaluation.run import RunConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Judge by ground truth. Exit codes: 0 done, 1 some photos could not be read, others as everywhere.",
    epilog="Example: delf-milvus eval folders photos/ --limit 200 --out report",
)

Out = Annotated[
    Path,
    typer.Option(
        help="Folder for report.json, pictures, and the result of each query, which a second run goes on from."
    ),
]
Page = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Page of figures, plots, best and worst queries (.html)."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Queries at most, evenly spread. Default: all")]
NoIngest = Annotated[bool, typer.Option("--no-ingest", help="Search the collection as it is; store no photos first.")]
Preset = Annotated[str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: standard")]
Candidates = Annotated[int | None, typer.Option(help="Images that are verified, and ranked. Default: 100")]
Distractors = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="Photos that are stored too, and match nothing; again for more folders."),
]

_OUT = Path("evaluation")


@app.command()
def folders(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of photos; each searches for its instance.")],
    instances: Annotated[
        str, typer.Option(help="folder (the first one below DATA) or parent (the one a photo lies in).")
    ] = "folder",
    group: Annotated[
        int | None,
        typer.Option(min=2, help="Instead: so many photos in a row, by name, are an instance; 4 for UKBench."),
    ] = None,
    distractors: Distractors = None,
    no_match: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Queries that have no match, and are not stored; again for more folders."),
    ] = None,
    no_ingest: NoIngest = False,
    limit: Limit = None,
    out: Out = _OUT,
    page: Page = None,
    preset: Preset = None,
    candidates: Candidates = None,
) -> None:
    """Let every photo of a folder search for the others of its instance.

    Figures: mAP (by trapezoids; the query itself does not count), N-S with --group 4, recall and precision at 1, 5 and
    10, how often right and wrong images are accepted at the bar of the settings, false alarms, seconds.

    Example: delf-milvus --collection judged eval folders ukbench/ --group 4 --limit 200 --out ukbench-report
    """
    from delf_milvus.evaluation.folders import FoldersConfig, folders_set
    from delf_milvus.evaluation.run import RunConfig

    if page is not None:
        check_page(page)
    if instances not in ("folder", "parent"):
        raise UsageError(f"--instances is folder or parent, not {instances!r}.")
    _check_distractors(distractors, no_ingest)
    data_set = folders_set(
        FoldersConfig(
            data,
            "folder" if instances == "folder" else "parent",
            group,
            tuple(distractors or ()),
            tuple(no_match or ()),
        )
    )
    _run(state_of(context), data_set, RunConfig(out, not no_ingest, limit, page), preset, candidates)


@app.command()
def revisited(
    context: typer.Context,
    ground_truth: Annotated[
        Path, typer.Argument(metavar="GROUND_TRUTH", help="gnd_roxford5k.pkl as published, or the same as .json.")
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of the photos, queries among them.")],
    distractors: Distractors = None,
    no_ingest: NoIngest = False,
    limit: Limit = None,
    out: Out = _OUT,
    page: Page = None,
    preset: Preset = None,
    candidates: Candidates = None,
) -> None:
    """Run the revisited Oxford or Paris protocol: mAP and mP@1/5/10, easy, medium and hard, with cropped queries.

    The pickle is read as data: containers, text, numbers and arrays; whatever else it asks for is refused. A ranking
    has 1000 images at most: the candidates of the search first, then the rest of the shortlist.

    Example: delf-milvus --collection roxford eval revisited gnd_roxford5k.pkl oxford/jpg --out roxford-report
    """
    from delf_milvus.evaluation.revisited import RevisitedConfig, revisited_set
    from delf_milvus.evaluation.run import RunConfig

    if page is not None:
        check_page(page)
    _check_distractors(distractors, no_ingest)
    data_set = revisited_set(RevisitedConfig(ground_truth, images, tuple(distractors or ())))
    _run(state_of(context), data_set, RunConfig(out, not no_ingest, limit, page), preset, candidates)


@app.command()
def landmarks(
    context: typer.Context,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES", help="Folder of the query photos, id.jpg each.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the photos to store; not with --no-ingest.")] = None,
    retrieval: Annotated[Path | None, typer.Option(help="Retrieval solution: CSV of id, images[, Usage].")] = None,
    recognition: Annotated[
        Path | None, typer.Option(help="Recognition solution: CSV of id, landmarks[, Usage].")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV of id, landmark_id: what the stored photos show, for recognition.")
    ] = None,
    usage: Annotated[str | None, typer.Option(help="Only public or private queries. Default: both")] = None,
    no_ingest: NoIngest = False,
    limit: Limit = None,
    out: Out = _OUT,
    page: Page = None,
    preset: Preset = None,
    candidates: Candidates = None,
) -> None:
    """Run the Google Landmarks protocols: retrieval (mAP@100) and recognition (GAP), with queries without a landmark.

    Example: delf-milvus eval landmarks test/ --images index/ --retrieval retrieval_solution_v2.1.csv --out gld-report
    """
    from delf_milvus.evaluation.landmarks import LandmarksConfig, landmarks_set
    from delf_milvus.evaluation.run import RunConfig

    if page is not None:
        check_page(page)
    if no_ingest == (images is not None):
        raise UsageError("Give --images, the folder of the photos to store, or --no-ingest for those that are stored.")
    if usage is not None and usage.lower() not in ("public", "private"):
        raise UsageError(f"--usage is public or private, not {usage!r}.")
    whose = None if usage is None else usage.lower()
    data_set = landmarks_set(LandmarksConfig(queries, images, retrieval, recognition, labels, whose))
    _run(state_of(context), data_set, RunConfig(out, not no_ingest, limit, page), preset, candidates)


@app.command()
def pairs(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV or JSONL of a, b and homography or fundamental (nine numbers).")
    ],
    threshold: Annotated[float, typer.Option(min=0, help="Pixels of photo b up to which a match is right.")] = 10.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Pairs at most, evenly spread. Default: all")] = None,
    out: Out = _OUT,
    page: Page = None,
    preset: Preset = None,
) -> None:
    """Match pairs of photos whose geometry is known; no database is used.

    Figures: matching precision (by the homography, or by the symmetric epipolar distance), right matches, pairs that
    found nothing, the error of four corners under the estimated transform and the area under its curve. Paths are
    relative to FILE; the matrices go from pixels of a to pixels of b, row by row.

    Example: delf-milvus eval pairs pairs.csv --threshold 5 --out pairs-report
    """
    from delf_milvus.evaluation.pairs import PairsConfig, run_pairs
    from delf_milvus.matcher import PhotoMatcher

    if page is not None:
        check_page(page)
    state = state_of(context)
    matcher = PhotoMatcher(state.load({"extract": {"preset": preset}}).settings)
    config = PairsConfig(file, out, threshold, limit, page)
    with _interruptible(out), Bar(show_progress(state.quiet, state.json), "ingest") as bar:
        report = run_pairs(matcher, config, _counted(bar, "match", "pairs"))
    _tell(report, state, out, page)


@app.command()
def compare(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="report.json, or the folder it lies in.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The report that is held against it.")],
) -> None:
    """Compare two reports of one data set over their common queries: B less A, with intervals and a permutation test.

    Example: delf-milvus eval compare standard-report fast-report
    """
    from delf_milvus.evaluation.comparison import compare as compared
    from delf_milvus.evaluation.report import EvaluationReport

    state = state_of(context)
    comparison = compared(EvaluationReport.read(first), EvaluationReport.read(second))
    if state.json:
        data_json(comparison.to_dict())
    else:
        _tell_comparison(comparison)


def _check_distractors(distractors: list[Path] | None, no_ingest: bool) -> None:
    if no_ingest and distractors:
        raise UsageError("--distractors stores photos; with --no-ingest whatever else the collection has distracts.")


def _run(
    state: State,
    data_set: DataSet,
    config: RunConfig,
    preset: str | None,
    candidates: int | None,
) -> None:
    from delf_milvus.evaluation.run import run

    stages: Stages = {"extract": {"preset": preset}, "search": {"candidates": candidates}}
    with (
        _interruptible(config.out),
        state.open(stages, create=config.ingest) as index,
        Bar(show_progress(state.quiet, state.json), "ingest") as bar,
    ):
        report = run(
            index,
            data_set,
            config,
            (lambda _: None) if state.quiet else say,
            ingesting=bar.update,
            searching=_counted(bar, "search", "queries"),
        )
    _tell(report, state, config.out, config.page)


def _counted(bar: Bar, what: str, unit: str) -> Callable[[int, int, int], None]:
    return lambda done, total, failed: bar.count(what, done, total, failed=failed, unit=unit)


def _tell(report: EvaluationReport, state: State, out: Path, page: Path | None) -> None:
    from delf_milvus.evaluation.pairs import CORNER_ERRORS
    from delf_milvus.evaluation.pictures import INLIERS, PRECISION_RECALL, RELIABILITY
    from delf_milvus.evaluation.report import REPORT

    for failure in report.failures:
        say(f"failed: {one_line(failure.error)}")
    if state.json:
        data_json(report.to_dict())
    else:
        data_table(
            ("figure", "value", "low", "high", "queries", "what"),
            (
                (name, *(f"{number:.4f}" for number in numbers), queries, report.about[name].what)
                for name, (*numbers, queries) in report.figures.items()
            ),
        )
        data_line("low and high: 95 % interval, by resampling the queries")
        for note in report.notes:
            data_line(note)
    if not state.quiet:
        names = (CORNER_ERRORS,) if report.kind == "pairs" else (PRECISION_RECALL, INLIERS, RELIABILITY)
        for path in (*(out / name for name in (REPORT, *names)), *([] if page is None else [page])):
            if path.is_file():
                say(f"written: {one_line(path)}")
    if report.failures:
        raise typer.Exit(1)


def _tell_comparison(comparison: Comparison) -> None:
    data_table(
        ("figure", "A", "B", "B - A", "low", "high", "p", "queries", "B is"),
        (
            (
                one.name,
                f"{one.first:.4f}",
                f"{one.second:.4f}",
                f"{one.difference:+.4f}",
                f"{one.low:+.4f}",
                f"{one.high:+.4f}",
                f"{one.p:.4f}",
                one.queries,
                one.verdict,
            )
            for one in comparison.figures
        ),
    )
    data_line("low and high: 95 % interval of the difference; p: two-sided, by exchanging the runs of single queries")
    if comparison.changed:
        data_line("the two differ in:")
    for change in comparison.changed:
        data_line(f"  {one_line(change)}")


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Ctrl-C ends with one sentence and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted: what was stored and answered stays in {one_line(out)}; run the same command again to go on.")
        raise typer.Exit(130) from None
