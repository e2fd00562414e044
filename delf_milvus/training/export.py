"""What training writes: weight files that tell how they were made, and a model card beside each.

The notes of a weight file hold one record a stage, under `training`; each stage adds its own to those of the file that
it began with. A record names folders and files without the way to them. The model card is written from the notes, so
that it cannot say anything else.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delf_milvus.errors import InputError, one_line
from delf_milvus.features import file_digest
from delf_milvus.model import weights
from delf_milvus.model.spec import ModelSpec, read_header

IDENTITY = "identity"
"""Entry of the notes: the reductions of a file that leave descriptors as they are."""

CARD = "MODEL_CARD.md"

Record = dict[str, Any]


def save_unreduced(path: Path, tensors: Mapping[str, Tensor], spec: ModelSpec, *, keep_global: bool = False) -> None:
    """Write a weight file whose reductions change nothing: it gives L2-normalised descriptors of full length.

    keep_global: but the global reduction of `tensors`, where they have one, stays.
    """
    channels = spec.trunk.channels
    kept = {name: tensor for name, tensor in tensors.items() if "reduction." not in name}
    identity, spec = ["reduction"], replace(spec, dim=channels)
    if keep_global and "global_reduction.mean" in tensors:
        kept |= {name: tensor for name, tensor in tensors.items() if name.startswith("global_reduction.")}
        spec = replace(spec, global_dim=len(tensors["global_reduction.projection"]))
    else:
        identity.append("global_reduction")
        spec = replace(spec, global_dim=channels)
    for name in identity:
        kept |= {f"{name}.mean": torch.zeros(channels), f"{name}.projection": torch.eye(channels)}
    weights.save(path, kept, spec, notes={IDENTITY: identity})


def earlier(init: Path) -> dict[str, Record]:
    """The records of the stages that made a weight file, by "number name"; none for a file of other origin."""
    if init.suffix == ".npz":
        return {}
    found = read_header(init)[1].get("training")
    return dict(found) if isinstance(found, dict) else {}


def with_stage(records: Mapping[str, Record], stage: str, record: Record) -> dict[str, Record]:
    """The records and that of one more stage."""
    # Metadata is written in the order of its names, so the number is one.
    return {**records, f"{len(records) + 1} {stage}": record}


def names(paths: Sequence[Path]) -> list[str]:
    """What files and folders are called, without the way to them."""
    return [path.resolve().name for path in paths]


def export(
    path: Path, tensors: Mapping[str, Tensor], spec: ModelSpec, records: Mapping[str, Record], *, half: bool = False
) -> Path:
    """Write a weight file with its records, and the model card beside it; raises InputError where it cannot."""
    try:
        weights.save(path, dict(tensors), spec, half=half, notes={"training": dict(records)})
        write_card(path)
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise InputError(f"{one_line(path)} cannot be written: {reason}.") from error
    return path


def write_card(model: Path) -> Path:
    """Write the model card of a weight file beside it; returns its path.

    Raises ModelError for a file that is not one of ours.
    """
    spec, notes = read_header(model)
    card = model.with_name(CARD)
    card.write_text(card_text(model.name, file_digest(model), spec, notes.get("training", {})), encoding="utf-8")
    return card


def card_text(model: str, digest: str, spec: ModelSpec, records: Mapping[str, Record]) -> str:
    """The model card, Markdown. digest: SHA-256 of the weight file; the first twelve digits name its features too."""
    trunk = spec.trunk
    finished = any("dim" in record for name, record in records.items() if name == max(records, key=_number))
    scored = "an attention head" if spec.selection == "attention" else "the norm of the last stage's raw output"
    output = f"keypoints on a grid of {trunk.stride} pixels at each scale, scored by {scored}"
    if finished:
        output += f"; {spec.dim}-d descriptors of unit length"
        output += f"; a {spec.global_dim}-d descriptor of the whole photo" if spec.global_dim else ""
    else:
        output += f"; {trunk.channels} channels, not reduced yet: `train reduction` makes a model of it"
    lines = [
        f"# Model card: {_text(model)}",
        "",
        "Local features for instance-level image retrieval (DELF: Noh et al., ICCV 2017).",
        "",
        "| | |",
        "| --- | --- |",
        f"| network | ResNet {trunk.layout}, stages of {', '.join(map(str, trunk.units))} units, "
        f"{trunk.channels} channels, stride {trunk.stride} |",
        "| input | RGB photo of any size |",
        f"| output | {output} |",
        f"| SHA-256 | `{digest}` |",
        f"| made with | delf-milvus {_version()}, torch {torch.__version__}, Python {platform.python_version()} |",
        "| licence | **to be filled in**: that of the initial weights, and what the photos' licences allow |",
        "",
        "## How it was made",
        "",
    ]
    for name in sorted(records, key=_number):
        number, _, stage = name.partition(" ")
        record = records[name]
        lines += [f"{_text(number)}. **{_text(stage)}**", ""]
        if "command" in record:
            lines += ["   ```", f"   {one_line(record['command'])}", "   ```", ""]
        lines += ["   | | |", "   | --- | --- |"]
        lines += [f"   | {_text(what)} | {_value(value)} |" for what, value in record.items() if what != "command"]
        lines.append("")
    lines += [
        "Every setting of the last stage is in `config.json`, its curves are in `metrics.jsonl`, beside this file.",
        "",
        "## What it is for, and what not",
        "",
        "- For finding photos of the same thing or place. It does not tell kinds of things, and knows no names.",
        "- How well it retrieves is known only for photos like those that it was judged on. Figures of training and "
        "validation, above, chose the weights and are no judgement: measure with `delf-milvus eval` on photos that "
        "took part in none of it.",
        "- Confidence is calibrated for another model until `delf-milvus train calibration` has measured this one.",
        "- Keypoints have no orientation: photos turned by more than some 20 degrees match worse.",
        "- Faces and people: photos of persons need their consent, and a use that the law allows.",
        "",
    ]
    return "\n".join(lines)


def _number(stage: str) -> int:
    number = stage.partition(" ")[0]
    return int(number) if number.isdecimal() else 0


def _version() -> str:
    try:
        return version("delf-milvus")
    except PackageNotFoundError:
        return "of a source tree"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{_text(name)} {_value(one)}" for name, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(one) for one in value) or "none"
    return _text(value)


def _text(value: object) -> str:
    """A value inside a table: on one line, and without what Markdown would take for its own."""
    return "".join("\\" + c if c in "\\|`*_<>[]#" else c for c in one_line(value))
