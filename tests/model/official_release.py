"""A release as the official ones are laid out, with values from a seed: their own cannot be had everywhere."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from delf_milvus.model.datum import datum_class
from delf_milvus.model.official import Layout

Array = npt.NDArray[np.float32]

SCOPE = "resnet_v1_50"

LAYOUT = Layout(SCOPE, strides=(2, 2, 2), epsilon=float(np.float32(1.001e-5)), offset=128, divisor=128)
"""What the graph of delf_v1_20171026 says."""


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
        elif name.endswith("biases"):
            # Softplus of what is far below zero would score every cell nearly the same.
            drawn = 2 + 0.1 * drawn
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


@dataclass(frozen=True)
class Query:
    """What the official graph is asked: a photo (H, W, 3), the pyramid, the least score, the most features."""

    photo: npt.NDArray[np.uint8]
    scales: tuple[float, ...]
    threshold: float
    count: int


@dataclass(frozen=True)
class Answer:
    """What it gives, by falling score: boxes (N, 4: y0, x0, y1, x1 in pixels), features (N, 1024), scales (N,), scores
    (N,)."""

    boxes: Array
    features: Array
    scales: Array
    scores: Array

    @property
    def locations(self) -> Array:
        """Centres of the boxes, (N, 2): x, y."""
        return ((self.boxes[:, :2] + self.boxes[:, 2:]) / 2)[:, ::-1]


def run_release(folder: Path, queries: list[Query]) -> list[Answer]:
    """The official graph itself, run by TensorFlow from the checkpoint of a release."""
    import tensorflow as tf

    answers = []
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(folder / "model"))
        for query in queries:
            feeds = {
                "input_image:0": query.photo,
                "input_scales:0": query.scales,
                "input_abs_thres:0": query.threshold,
                "input_max_feature_num:0": query.count,
            }
            boxes, features, scales, scores = session.run(["boxes:0", "features:0", "scales:0", "scores:0"], feeds)
            answers.append(Answer(boxes, features, scales, scores[:, 0]))
    return answers


def plain_reduction(features: Array, pca: dict[str, Array], dim: int, whiten: bool = False) -> Array:
    """The reference code's post-processing of (N, 1024) features: L2, PCA, L2."""
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = (x - pca["mean"]) @ pca["pca_proj_mat"][:dim].T
    if whiten:
        x = x / np.sqrt(pca["pca_variances"][0, :dim])
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


GOLDEN = Path(__file__).with_name("official_golden.npz")
GOLDEN_SEED = 20171026


def golden_query() -> Query:
    """A photo of blocks and noise from numpy's frozen generator, so that no library's drawing changes it."""
    random = np.random.RandomState(GOLDEN_SEED)
    blocks = np.kron(random.randint(0, 200, (6, 8, 3)), np.ones((15, 15, 1), np.int64))
    photo = (blocks + random.randint(0, 56, blocks.shape)).astype(np.uint8)
    return Query(photo, (0.5, 1.0, 1.4142), 0.0, 1000)


def golden_arrays(answer: Answer) -> dict[str, Array]:
    """What of an answer is kept: all places and scores, the reduced descriptors, and the best feature as it is."""
    reduced = plain_reduction(answer.features, random_pca(GOLDEN_SEED), 40)
    return {
        "locations": answer.locations,
        "scales": answer.scales,
        "scores": answer.scores,
        "descriptors": reduced,
        "feature": answer.features[0],
    }


def main(graph: Path) -> None:
    """Write the golden file with the official graph: official_release.py .../model/saved_model.pb"""
    with tempfile.TemporaryDirectory() as folder:
        values, pca = random_values(GOLDEN_SEED), random_pca(GOLDEN_SEED)
        (answer,) = run_release(write_release(Path(folder) / "release", graph, values, pca), [golden_query()])
    np.savez_compressed(GOLDEN, **golden_arrays(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
