"""Weight files: reading and writing the network, and the ImageNet weights that training starts from.

A weight file is safetensors and nothing else. Its metadata holds the `ModelSpec` that the tensors belong to (see
`spec`). Nothing in a weight file is ever executed or unpickled.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from delf_milvus.errors import ModelError
from delf_milvus.model.delf import Delf
from delf_milvus.model.spec import METADATA_KEY, ModelSpec, TrunkSpec, read_header
from delf_milvus.model.trunk import Trunk


def save(
    path: Path, tensors: dict[str, Tensor], spec: ModelSpec, *, half: bool = False, notes: dict[str, Any] | None = None
) -> None:
    """Write a weight file; with `half`, matrices and convolutions become fp16 and vectors stay fp32."""

    def stored(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        # A BatchNorm variance below 6e-5 would lose bits in fp16, and vectors weigh next to nothing.
        return tensor.half() if half and tensor.ndim >= 2 and "reduction." not in name else tensor

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {METADATA_KEY: json.dumps({"spec": asdict(spec), "notes": notes or {}}, sort_keys=True)}
    save_file({name: stored(name, tensor) for name, tensor in sorted(tensors.items())}, partial, metadata)
    partial.replace(path)


def read(path: Path) -> tuple[ModelSpec, dict[str, Tensor], dict[str, Any]]:
    """The specification, the tensors (fp32, by name) and the notes of a weight file.

    Raises ModelError for a file that is not one of ours.
    """
    spec, notes = read_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ModelError(f"{path} is not a delf-milvus weight file ({error}).") from error
    if unsound := next((n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None):
        raise ModelError(f"{path} is damaged: its {unsound} holds values that are not finite.")
    return spec, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, notes


def load(path: Path) -> Delf:
    """The network of a weight file, in fp32 and evaluation mode.

    Raises ModelError when the tensors do not fit the specification.
    """
    spec, tensors, _ = read(path)
    # What a file merely declares takes no memory before the tensors are there for it.
    with torch.device("meta"):
        _check_shapes(Delf(spec), tensors, path)
    network = Delf(spec)
    _fill(network, tensors, path)
    return network.eval()


def _check_shapes(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ModelError for tensors that are missing, or of another shape than the network has."""
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in tensors:
            raise ModelError(f"{path} does not hold the tensors that its specification says (first: {name}).")
        if tensors[name].shape != tensor.shape:
            raise ModelError(f"{path} holds tensors of another shape than its specification says.")


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the tensors, all that the network has and no other; raises ModelError."""
    try:
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path} holds tensors of another shape than its specification says.") from error
    # BatchNorm counts batches, which nothing here reads and other software leaves out.
    different = [name for name in missing + unexpected if not name.endswith("num_batches_tracked")]
    if different:
        raise ModelError(f"{path} does not hold the tensors that its specification says (first: {different[0]}).")


def initial(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The specification and the tensors (fp32, by name) to train or fit from: one of our weight files, or GluonCV's
    resnet50_v2 as .npz, which is a trunk alone.

    Raises ModelError for anything else.
    """
    if path.suffix == ".npz":
        trunk = _trunk_from_gluon(path)
        spec = ModelSpec(trunk=trunk.spec, selection="norm", attention_channels=0)
        return spec, {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    spec, tensors, _ = read(path)
    return spec, tensors


def initial_trunk(path: Path) -> Trunk:
    """A trunk to start training from: one of our weight files, or GluonCV's resnet50_v2 as .npz.

    Raises ModelError for anything else, and for a file without the whole trunk.
    """
    if path.suffix == ".npz":
        return _trunk_from_gluon(path)
    spec, tensors, _ = read(path)
    own = {name.removeprefix("trunk."): t for name, t in tensors.items() if name.startswith("trunk.")}
    with torch.device("meta"):
        _check_shapes(Trunk(spec.trunk), own, path)
    trunk = Trunk(spec.trunk)
    _fill(trunk, own, path)
    return trunk


_UNREADABLE = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error),  # cut short, or damaged
    *(ValueError, TypeError, AttributeError, RuntimeError),  # whole, but no archive of arrays of numbers
)


def _trunk_from_gluon(path: Path) -> Trunk:
    """GluonCV names its layers by order of creation: in a unit three BatchNorms, three convolutions, then the
    shortcut's convolution where there is one."""
    spec = TrunkSpec(layout="v2")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except _UNREADABLE as error:
        raise ModelError(f"{path} is not a readable .npz file; check --init, or download it again.") from error
    state: dict[str, Tensor] = {}

    def batchnorm(target: str, source: str) -> None:
        state[f"{target}.weight"] = arrays[f"{source}_gamma"]
        state[f"{target}.bias"] = arrays[f"{source}_beta"]
        state[f"{target}.running_mean"] = arrays[f"{source}_running_mean"]
        state[f"{target}.running_var"] = arrays[f"{source}_running_var"]

    try:
        state["input_bn.running_mean"] = arrays["batchnorm0_running_mean"]
        state["input_bn.running_var"] = arrays["batchnorm0_running_var"]
        state["conv1.weight"] = arrays["conv0_weight"]
        batchnorm("bn1", "batchnorm1")
        for stage, units in enumerate(spec.units):
            for unit in range(units):
                target, source = f"stages.{stage}.{unit}", f"stage{stage + 1}"
                first = 0 if unit == 0 else 4 + 3 * (unit - 1)
                for index in range(3):
                    batchnorm(f"{target}.bn{index + 1}", f"{source}_batchnorm{3 * unit + index}")
                    state[f"{target}.conv{index + 1}.weight"] = arrays[f"{source}_conv{first + index}_weight"]
                if unit == 0:
                    state[f"{target}.downsample.weight"] = arrays[f"{source}_conv3_weight"]
        batchnorm("final_bn", "stage4_batchnorm0")
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}: it is not GluonCV's resnet50_v2.") from error
    trunk = Trunk(spec)
    try:
        _fill(trunk, state, path)
    except ModelError as error:
        raise ModelError(f"{path} holds layers of another shape: it is not GluonCV's resnet50_v2.") from error
    return trunk
