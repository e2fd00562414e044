"""What a weight file is, told without loading it: its specification, and the fingerprint of the features it gives.

Imports no torch, so that opening a collection costs nothing until a photo is extracted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from delf_milvus.errors import ModelError
from delf_milvus.features import Fingerprint, file_digest
from delf_milvus.settings import ExtractSettings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TrunkSpec:
    """In what the ResNet layouts differ.

    layout: "v1.5" (torchvision: stride in the 3x3 of a stage's first unit), "v2" (pre-activation, as
        GluonCV's resnet50_v2: BatchNorm on the input, units normalise before they convolve) or "v1"
        (TF-slim: stride in the 3x3 of a stage's last unit, whose identity shortcut is subsampled).
    units: number of bottleneck units in each stage.
    strides: spatial stride of each stage; the stem has stride 4.
    widths: channels of the 3x3 convolution in each stage.
    outputs: channels of each stage's output; None: four times the widths.
    mean, std: normalisation of pixel values divided by 255.
    epsilon: of every BatchNorm, the attention head's included.
    """

    layout: Literal["v1", "v1.5", "v2"] = "v2"
    units: tuple[int, ...] = (3, 4, 6)
    strides: tuple[int, ...] = (1, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    epsilon: float = field(default=1e-5)
    outputs: tuple[int, ...] | None = None

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return self.outputs or tuple(4 * width for width in self.widths)

    @property
    def stride(self) -> int:
        """Input pixels between neighbouring cells of the output map."""
        stride = 4
        for stage in self.strides:
            stride *= stage
        return stride

    @property
    def channels(self) -> int:
        """Channels of the output map."""
        return self.stage_channels[-1]


Selection = Literal["attention", "norm"]

Pyramid = Literal["area", "tf-bilinear"]
"""How a photo becomes the levels of the pyramid: "area" averages what falls together and interpolates what is
enlarged, rounded to whole values, and leaves out levels with a side shorter than one cell; "tf-bilinear" is the
official exports' `ResizeBilinear` without aligned corners and half pixels, unrounded, for levels of any size."""


@dataclass(frozen=True)
class ModelSpec:
    """What a weight file contains, and how features are chosen with it.

    selection: "attention" scores a cell with the attention head; "norm" scores it with the L2 norm of the
        raw output of the last stage and needs no head.
    dim: length of the reduced descriptors.
    attention_channels: hidden channels of the attention head; 0 where the file has no head.
    global_dim: length of the global descriptor; 0 where the file has no reduction for one.
    pyramid: how the levels are made that the network was trained on.

    Raises ValueError at construction for a pyramid that is not known.
    """

    trunk: TrunkSpec = field(default_factory=TrunkSpec)
    selection: Selection = "attention"
    dim: int = 40
    attention_channels: int = 512
    global_dim: int = 0
    pyramid: Pyramid = "area"

    def __post_init__(self) -> None:
        if self.pyramid not in get_args(Pyramid):
            raise ValueError(f"unknown pyramid {self.pyramid!r}")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelSpec:
        """The inverse of `dataclasses.asdict`; raises TypeError for unknown fields, ValueError for values of another
        type, and for a network larger than any that is trained."""
        trunk: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["trunk"].items()}
        spec = ModelSpec(**{**values, "trunk": TrunkSpec(**trunk)})
        _check(spec)
        return spec


def _check(spec: ModelSpec) -> None:
    """Raise ValueError for a specification that a file declares and no network has."""
    trunk = spec.trunk
    stages = len(trunk.units) if isinstance(trunk.units, tuple) else 0
    for name, values, most, count in (
        ("units", trunk.units, _MOST_UNITS, stages),
        ("strides", trunk.strides, _MOST_STRIDE, stages),
        ("widths", trunk.widths, _MOST_CHANNELS, stages),
        ("outputs", trunk.widths if trunk.outputs is None else trunk.outputs, _MOST_CHANNELS, stages),
        ("dim", (spec.dim,), _MOST_CHANNELS, 1),
        ("attention_channels", (spec.attention_channels or 1,), _MOST_CHANNELS, 1),
        ("global_dim", (spec.global_dim or 1,), _MOST_CHANNELS, 1),
    ):
        whole = isinstance(values, tuple) and all(type(value) is int and 1 <= value <= most for value in values)
        if not whole or len(values) != count or not 1 <= count <= _MOST_STAGES:
            raise ValueError(f"its {name} are not {count or 'some'} whole numbers from 1 to {most}")
    for name, numbers, count in (("mean", trunk.mean, 3), ("std", trunk.std, 3), ("epsilon", (trunk.epsilon,), 1)):
        finite = isinstance(numbers, tuple) and all(
            type(number) in (int, float) and -_MOST_LEVEL <= number <= _MOST_LEVEL for number in numbers
        )
        if not finite or len(numbers) != count or (name != "mean" and min(numbers) <= 0):
            raise ValueError(f"its {name} is not {count} numbers that make sense")
    known = (("layout", trunk.layout, ("v1", "v1.5", "v2")), ("selection", spec.selection, get_args(Selection)))
    for name, value, choices in known:
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}")


_MOST_STAGES = 8
_MOST_UNITS = 64
_MOST_STRIDE = 8
_MOST_CHANNELS = 32_768
_MOST_LEVEL = 1e6

METADATA_KEY = "delf_milvus"
"""Entry of a weight file's metadata that holds one JSON object: the specification and notes."""

_BUNDLED = Path(__file__).parent / "bundled"

BUNDLED = _BUNDLED / "delf_resnet50v2.safetensors"

NAMED = {"bundled": BUNDLED, "small": _BUNDLED / "delf_small.safetensors"}
"""The models that come with the package; `small` was distilled from `bundled`, for CPUs."""


def resolve(model: str | Path | None) -> Path:
    """The weight file that a `--model` value names: a path, or a name of `NAMED`; the bundled model for None.

    Raises ModelError when there is no such file.
    """
    path = BUNDLED if model is None else NAMED.get(str(model), Path(model))
    if not path.is_file():
        names = " or ".join(NAMED)
        raise ModelError(f"There is no model file at {path}; give --model a .safetensors file, {names}.")
    return path


def read_header(path: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The specification and the notes of a weight file; its tensors are not read.

    Raises ModelError for a file that is not one of ours.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[METADATA_KEY])
        return ModelSpec.from_dict(header["spec"]), header.get("notes", {})
    # MemoryError: of a length that only the header names.
    except (
        *(SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError),
        *(RecursionError, OverflowError, MemoryError),
    ) as error:
        raise ModelError(f"{path} is not a delf-milvus weight file ({error}).") from error


def selection_of(path: Path, spec: ModelSpec, settings: ExtractSettings) -> Selection:
    """How cells are scored with a weight file under these settings; raises ModelError where it lacks the head."""
    selection: Selection = spec.selection if settings.selection == "model" else settings.selection
    if selection == "attention" and not spec.attention_channels:
        raise ModelError(f"{path} has no attention head; use selection = norm with it.")
    return selection


def fingerprint_of(path: Path, settings: ExtractSettings) -> Fingerprint:
    """What identifies the features that a weight file gives under these settings.

    Raises ModelError when the file is missing, is not one of ours, or lacks what the settings ask for.
    """
    spec, _ = read_header(path)
    plan = settings.plan
    return Fingerprint(
        weights=file_digest(path),
        selection=selection_of(path, spec, settings),
        dim=spec.dim,
        longest_side=plan.longest_side,
        scales=plan.scales,
        stride=spec.trunk.stride,
        global_dim=spec.global_dim,
    )
