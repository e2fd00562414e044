"""Import of the official DELF releases of TensorFlow 1: delf_v1_20171026 and delf_gld_20190411.

A release is a folder with a SavedModel in `model/` (a TF-slim ResNet up to a block, the attention head, and around them
pyramid and selection) and the PCA of its descriptors in `pca/`. The graph says in what the network differs from others
of its kind (strides, padding, epsilon, normalisation of pixels, resize); it is read and not assumed, and a graph that
says something which our network does not compute is refused. The values come from the checkpoint in `model/variables/`,
each only after its shape was found to be the one that the network needs.

TensorFlow is used to read the two, and only here; nothing of the graph is run.

Source: tensorflow/models, research/delf (`feature_extractor.py`, and the exported graph itself).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor

from delf_milvus.errors import ModelError, UsageError
from delf_milvus.features import file_digest
from delf_milvus.model import weights
from delf_milvus.model.datum import read_datum
from delf_milvus.model.delf import Delf
from delf_milvus.model.spec import ModelSpec, TrunkSpec

MAX_GRAPH_BYTES = 64 << 20
"""Size of a SavedModel's graph or index above which it is refused; that of delf_v1_20171026 has 1.3 MB."""

MAX_WIDTH, MAX_UNITS = 1024, 64
"""Channels of a convolution and units of a stage above which a checkpoint is no ResNet."""

HEAD = "attonly/attention/compute"
"""Variable scope of the attention head."""

Shape = tuple[int, ...]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """What the graph of a release says of its network.

    scope: variable scope of the trunk. strides: of each stage. epsilon: of every BatchNorm. offset, divisor: pixels
    are normalised to (value - offset) / divisor.
    """

    scope: str
    strides: tuple[int, ...]
    epsilon: float
    offset: float
    divisor: float


