"""`delf-milvus train`: make a model from labelled photos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from delf_milvus.cli.output import show_progress
from delf_milvus.cli.progress import Watched
from delf_milvus.cli.state import state_of
from delf_milvus.errors import InputError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    help="Train a model on photos with image-level labels.",
    epilog="Example: delf-milvus train finetune --data photos/ --init imagenet.npz --out runs/finetune",
)

Data = Annotated[
    list[Path],
    typer.Option("--data", help="Folder of class folders, or a CSV file of Google Landmarks; give it again for more."),
]
Exclude = Annotated[
    Path | None, typer.Option("--exclude", help="Text file: names of class folders to leave out, one a line.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run: config, metrics, checkpoint and result.")]


def _names(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    if not path.is_file():
        raise InputError(f"There is no file {path} with names to leave out; check --exclude.")
    return tuple(path.read_text(encoding="utf-8").split())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers with commas between them, as in 2,3,5; not {text}.") from error


@contextmanager
def _training_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise UsageError("Training needs torchvision: pip install 'delf-milvus[train]'.") from error


@contextmanager
def _watched(context: typer.Context) -> Iterator[Watched]:
    state = state_of(context)
    with Watched(show_progress(state.quiet, state.json), state.quiet) as watched:
        yield watched


@app.command()
def finetune(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Initial weights: .safetensors, or GluonCV resnet50_v2 as .npz.")],
    exclude: Exclude = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=2)] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 0.001,
    keep_initial: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the initial weights kept.")] = 0.0,
    seed: int = 0,
) -> None:
    """Stage one: fine-tune every layer of the trunk by classification.

    Example: delf-milvus train finetune --data photos/ --init imagenet.npz --out runs/finetune
    """
    with _training_extra():
        from delf_milvus.training.finetune import FinetuneConfig
        from delf_milvus.training.finetune import finetune as run

    config = FinetuneConfig(
        data=tuple(data),
        out=out,
        init=init,
        exclude=_names(exclude),
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        keep_initial=keep_initial,
        seed=seed,
    )
    with _watched(context) as say:
        written = run(config, say)
    typer.echo(written)


@app.command()
def attention(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Weight file of stage one (trunk.safetensors).")],
    exclude: Exclude = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    batch: Annotated[int, typer.Option(min=2)] = 32,
    views: Annotated[int, typer.Option(min=1, help="Rescaled copies of each photo.")] = 3,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 0.001,
    seed: int = 0,
) -> None:
    """Stage two: train the attention head on the frozen trunk.

    Example: delf-milvus train attention --data photos/ --init runs/finetune/trunk.safetensors --out runs/attention
    """
    with _training_extra():
        from delf_milvus.training.attention import AttentionConfig, train_attention

    config = AttentionConfig(
        data=tuple(data),
        out=out,
        init=init,
        exclude=_names(exclude),
        epochs=epochs,
        batch=batch,
        views=views,
        learning_rate=learning_rate,
        seed=seed,
    )
    with _watched(context) as say:
        written = train_attention(config, say)
    typer.echo(written)


@app.command()
def reduction(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Weight file of stage two (or one, with --selection norm).")],
    exclude: Exclude = None,
    selection: Annotated[str, typer.Option(help="attention or norm.")] = "attention",
    dim: Annotated[int, typer.Option(min=2, max=1024)] = 40,
    global_dim: Annotated[
        int, typer.Option(min=0, max=1024, help="Length of the global descriptor; 0: the model has none.")
    ] = 128,
) -> None:
    """Fit the reduction on selected descriptors and export the finished model.

    Example: delf-milvus train reduction --data photos/ --init runs/attention/attention.safetensors --out runs/model
    """
    from delf_milvus.training.reduction import ReductionConfig, fit_reduction

    if selection not in ("attention", "norm"):
        raise UsageError(f"--selection is attention or norm, not {selection}.")
    config = ReductionConfig(
        data=tuple(data),
        out=out,
        init=init,
        exclude=_names(exclude),
        selection="norm" if selection == "norm" else "attention",
        dim=dim,
        global_dim=global_dim,
    )
    with _watched(context) as say:
        written = fit_reduction(config, say)
    typer.echo(written)


@app.command()
def distill(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Folder of photos, or a CSV file of Google Landmarks; give it again for more."),
    ],
    out: Out,
    init: Annotated[Path | None, typer.Option(help="The large model; left out: the bundled one.")] = None,
    exclude: Exclude = None,
    units: Annotated[str, typer.Option(help="Units of each stage, 3,4,6 at most.")] = "2,3,5",
    widths: Annotated[str, typer.Option(help="Channels inside the units of each stage.")] = "32,64,128",
    outputs: Annotated[str, typer.Option(help="Channels behind each stage; the last stays the large model's.")] = (
        "128,512,1024"
    ),
    hidden: Annotated[int, typer.Option(min=1, help="Hidden channels of the attention head.")] = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    piecewise: Annotated[int, typer.Option(min=0, help="Epochs in which the pieces learn by themselves.")] = 2,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 0.001,
    seed: int = 0,
) -> None:
    """Make a small, quick model that gives the features of a large one; the photos need no labels.

    Example: delf-milvus train distill --data photos/ --out runs/small
    """
    with _training_extra():
        from delf_milvus.training.distillation import DistillationConfig
        from delf_milvus.training.distillation import distill as run
    from delf_milvus.model.spec import resolve

    if piecewise > epochs:
        raise UsageError(f"--piecewise {piecewise} is more than --epochs {epochs}.")
    config = DistillationConfig(
        data=tuple(data),
        out=out,
        init=resolve(init),
        exclude=_names(exclude),
        units=_numbers("--units", units),
        widths=_numbers("--widths", widths),
        outputs=_numbers("--outputs", outputs),
        hidden=hidden,
        epochs=epochs,
        piecewise=piecewise,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
    )
    with _watched(context) as say:
        written = run(config, say)
    typer.echo(written)


@app.command()
def calibration(
    context: typer.Context,
    data: Annotated[Path, typer.Option("--data", help="Folder of class folders; every second class is used.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file; beside a model it is model.calibration.json.")],
    fill: Annotated[
        list[Path] | None, typer.Option(help="Folder of further unrelated photos; give it again for more.")
    ] = None,
    matches: Annotated[
        Path | None, typer.Option(help="Folder of folders, one a place or thing, to weigh the evidence by.")
    ] = None,
    exclude: Exclude = None,
) -> None:
    """Measure what evidence photos without a match reach, so that confidence can be compared with it.

    Without --matches the weights of the evidence stay those of the bundled model.

    Example: delf-milvus --model model.safetensors train calibration --data photos/ --out model.calibration.json
    """
    from delf_milvus.evaluation.calibration import CalibrationConfig, calibrate

    settings = state_of(context).load().settings
    config = CalibrationConfig(data, tuple(fill or ()), matches, frozenset(_names(exclude)))
    with _watched(context) as say:
        calibrate(config, settings, say).write(out)
    typer.echo(out)
