"""`delf-milvus model`: weight files."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from delf_milvus.cli.output import data_json, data_table, flat, say
from delf_milvus.cli.state import state_of

app = typer.Typer(
    no_args_is_help=True,
    help="Weight files: what is in one, and the official releases as one.",
    epilog="Example: delf-milvus model show delf.safetensors",
)


@app.command()
def show(
    context: typer.Context,
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="Weight file. Default: that of --model")] = None,
) -> None:
    """Print the specification of a weight file and the notes in it; its tensors are not read.

    Example: delf-milvus model show delf.safetensors
    """
    state = state_of(context)
    _tell(Path(file) if file is not None else None, state.load().settings.model, state.json)


@app.command("import-official")
def import_official(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A release, unpacked: model/ and pca/ are in it.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Weight file to write, .safetensors.")],
    dim: Annotated[
        int, typer.Option(min=1, help="Components of the PCA; published: 40 with delf_v1, 128 with delf_gld.")
    ] = 40,
    whiten: Annotated[bool, typer.Option("--whiten", help="Divide the components by their deviations.")] = False,
) -> None:
    """Make a weight file of an official DELF release (delf_v1_20171026, delf_gld_20190411); needs the extra `official`.

    Example: delf-milvus model import-official delf_v1_20171026/ --out delf_v1.safetensors
    """
    # TensorFlow reports to stderr, as it loads, what it could compute with; here it reads only.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from delf_milvus.model.official import import_official as run

    state = state_of(context)
    run(folder, out, dim=dim, whiten=whiten)
    if not state.quiet:
        say("A model without a calibration of its own is judged by the bundled model's: see `calibrate`.")
    _tell(out, str(out), state.json)


def _tell(file: Path | None, model: str, json: bool) -> None:
    """Print what a weight file is: `file`, or what --model names."""
    from delf_milvus.features import file_digest
    from delf_milvus.model.spec import read_header, resolve

    path = resolve(file if file is not None else model)
    spec, notes = read_header(path)
    trunk = {**asdict(spec.trunk), "stride": spec.trunk.stride, "channels": spec.trunk.channels}
    told: dict[str, Any] = {
        "file": str(path),
        "sha256": file_digest(path),
        "spec": {**asdict(spec), "trunk": trunk},
        "notes": notes,
    }
    if json:
        data_json(told)
    else:
        data_table(("what", "value"), flat(told))
