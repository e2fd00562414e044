"""A release as the official ones are laid out, with values from a seed: their own cannot be had everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delf_milvus.model.datum import datum_class

Array = npt.NDArray[np.float32]

SCOPE = "resnet_v1_50"


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each of the 222 variables of delf_v1_20171026."""
    made: dict[str, tuple[int, ...]] = {}

    def convolution(scope: str, kernel: int, inputs: int, outputs: int) -> None:
        made[f"{scope}/weights"] = (kernel, kernel, inputs, outputs)
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            made[f"{scope}/BatchNorm/{name}"] = (outputs,)

    convolution(f"{SCOPE}/conv1", 7, 3, 64)
    inputs = 64
    for block, (units, width) in enumerate(((3, 64), (4, 128), (6, 256)), 1):
        for unit in range(1, units + 1):
            scope = f"{SCOPE}/block{block}/unit_{unit}/bottleneck_v1"
            if unit == 1:
                convolution(f"{scope}/shortcut", 1, inputs, 4 * width)
            convolution(f"{scope}/conv1", 1, inputs, width)
            convolution(f"{scope}/conv2", 3, width, width)
            convolution(f"{scope}/conv3", 1, width, 4 * width)
            inputs = 4 * width
    head = "attonly/attention/compute"
    convolution(f"{head}/conv1", 1, 1024, 512)
    made[f"{head}/conv2/weights"] = (1, 1, 512, 1)
    made[f"{head}/conv2/biases"] = (1,)
    return made


def random_values(seed: int) -> dict[str, Array]:
    """Values that keep activations near one: He-like convolutions, BatchNorm with positive variances.

    Of numpy's frozen generator, so that a seed is the same values everywhere.
    """
    random = np.random.RandomState(seed)
    values = {}
    for name, shape in sorted(shapes().items()):
        drawn = random.standard_normal(shape)
        if name.endswith("weights"):
            drawn *= np.sqrt(2 / np.prod(shape[:3]))
        elif name.endswith("gamma"):
            # The sums of residuals would grow from unit to unit.
            drawn = (0.3 if "/conv3/" in name else 1.0) * (1 + 0.2 * np.tanh(drawn))
        elif name.endswith("moving_variance"):
            drawn = 1 + 0.5 * np.tanh(drawn)
        else:
            drawn *= 0.1
        values[name] = drawn.astype(np.float32)
    return values


def random_pca(seed: int, channels: int = 1024) -> dict[str, Array]:
    """The three arrays of a release's `pca` folder by the names of their files."""
    random = np.random.RandomState(seed)
    return {
        "mean": (0.02 * random.standard_normal((1, channels))).astype(np.float32),
        "pca_proj_mat": (random.standard_normal((128, channels)) / 32).astype(np.float32),
        "pca_variances": random.uniform(0.01, 0.1, (1, channels)).astype(np.float32),
    }


def write_datum(path: Path, array: npt.ArrayLike) -> Path:
    values = np.asarray(array, np.float32)
    datum = datum_class()()
    datum.shape.dim.extend(values.shape)
    datum.float_list.value.extend(values.reshape(-1).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(datum.SerializeToString())
    return path


def write_release(folder: Path, graph: Path, values: dict[str, Array], pca: dict[str, Array]) -> Path:
    """The official graph with these values, written by TensorFlow as the releases are."""
    import tensorflow as tf

    variables = folder / "model" / "variables"
    variables.mkdir(parents=True)
    shutil.copyfile(graph, folder / "model" / "saved_model.pb")
    names = list(values)
    tf.raw_ops.SaveV2(
        prefix=str(variables / "variables"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(values[name]) for name in names],
    )
    for name, array in pca.items():
        write_datum(folder / "pca" / f"{name}.datum", array)
    return folder


def run_release(folder: Path, photos: list[npt.NDArray[np.uint8]], scales: list[float], count: int) -> list[Any]:
    """What the official graph gives for photos (H, W, 3): a dict of boxes (N, 4: y0, x0, y1, x1), features (N, 1024),
    scales (N,) and scores (N, 1) for each."""
    import tensorflow as tf

    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(folder / "model"))
        fetched = {name: f"{name}:0" for name in ("boxes", "features", "scales", "scores")}
        feeds = {"input_scales:0": scales, "input_abs_thres:0": 0.0, "input_max_feature_num:0": count}
        return [session.run(fetched, {**feeds, "input_image:0": photo}) for photo in photos]
