"""`delf-milvus train`: make a model from labelled photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train a model on photos with image-level labels.")

Data = Annotated[list[Path], typer.Option("--data", help="Folder of class folders; give it again for more.")]
Exclude = Annotated[
    Path | None, typer.Option("--exclude", help="Text file: names of class folders to leave out, one a line.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run: config, metrics, checkpoint and result.")]


def _names(path: Path | None) -> tuple[str, ...]:
    return tuple(path.read_text().split()) if path else ()


def _say(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def finetune(
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
    typer.echo(run(config, _say))
