"""`delf-milvus status`, `list`, `show` and `delete`: no model is loaded for these."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from delf_milvus.cli.output import data_json, data_line, data_table, flat, say, uncalibrated
from delf_milvus.cli.state import state_of
from delf_milvus.errors import one_line

_EXPLAINED = 3  # unknown ids: of more, a list is wrong as a whole


def status(context: typer.Context) -> None:
    """Show the database, the collection, its index and its model.

    Example: delf-milvus --uri photos.db status
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        values = index.status()
    if state.json:
        data_json(values)
    else:
        data_table(("what", "value"), flat(values))
    if values["made_elsewhere"] and not index.calibrated and not state.quiet:
        say(uncalibrated(values["made_elsewhere"]))


def list_images(
    context: typer.Context,
    prefix: Annotated[str, typer.Option(help="Only ids that start so.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Images at most. Default: all")] = None,
) -> None:
    """List the stored images in order of their ids.

    Example: delf-milvus list --prefix holidays/ --limit 20
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        records = index.list(prefix=prefix, limit=limit)
    if state.json:
        data_json({"images": [record.to_dict() for record in records]})
    else:
        data_table(
            ("image", "width", "height", "features"),
            ((r.image_id, r.width, r.height, r.feature_count) for r in records),
            shorten=("image",),
        )


def show(context: typer.Context, image_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show what is stored of one image.

    Example: delf-milvus show holidays/tower.jpg
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        record = index.show(image_id)
    if state.json:
        data_json(record.to_dict())
    else:
        for name, value in record.to_dict().items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
            data_line(f"{name:14}{one_line(text)}")


def delete(context: typer.Context, image_ids: Annotated[list[str], typer.Argument(metavar="ID...")]) -> None:
    """Delete images by their ids; exit code 5 when one of them is not stored.

    Example: delf-milvus delete holidays/tower.jpg
    """
    state = state_of(context)
    with state.open(any_model=True) as index:
        deleted = index.delete(image_ids)
        missing = [image_id for image_id in image_ids if image_id not in set(deleted)]
        meant = [index.meant(image_id) for image_id in missing[:_EXPLAINED]]
    if state.json:
        data_json({"deleted": deleted, "missing": missing})
    else:
        data_line(f"{len(deleted)} deleted")
    for number, image_id in enumerate(missing):
        say(f"not stored: {one_line(image_id)}{meant[number] if number < len(meant) else ''}")
    if missing:
        raise typer.Exit(5)
