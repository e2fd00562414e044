"""`delf-milvus index`: build, look at, drop and tune the index of the descriptors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delf_milvus.cli.output import data_json, data_line, data_table, flat, say, show_progress
from delf_milvus.cli.progress import Bar
from delf_milvus.cli.state import State, state_of
from delf_milvus.errors import UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.evaluation.tuning import TuningReport
    from delf_milvus.settings import Profile
    from delf_milvus.store.indexing import BuildProgress

app = typer.Typer(
    no_args_is_help=True, help="The index of the descriptors.", epilog="Example: delf-milvus index status"
)


def _profiles(names: list[str] | None) -> list[Profile]:
    from delf_milvus.store.profiles import PROFILES

    known: dict[str, Profile] = {name.lower(): name for name in PROFILES}
    for name in names or ():
        if name.lower() not in known:
            raise UsageError(f"There is no profile {name!r}: choose one of {', '.join(PROFILES)}.")
    return [known[name.lower()] for name in names or ()]


def one_profile(name: str | None) -> Profile | None:
    """The profile of that name, in capitals or not; None for None. Raises UsageError for one that there is not."""
    return next(iter(_profiles([name])), None) if name is not None else None


@app.command()
def build(
    context: typer.Context,
    profile: Annotated[
        str | None, typer.Option(help="auto, FLAT, IVF_PQ, PAPER, IVF_SQ8, HNSW, SCANN ... Default: the settings'")
    ] = None,
) -> None:
    """Build the index of the descriptors, whatever there was before; searches see an error or wait meanwhile.

    Example: delf-milvus --uri http://localhost:19530 index build --profile IVF_PQ
    """
    state = state_of(context)
    asked = one_profile(profile)
    with state.open(any_model=True) as index, Bar(show_progress(state.quiet, state.json)) as bar:

        def tell(progress: BuildProgress) -> None:
            bar.count(progress.step, progress.indexed, progress.total or None)

        index.build_index(asked, tell)
        values = index.index_status()
    _tell_status(state, values)


@app.command()
def status(context: typer.Context) -> None:
    """Show the index, how many rows are in it, its segments and about what memory it takes; nothing is loaded for it.

    Lists (nlist, nprobe) count in each segment, not in the whole collection.

    Example: delf-milvus index status
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        values = index.index_status()
    _tell_status(state, values)


@app.command()
def drop(context: typer.Context) -> None:
    """Release the descriptors and drop their index, which frees their memory.

    The next search or ingest builds it again first; `index build` does so at once.

    Example: delf-milvus index drop
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        dropped = index.drop_index()
    if state.json:
        data_json({"dropped": dropped})
    else:
        data_line("dropped: the next search, ingest or `index build` builds it again" if dropped else "no index")


@app.command()
def tune(
    context: typer.Context,
    profiles: Annotated[
        list[str] | None, typer.Option("--profile", help="A profile to measure; give it again for more. Default: all")
    ] = None,
    images: Annotated[int, typer.Option(min=8, max=10_000, help="Stored images in the sample.")] = 1000,
    queries: Annotated[int, typer.Option(min=1, help="Images of it that are searched for, and left out.")] = 50,
    loss: Annotated[float, typer.Option(min=0, max=1, help="Loss of mean average precision that is accepted.")] = 0.01,
    prefer: Annotated[str, typer.Option(help="balance, latency or memory: what to recommend by.")] = "balance",
    out: Annotated[Path | None, typer.Option(help="Picture of the Pareto front (.png).")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
) -> None:
    """Measure what each index loses against exact search on a sample of this collection, and recommend settings.

    The sample is copied into a collection of its own beside this one, which is dropped afterwards.

    Example: delf-milvus --uri http://localhost:19530 index tune --images 2000 --out tuning.png
    """
    from delf_milvus.evaluation.tuning import PREFERENCES, TuningConfig, tuning_picture
    from delf_milvus.evaluation.tuning import tune as run

    state = state_of(context)
    if prefer not in PREFERENCES:
        raise UsageError(f"--prefer is one of {', '.join(PREFERENCES)}, not {prefer!r}.")
    config = TuningConfig(tuple(_profiles(profiles)), images, queries, loss, prefer, seed)
    with state.open(any_model=True) as index:
        report = run(index, config, (lambda _: None) if state.quiet else say)
    if out is not None:
        tuning_picture(report, out)
    _tell_tuning(report, state.json)
    if out is not None and not state.quiet:
        say(f"picture: {one_line(out)}")


def _tell_status(state: State, values: dict[str, Any]) -> None:
    if state.json:
        data_json(values)
    else:
        data_table(("what", "value"), flat(values))


def _tell_tuning(report: TuningReport, json: bool) -> None:
    if json:
        data_json(report.to_dict())
        return
    data_table(
        ("front", "profile", "search", "recall", "mAP", "same first", "top 10", "ms", "p95 ms", "MB a million"),
        (
            (
                "*" if point.on_front else "",
                point.profile,
                " ".join(f"{name}={value:g}" for name, value in point.search.items()) or "-",
                f"{point.recall:.3f}",
                "-" if point.average_precision is None else f"{point.average_precision:.3f}",
                f"{point.same_first:.3f}",
                f"{point.overlap:.3f}",
                f"{1e3 * point.median_seconds:.1f}",
                f"{1e3 * point.p95_seconds:.1f}",
                f"{point.bytes_a_row:.0f}",
            )
            for point in report.points
        ),
    )
    for note in report.notes:
        data_line(note)
    data_line("recommended, in delf_milvus.toml:")
    data_line(report.recommended_toml)
    data_line("or in the environment:")
    data_line(report.recommended_environment)