def import_official(
    folder: Path, out: Path, *, dim: int = 40, whiten: bool = False
) -> tuple[ModelSpec, dict[str, Any]]:
    """Read an official release and write it as a weight file; returns its specification and notes.

    folder: of a release, with `model` and `pca` in it. out: the weight file. dim: components of the PCA that are kept.
    whiten: divide each of them by the root of its variance.

    Raises UsageError without TensorFlow, or for an `out` or `dim` that makes no sense; ModelError for a folder that is
    not such a release, or is damaged.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} must end in .safetensors; change --out.")
    tensorflow = _tensorflow()
    graph_file = folder / "model" / "saved_model.pb"
    try:
        layout = layout_of(_graph(tensorflow, graph_file), tensorflow.make_ndarray, folder)
    except (LookupError, TypeError, ValueError) as error:
        # A node without the inputs, or a constant without the values, that every graph has.
        raise ModelError(f"{graph_file} is damaged; download the release again.") from error
    reader, shapes, types = _checkpoint(tensorflow, folder / "model" / "variables" / "variables")
    spec = specification(layout, shapes, dim, folder)
    values: dict[str, Array] = {}
    for name in variable_names(spec, layout.scope).values():
        if types[name] != tensorflow.float32:
            raise ModelError(f"{folder}: variable {name} is not of floats; download the release again.")
        try:
            values[name] = reader.get_tensor(name)
        except _damage(tensorflow) as error:
            raise ModelError(f"{folder}: variable {name} is damaged; download the release again.") from error
    tensors = network_state(values, spec, layout.scope, folder)
    tensors |= reduction_state(folder / "pca", spec, whiten)
    notes = {
        "imported": f"official DELF release {folder.resolve().name}",
        "graph_sha256": file_digest(graph_file),
        "whitened": whiten,
    }
    try:
        weights.save(out, tensors, spec, notes=notes)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out} cannot be written ({error}); choose another --out.") from error
    return spec, notes


def variable_names(spec: ModelSpec, scope: str) -> dict[str, str]:
    """Our names of the network's tensors, without the reduction, and TF-slim's."""
    names: dict[str, str] = {}

    def convolution(target: str, batchnorm: str, source: str) -> None:
        names[f"{target}.weight"] = f"{source}/weights"
        kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        for ours, slim in kinds.items():
            names[f"{batchnorm}.{ours}"] = f"{source}/BatchNorm/{slim}"

    convolution("trunk.conv1", "trunk.bn1", f"{scope}/conv1")
    for stage, units in enumerate(spec.trunk.units):
        for unit in range(units):
            target, source = f"trunk.stages.{stage}.{unit}", f"{scope}/block{stage + 1}/unit_{unit + 1}/bottleneck_v1"
            for index in (1, 2, 3):
                convolution(f"{target}.conv{index}", f"{target}.bn{index}", f"{source}/conv{index}")
            if unit == 0:
                convolution(f"{target}.downsample.0", f"{target}.downsample.1", f"{source}/shortcut")
    convolution("attention.conv1", "attention.bn", f"{HEAD}/conv1")
    names["attention.conv2.weight"] = f"{HEAD}/conv2/weights"
    names["attention.conv2.bias"] = f"{HEAD}/conv2/biases"
    return names


def specification(layout: Layout, shapes: Mapping[str, Any], dim: int, folder: Path) -> ModelSpec:
    """The specification of the network that a checkpoint's variables make up, by their names and shapes.

    Raises ModelError when they are not those of a TF-slim ResNet with an attention head; UsageError for a `dim` above
    the channels.
    """
    units = _units(shapes, layout.scope)
    if not units or len(units) != len(layout.strides):
        raise _unknown(folder, "its graph and its checkpoint have different stages")
    try:
        scopes = [f"{layout.scope}/block{stage + 1}/unit_1/bottleneck_v1" for stage in range(len(units))]
        widths = tuple(int(shapes[f"{scope}/conv2/weights"][3]) for scope in scopes)
        hidden = int(shapes[f"{HEAD}/conv1/weights"][3])
    except (KeyError, IndexError) as error:
        raise _unknown(folder, f"its checkpoint lacks {error}") from error
    if not all(1 <= width <= MAX_WIDTH for width in (*widths, hidden)) or max(units) > MAX_UNITS:
        raise _unknown(folder, "its layers are larger than those of any ResNet")
    trunk = TrunkSpec(
        layout="v1",
        units=units,
        strides=layout.strides,
        widths=widths,
        mean=(layout.offset / 255,) * 3,
        std=(layout.divisor / 255,) * 3,
        epsilon=layout.epsilon,
    )
    if not 1 <= dim <= trunk.channels:
        raise UsageError(f"The descriptors of {folder} have {trunk.channels} components; give a --dim up to that.")
    spec = ModelSpec(trunk, dim=dim, attention_channels=hidden, pyramid="tf-bilinear")
    with torch.device("meta"):
        needed = Delf(spec).state_dict()
    for ours, slim in variable_names(spec, layout.scope).items():
        shape = _slim_shape(tuple(needed[ours].shape))
        if slim not in shapes or tuple(shapes[slim]) != shape:
            raise _unknown(folder, f"its checkpoint lacks {slim} of shape {shape}")
    return spec


def network_state(values: Mapping[str, Array], spec: ModelSpec, scope: str, folder: Path) -> dict[str, Tensor]:
    """Trunk and attention head from the variables of a release, under our names.

    Convolutions are (height, width, inputs, outputs) there, and (outputs, inputs, height, width) here. Raises
    ModelError for values that no network has.
    """
    tensors: dict[str, Tensor] = {}
    for ours, slim in variable_names(spec, scope).items():
        value = np.asarray(values[slim], np.float32)
        if not np.isfinite(value).all() or (ours.endswith("running_var") and (value < 0).any()):
            raise ModelError(f"{folder}: variable {slim} holds no finite numbers; download the release again.")
        tensors[ours] = torch.from_numpy((value.transpose(3, 2, 0, 1) if value.ndim == 4 else value).copy())
    return tensors


def reduction_state(folder: Path, spec: ModelSpec, whiten: bool) -> dict[str, Tensor]:
    """The reduction from the three datum files of a release's PCA: its first `spec.dim` components.

    Raises ModelError for a file that is missing, damaged, or of another number of channels.
    """
    channels = spec.trunk.channels
    mean = read_datum(folder / "mean.datum").reshape(-1)
    projection = read_datum(folder / "pca_proj_mat.datum")
    if mean.shape != (channels,) or projection.ndim != 2 or projection.shape[1] != channels:
        raise ModelError(
            f"The PCA in {folder} is not one of {channels} channels; give the folder of the whole release."
        )
    if len(projection) < spec.dim:
        raise UsageError(f"The PCA in {folder} has {len(projection)} components; give a --dim up to that.")
    projection = projection[: spec.dim]
    if whiten:
        variances = read_datum(folder / "pca_variances.datum").reshape(-1)[: spec.dim]
        if len(variances) < spec.dim or (variances <= 0).any():
            raise ModelError(f"The variances in {folder} do not fit its PCA; import without --whiten.")
        projection = (projection / np.sqrt(variances)[:, None]).astype(np.float32)
    return {"reduction.mean": torch.from_numpy(mean), "reduction.projection": torch.from_numpy(projection.copy())}


def layout_of(graph: Any, array_of: Any, folder: Path) -> Layout:
    """What a release's graph (a GraphDef) says of its network; `array_of` turns a TensorProto into an array.

    Raises ModelError for a graph that computes something else than our network does.
    """
    nodes = {node.name: node for node in graph.node}
    by_operation: dict[str, list[Any]] = {}
    for node in graph.node:
        by_operation.setdefault(node.op, []).append(node)
    convolutions = by_operation.get("Conv2D", [])
    scopes = {match[1] for node in convolutions if (match := re.search(r"(?:^|/)(resnet_v1_\d+)/", node.name))}
    if len(scopes) != 1 or not any(HEAD in node.name for node in convolutions):
        raise _unknown(folder, "its graph has no TF-slim ResNet with an attention head")
    scope = scopes.pop()
    for node in [*convolutions, *by_operation.get("MaxPool", [])]:
        if not _pads_evenly(node, nodes, array_of):
            raise _unknown(folder, f"{node.name} pads its two sides differently")
    normalisations = [node for node in graph.node if node.op.startswith("FusedBatchNorm")]
    epsilons = {node.attr["epsilon"].f for node in normalisations}
    resizes = by_operation.get("ResizeBilinear", [])
    if "SpaceToBatchND" in by_operation or len(epsilons) != 1 or any(n.attr["is_training"].b for n in normalisations):
        raise _unknown(folder, "its graph has dilated convolutions, or more than one kind of BatchNorm")
    if not resizes or any(n.attr["align_corners"].b or n.attr["half_pixel_centers"].b for n in resizes):
        raise _unknown(folder, "its graph resizes photos in another way")
    if "Softplus" not in by_operation:
        raise _unknown(folder, "its attention ends in something else than softplus")
    pixels = {_normalisation(node, nodes, array_of) for node in resizes}
    if len(pixels) != 1 or None in pixels:
        raise _unknown(folder, "its graph normalises pixels in another way")
    ((offset, divisor),) = (found for found in pixels if found is not None)
    return Layout(scope, _strides(convolutions, scope, folder), epsilons.pop(), offset, divisor)


def _strides(convolutions: list[Any], scope: str, folder: Path) -> tuple[int, ...]:
    """The stride of each stage, which must be that of the 3x3 convolution of its last unit."""
    pattern = re.compile(rf"(?:^|/){scope}/block(\d+)/unit_(\d+)/bottleneck_v1/(\w+)/")
    found: dict[int, dict[tuple[int, str], int]] = {}
    for node in convolutions:
        match = pattern.search(node.name)
        stride = _side(node, "strides")
        if match is None:
            if stride != (2 if f"{scope}/conv1/" in node.name else 1):
                raise _unknown(folder, f"{node.name} has a stride of {stride}")
        elif found.setdefault(int(match[1]), {}).setdefault((int(match[2]), match[3]), stride) != stride:
            raise _unknown(folder, f"{node.name} has another stride than its twin")
    strides = []
    for stage in range(1, len(found) + 1):
        layers = found.get(stage, {})
        last = (max((unit for unit, _ in layers), default=0), "conv2")
        if last not in layers or any(stride != 1 for layer, stride in layers.items() if layer != last):
            raise _unknown(folder, f"block {stage} has its stride in another layer than slim's")
        strides.append(layers[last])
    return tuple(strides)


def _pads_evenly(node: Any, nodes: Mapping[str, Any], array_of: Any) -> bool:
    """Whether a convolution or pooling of `node`'s graph pads by (kernel - 1) / 2 on every side, with stride or not.

    SAME does so for stride 1; with a stride it pads the end more than the beginning, by the size of the photo.
    """
    if node.op == "MaxPool":
        kernel = _side(node, "ksize")
    else:
        variable = _source(nodes, node.input[1], ("Enter", "Identity"))
        if variable is None or "shape" not in variable.attr:
            return False
        kernel = variable.attr["shape"].shape.dim[0].size
    if any(dilation != 1 for dilation in node.attr["dilations"].list.i):
        return False
    if kernel == 1:
        return True
    if node.attr["padding"].s == b"SAME":
        return _side(node, "strides") == 1
    pad = nodes.get(_name(node.input[0]))
    if pad is None or pad.op != "Pad":
        return False
    paddings = _constant(nodes, pad.input[1], array_of)
    half = (kernel - 1) // 2
    return paddings is not None and paddings.tolist() == [[0, 0], [half, half], [half, half], [0, 0]]


def _normalisation(resize: Any, nodes: Mapping[str, Any], array_of: Any) -> tuple[float, float] | None:
    """(offset, divisor) of (pixels - offset) / divisor before a resize; None for anything else."""
    divided = _source(nodes, resize.input[0], ("Enter", "Identity", "ExpandDims"))
    if divided is None or divided.op != "RealDiv":
        return None
    subtracted = nodes.get(_name(divided.input[0]))
    if subtracted is None or subtracted.op != "Sub":
        return None
    image = _source(nodes, subtracted.input[0], ("Cast", "Identity"))
    divisor, offset = (_constant(nodes, node.input[1], array_of) for node in (divided, subtracted))
    if image is None or image.op != "Placeholder" or divisor is None or offset is None:
        return None
    if divisor.size != 1 or offset.size != 1 or divisor.item() <= 0:
        return None
    return float(offset.item()), float(divisor.item())


def _name(reference: str) -> str:
    """The node that an input names: "scope/node:1" is an output of it, "^scope/node" its end."""
    return reference.lstrip("^").split(":")[0]


def _source(nodes: Mapping[str, Any], reference: str, through: tuple[str, ...]) -> Any | None:
    """The node that an input comes from, behind nodes of the operations `through`; None where there is none."""
    for _ in range(8):
        node = nodes.get(_name(reference))
        if node is None or node.op not in through:
            return node
        reference = node.input[0]
    return None


def _constant(nodes: Mapping[str, Any], reference: str, array_of: Any) -> npt.NDArray[Any] | None:
    """The value of a small constant; None for anything else."""
    node = _source(nodes, reference, ("Enter", "Identity"))
    if node is None or node.op != "Const":
        return None
    tensor = node.attr["value"].tensor
    # A shape of a few bytes may stand for gigabytes of one repeated value.
    if not 0 < math.prod(dim.size for dim in tensor.tensor_shape.dim) <= 64:
        return None
    array: npt.NDArray[Any] = array_of(tensor)
    return array


def _side(node: Any, attribute: str) -> int:
    """A stride or a kernel's side, the same in both directions; 0 where it is not."""
    values = list(node.attr[attribute].list.i)
    return int(values[1]) if len(values) == 4 and values == [1, values[1], values[1], 1] else 0


