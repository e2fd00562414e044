"""`delf-milvus train`: make a model from labelled photos."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from delf_milvus.cli.output import show_progress
from delf_milvus.cli.progress import Watched
from delf_milvus.cli.state import state_of
from delf_milvus.errors import InputError, UsageError, one_line

if TYPE_CHECKING:
    from delf_milvus.evaluation.validation import RetrievalValidation

T = TypeVar("T")

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
Out = Annotated[Path, typer.Option("--out", help="Folder of the run: config, metrics, checkpoint, result, model card.")]
Validate = Annotated[
    Path | None,
    typer.Option(
        help="Folder of folders, one a thing: retrieval in it is measured before the first and after each epoch."
    ),
]
ValidateQueries = Annotated[int, typer.Option(min=1, help="Queries of --validate at most.")]
KeepOption = Annotated[str, typer.Option("--keep", help="Weights to export: last, or best by --validate.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="auto, fp32, bf16 or fp16: arithmetic of the network; weights stay fp32.")
]
Seed = Annotated[int, typer.Option(min=0)]


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
        if error.name not in ("torchvision", "faiss"):
            raise
        raise UsageError(f"Training needs {error.name}: pip install 'delf-milvus[train]'.") from error


@contextmanager
def _watched(context: typer.Context) -> Iterator[Watched]:
    state = state_of(context)
    with Watched(show_progress(state.quiet, state.json), state.quiet) as watched:
        yield watched


def _tell(path: Path) -> None:
    """Print what was made, once for all processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(path)


def _choice(option: str, value: str, allowed: tuple[T, ...]) -> T:
    """One of the values that an option takes; raises UsageError for another."""
    for one in allowed:
        if one == value:
            return one
    raise UsageError(f"{option} is {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, not {one_line(value)}.")


def _command(context: typer.Context) -> str:
    """The call for the model card: options that differ from their default, files without the way to them."""
    words = ["delf-milvus", "train", str(context.info_name)]
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if value is None or value == option.get_default(context) or option.name == "out":
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [option.opts[0]] if isinstance(one, bool) else [option.opts[0], _short(one)]
    return shlex.join(words)


def _short(value: object) -> str:
    return value.resolve().name if isinstance(value, Path) else str(value)


def _validation(context: typer.Context, folder: Path | None, queries: int) -> RetrievalValidation | None:
    if folder is None:
        return None
    with _training_extra():
        import faiss  # noqa: F401 - told before the photos are read

        from delf_milvus.evaluation.validation import RetrievalValidation

    return RetrievalValidation(folder, queries, state_of(context).load().settings)