def _units(shapes: Mapping[str, Any], scope: str) -> tuple[int, ...]:
    """Units of each block, by the names of a checkpoint's variables."""
    pattern = re.compile(rf"{scope}/block([1-4])/unit_(\d+)/bottleneck_v1/conv2/weights")
    counts = Counter(int(match[1]) for name in shapes if (match := pattern.fullmatch(name)))
    return tuple(counts[stage] for stage in sorted(counts))


def _slim_shape(shape: Shape) -> Shape:
    """The shape that slim gives a tensor of ours."""
    return (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else shape


def _unknown(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"{folder} is not a release that can be imported ({what}): delf_v1_20171026 and delf_gld_20190411 can, "
        "the TF2 releases (DELG) cannot."
    )


def _tensorflow() -> Any:
    try:
        import tensorflow
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise UsageError("Importing a release needs TensorFlow: pip install 'delf-milvus[official]'.") from error
    return tensorflow


def _damage(tensorflow: Any) -> tuple[type[Exception], ...]:
    """What TensorFlow raises for files that it cannot read."""
    return (tensorflow.errors.OpError, ValueError, TypeError, LookupError, RuntimeError, OSError)


def _sized(path: Path) -> None:
    """Raises ModelError for a file that is missing or too large."""
    if not path.is_file():
        raise ModelError(f"There is no {path}; give the folder of a whole release, with `model` and `pca` in it.")
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ModelError(f"{path} has more than {MAX_GRAPH_BYTES >> 20} MiB: it is no file of a DELF release.")


def _graph(tensorflow: Any, path: Path) -> Any:
    """The GraphDef of a SavedModel's first meta graph."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    _sized(path)
    saved = SavedModel()
    try:
        saved.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ModelError(f"{path} is damaged, or no SavedModel; download the release again.") from error
    if not saved.meta_graphs:
        raise ModelError(f"{path} holds no graph; download the release again.")
    return saved.meta_graphs[0].graph_def


def _checkpoint(tensorflow: Any, prefix: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The reader of a checkpoint, and shape and type of each of its variables."""
    _sized(prefix.with_name(prefix.name + ".index"))
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        return reader, reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except _damage(tensorflow) as error:
        raise ModelError(f"{prefix} is damaged, or no checkpoint; download the release again.") from error