@app.command()
def finetune(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Initial weights: .safetensors, or GluonCV resnet50_v2 as .npz.")],
    exclude: Exclude = None,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=2, help="Photos of a step, of all processes together.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 0.001,
    keep_initial: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the initial weights kept.")] = 0.0,
    global_head: Annotated[
        str, typer.Option(help="What classifies: softmax (DELF), or arcface on a whitened global descriptor (DELG).")
    ] = "softmax",
    global_dim: Annotated[int, typer.Option(min=2, help="With arcface: length of the global descriptor.")] = 128,
    margin: Annotated[float, typer.Option(min=0.0, max=1.5, help="With arcface: margin in radians.")] = 0.1,
    scale: Annotated[float, typer.Option(min=1.0, help="With arcface: first value of the learnt scale.")] = 45.25,
    precision: PrecisionOption = "auto",
    validate: Validate = None,
    validate_queries: ValidateQueries = 100,
    keep: KeepOption = "last",
    seed: Seed = 0,
) -> None:
    """Stage one: fine-tune every layer of the trunk by classification.

    On several GPUs: torchrun --nproc-per-node 4 -m delf_milvus train finetune ...

    Example: delf-milvus train finetune --data photos/ --init imagenet.npz --out runs/finetune

    Example: delf-milvus train finetune --data photos/ --init imagenet.npz --validate places/ --keep best --out runs/f
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
        head=_choice("--global-head", global_head, ("softmax", "arcface")),
        global_dim=global_dim,
        margin=margin,
        scale=scale,
        precision=_choice("--precision", precision, ("auto", "fp32", "bf16", "fp16")),
        validate=validate,
        validate_queries=validate_queries,
        keep=_choice("--keep", keep, ("last", "best")),
    )
    judge = _validation(context, validate, validate_queries)
    with _watched(context) as say:
        written = run(config, say, validation=judge, command=_command(context))
    _tell(written)


@app.command()
def attention(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Weight file of stage one (trunk.safetensors).")],
    exclude: Exclude = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    batch: Annotated[int, typer.Option(min=2, help="Views of a step, of all processes together.")] = 32,
    views: Annotated[int, typer.Option(min=1, help="Rescaled copies of each photo.")] = 3,
    longest: Annotated[int, typer.Option(min=64, max=4096, help="Longest side of a photo before rescaling.")] = 480,
    crop: Annotated[
        int,
        typer.Option(min=0, max=2048, help="Side of random crops before rescaling, 720 in the paper; 0: all of it."),
    ] = 0,
    least_scale: Annotated[float, typer.Option(min=0.05, max=4.0, help="Random rescaling: least factor.")] = 0.4,
    most_scale: Annotated[float, typer.Option(min=0.05, max=4.0, help="Largest factor, 1 in the paper.")] = 1.25,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 0.001,
    precision: PrecisionOption = "auto",
    validate: Validate = None,
    validate_queries: ValidateQueries = 100,
    keep: KeepOption = "last",
    seed: Seed = 0,
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
        longest=longest,
        crop=crop,
        views=views,
        scales=(least_scale, most_scale),
        learning_rate=learning_rate,
        seed=seed,
        precision=_choice("--precision", precision, ("auto", "fp32", "bf16", "fp16")),
        validate=validate,
        validate_queries=validate_queries,
        keep=_choice("--keep", keep, ("last", "best")),
    )
    judge = _validation(context, validate, validate_queries)
    with _watched(context) as say:
        written = train_attention(config, say, validation=judge, command=_command(context))
    _tell(written)


@app.command()
def reduction(
    context: typer.Context,
    data: Data,
    out: Out,
    init: Annotated[Path, typer.Option(help="Weight file of stage two (or one, with --selection norm).")],
    exclude: Exclude = None,
    selection: Annotated[str, typer.Option(help="attention or norm.")] = "attention",
    method: Annotated[str, typer.Option(help="pca (DELF), or autoencoder (DELG).")] = "pca",
    dim: Annotated[int, typer.Option(min=2, max=1024)] = 40,
    global_dim: Annotated[
        int, typer.Option(min=0, max=1024, help="Length of the global descriptor; 0: the model has none.")
    ] = 128,
    keep_global: Annotated[
        bool, typer.Option("--keep-global", help="Keep the global descriptor that --global-head arcface learnt.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Of the autoencoder.")] = 20,
    seed: Seed = 0,
) -> None:
    """Fit the reduction on selected descriptors and export the finished model.

    Example: delf-milvus train reduction --data photos/ --init runs/attention/attention.safetensors --out runs/model
    """
    with _training_extra():
        from delf_milvus.training.reduction import ReductionConfig, fit_reduction

    config = ReductionConfig(
        data=tuple(data),
        out=out,
        init=init,
        exclude=_names(exclude),
        selection=_choice("--selection", selection, ("attention", "norm")),
        method=_choice("--method", method, ("pca", "autoencoder")),
        dim=dim,
        global_dim=global_dim,
        keep_global=keep_global,
        epochs=epochs,
        seed=seed,
    )
    with _watched(context) as say:
        written = fit_reduction(config, say, command=_command(context))
    _tell(written)


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
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Highest of the pieces.")] = 0.001,
    whole_rate: Annotated[float, typer.Option(min=0.0, help="Highest of the whole network.")] = 0.0001,
    precision: PrecisionOption = "auto",
    seed: Seed = 0,
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
        whole_rate=whole_rate,
        seed=seed,
        precision=_choice("--precision", precision, ("auto", "fp32", "bf16", "fp16")),
    )
    with _watched(context) as say:
        written = run(config, say, command=_command(context))
    _tell(written)


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

    # Told before minutes of work rather than after them.
    if not out.absolute().parent.is_dir():
        raise InputError(f"{one_line(out)} cannot be written: there is no such folder; make it first.")
    settings = state_of(context).load().settings
    config = CalibrationConfig(data, tuple(fill or ()), matches, frozenset(_names(exclude)))
    with _watched(context) as say:
        measured = calibrate(config, settings, say)
    try:
        measured.write(out)
    except OSError as error:
        raise InputError(f"{one_line(out)} cannot be written: {error.strerror or 'input/output error'}.") from error
    typer.echo(out)
