"""The official releases of TensorFlow 1 as weight files: our network computes what the official graph computes.

The values of the releases are not needed for that: the official graph is filled with values from a seed, run by
TensorFlow, and compared with the weight file that the import makes of them. The comparison with TensorFlow is slow and
needs TensorFlow (extra: official) and the reference folder; a small file of the graph's answers guards the same without
either.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from official_release import (
    GOLDEN,
    GOLDEN_SEED,
    LAYOUT,
    SCOPE,
    Answer,
    Query,
    golden_arrays,
    golden_query,
    plain_reduction,
    random_pca,
    random_values,
    run_release,
    shapes,
    write_datum,
    write_release,
)

from delf_milvus.errors import ModelError, UsageError
from delf_milvus.features import Features
from delf_milvus.model import weights
from delf_milvus.model.datum import read_datum
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.official import (
    import_official,
    layout_of,
    network_state,
    reduction_state,
    specification,
)
from delf_milvus.model.resize import resize_tf_bilinear, tf_size
from delf_milvus.settings import ExtractSettings

SCALES = (0.25, 0.3536, 0.5, 0.7071, 1.0, 1.4142, 2.0)

# Some ten times the largest differences: scores go to 1.4, descriptors to 1, and 40 layers round in fp32.
SCORE, DESCRIPTOR, PIXEL = 2e-5, 1e-5, 1e-3


def extract(model: Path, query: Query) -> Features:
    settings = ExtractSettings(
        precision="fp32", longest_side=1024, scales=query.scales, min_attention=query.threshold or None
    )
    return Extractor(model, settings).extract(query.photo, query.count)


def cells(locations: np.ndarray, scales: np.ndarray) -> list[tuple[float, int, int]]:
    """Scale, column and row of each keypoint."""
    grid = np.rint(locations / (32 * scales[:, None])).astype(int).tolist()
    return [(round(float(scale), 4), x, y) for scale, (x, y) in zip(scales, grid, strict=True)]


def compare(mine: Features, official: Answer, expected: np.ndarray) -> dict[str, float]:
    """The largest differences, of the same keypoints in the same order; `expected` are the official descriptors.

    Neighbours may have changed places where their scores differ by less than twice what rounding changes any score.
    """
    ours, theirs = cells(mine.locations, mine.scales), cells(official.locations, official.scales)
    assert len(set(theirs)) == len(theirs)
    assert set(ours) == set(theirs)
    place = {cell: index for index, cell in enumerate(theirs)}
    order = np.array([place[cell] for cell in ours])
    largest = {
        "moved": float((order != np.arange(len(order))).sum()),
        "location": float(np.abs(mine.locations - official.locations[order]).max()),
        "scale": float(np.abs(mine.scales - official.scales[order]).max()),
        "score": float(np.abs(mine.attention - official.scores[order]).max()),
        "descriptor": float(np.abs(mine.descriptors - expected[order]).max()),
    }
    assert (np.diff(official.scores[order]) <= 2 * largest["score"]).all()
    assert largest["location"] < PIXEL
    assert largest["scale"] < 1e-6
    assert largest["score"] < SCORE
    assert largest["descriptor"] < DESCRIPTOR
    return largest


@pytest.fixture(scope="module")
def tensorflow() -> Any:
    return pytest.importorskip("tensorflow", reason="needs TensorFlow (extra: official)")


@pytest.fixture(scope="module")
def graph_file(shared: Path) -> Path:
    path = shared / "reference" / "delf_v1_20171026" / "model" / "saved_model.pb"
    if not path.is_file():
        pytest.skip("needs the official graph (reference/delf_v1_20171026)")
    return path


@pytest.fixture(scope="module")
def release(tensorflow: Any, graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "delf_random"
    return write_release(folder, graph_file, random_values(GOLDEN_SEED), random_pca(GOLDEN_SEED))


@pytest.fixture(scope="module")
def queries(shared: Path) -> list[Query]:
    """Two photos with the whole pyramid and the best 300 cells; then one with a bar between two scores."""
    landmark = sorted((shared / "data" / "landmarks").glob("*/*.jpg"))[0]
    made = []
    for path in (shared / "reference" / "love.jpg", landmark):
        photo = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        side = 300 / max(photo.shape[:2])
        photo = cv2.resize(photo, None, fx=side, fy=side, interpolation=cv2.INTER_AREA)
        made.append(Query(photo, SCALES, 0.0, 300))
    return [*made, Query(made[0].photo, (0.7071, 1.0), 0.2, 1000)]


@pytest.fixture(scope="module")
def answers(release: Path, queries: list[Query]) -> list[Answer]:
    return run_release(release, [*queries, golden_query()])


@pytest.fixture(scope="module")
def imported(release: Path) -> Path:
    out = release / "imported.safetensors"
    import_official(release, out)
    return out


@pytest.mark.slow
def test_the_imported_model_equals_the_official_graph_from_photo_to_reduced_descriptors(
    imported: Path, queries: list[Query], answers: list[Answer], capsys: pytest.CaptureFixture[str]
) -> None:
    pca = random_pca(GOLDEN_SEED)
    for query, answer in zip(queries, answers[: len(queries)], strict=True):
        expected = plain_reduction(answer.features, pca, 40)
        largest = compare(extract(imported, query), answer, expected)
        with capsys.disabled():
            print(f"\n{len(answer.scores)} keypoints, scores to {answer.scores.max():.2f}; after PCA: {largest}")
    # The bar is between scores, and leaves something on both sides of it.
    assert 10 < len(answers[2].scores) < 100


@pytest.mark.slow
def test_the_imported_model_equals_the_official_graph_before_the_pca(
    release: Path, queries: list[Query], answers: list[Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "no_pca"
    folder.mkdir()
    (folder / "model").symlink_to(release / "model")
    write_datum(folder / "pca" / "mean.datum", np.zeros((1, 1024)))
    write_datum(folder / "pca" / "pca_proj_mat.datum", np.eye(1024))
    out = tmp_path / "no_pca.safetensors"
    import_official(folder, out, dim=1024)
    for query, answer in zip(queries, answers[: len(queries)], strict=True):
        expected = answer.features / np.linalg.norm(answer.features, axis=1, keepdims=True)
        largest = compare(extract(out, query), answer, expected)
        with capsys.disabled():
            print(f"\n{len(answer.scores)} keypoints; before PCA: {largest}")


@pytest.mark.slow
def test_the_golden_file_is_what_the_official_graph_gives(answers: list[Answer]) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for name, array in golden_arrays(answers[-1]).items():
            np.testing.assert_allclose(golden[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_layout_is_read_off_the_official_graph(tensorflow: Any, graph_file: Path) -> None:
    graph = official_graph(graph_file)
    assert layout_of(graph, tensorflow.make_ndarray, graph_file) == LAYOUT
    variables = {
        node.name: tuple(dim.size for dim in node.attr["shape"].shape.dim)
        for node in graph.node
        if node.op == "VariableV2"
    }
    assert variables == shapes()


def official_graph(path: Path) -> Any:
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel.FromString(path.read_bytes()).meta_graphs[0].graph_def


def _align(node: Any) -> None:
    node.attr["align_corners"].b = True


def _half_pixels(node: Any) -> None:
    node.attr["half_pixel_centers"].b = True


def _strided(node: Any) -> None:
    node.attr["strides"].list.i[1:3] = [2, 2]


def _same(node: Any) -> None:
    node.attr["padding"].s = b"SAME"


def _epsilon(node: Any) -> None:
    node.attr["epsilon"].f = 1e-3


def _dilated(node: Any) -> None:
    node.attr["dilations"].list.i[:] = [1, 2, 2, 1]


def _multiplied(node: Any) -> None:
    node.op = "Mul"


def _sigmoid(node: Any) -> None:
    node.op = "Sigmoid"


BLOCK = "resnet_v1_50/block2/unit_1/bottleneck_v1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "scope", "change", "message"),
    [
        ("ResizeBilinear", "while/", _align, "resizes photos in another way"),
        ("ResizeBilinear", "", _half_pixels, "resizes photos in another way"),
        ("Conv2D", f"(while/)?{BLOCK}/conv1/", _strided, "stride in another layer"),
        ("Conv2D", f"{BLOCK}/conv1/", _strided, "another stride than its twin"),
        ("Conv2D", f"{SCOPE}/block2/unit_4/bottleneck_v1/conv2/", _same, "pads its two sides differently"),
        ("MaxPool", f"while/{SCOPE}/pool1/", _same, "pads its two sides differently"),
        ("FusedBatchNorm", f"{SCOPE}/conv1/", _epsilon, "more than one kind of BatchNorm"),
        ("Conv2D", f"{BLOCK}/conv2/", _dilated, "pads its two sides differently"),
        ("RealDiv", "div", _multiplied, "normalises pixels in another way"),
        ("Softplus", "", _sigmoid, "something else than softplus"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(
    tensorflow: Any, graph_file: Path, operation: str, scope: str, change: Any, message: str
) -> None:
    graph = official_graph(graph_file)
    changed = [node for node in graph.node if node.op == operation and re.match(scope, node.name)]
    assert changed
    for node in changed:
        change(node)
    with pytest.raises(ModelError, match=message):
        layout_of(graph, tensorflow.make_ndarray, Path("release"))


@pytest.mark.slow
def test_a_damaged_release_is_one_sentence(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def copy(name: str) -> Path:
        folder = tmp_path / name
        (folder / "model" / "variables").mkdir(parents=True)
        for source in release.glob("model/**/*"):
            if source.is_file():
                (folder / source.relative_to(release)).symlink_to(source)
        (folder / "pca").symlink_to(release / "pca")
        return folder

    def replaced(path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    cut, noise, empty, whole = (copy(name) for name in ("cut", "noise", "empty", "whole"))
    data = "model/variables/variables.data-00000-of-00001"
    replaced(cut / data, (release / data).read_bytes()[: 1 << 20])
    replaced(noise / "model/variables/variables.index", b"noise" * 1000)
    replaced(empty / "model/saved_model.pb", b"")
    for folder, message in ((cut, "damaged"), (noise, "damaged"), (empty, "no graph"), (tmp_path, "whole release")):
        with pytest.raises(ModelError, match=message) as caught:
            import_official(folder, out)
        assert "\n" not in str(caught.value)
    replaced(whole / "model/saved_model.pb", b"\xff" * 100)
    with pytest.raises(ModelError, match="no SavedModel"):
        import_official(whole, out)
    with pytest.raises(UsageError, match="128 components"):
        import_official(release, out, dim=129)
    with pytest.raises(UsageError, match="1024 components"):
        import_official(release, out, dim=1025)
    with pytest.raises(UsageError, match="cannot be written"):
        import_official(release, release / "model/saved_model.pb/out.safetensors")
    assert not out.exists()


@pytest.mark.slow
def test_the_command_writes_a_file_that_show_describes(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    out = tmp_path / "official.safetensors"
    run = [sys.executable, "-m", "delf_milvus.cli.main"]
    made = subprocess.run(
        [*run, "model", "import-official", str(release), "--out", str(out), "--dim", "32"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert len(made.stderr.splitlines()) == 1
    shown = subprocess.run([*run, "model", "show", str(out)], capture_output=True, text=True, check=True)
    assert shown.stdout == made.stdout
    rows = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert (rows["spec.dim"], rows["spec.trunk.stride"], rows["spec.pyramid"]) == ("32", "32", "tf-bilinear")
    assert rows["notes.imported"] == "official DELF release delf_random"


def test_import_without_tensorflow_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tensorflow'] = None; from delf_milvus.cli.main import run; run()"
    arguments = ["model", "import-official", str(tmp_path), "--out", "out.safetensors"]
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr == "Error: Importing a release needs TensorFlow: pip install 'delf-milvus[official]'.\n"


def write_imported(folder: Path, dim: int = 40, whiten: bool = False) -> Path:
    """The weight file of a release with the golden values; the steps of the import that need no TensorFlow."""
    for name, array in random_pca(GOLDEN_SEED).items():
        write_datum(folder / "pca" / f"{name}.datum", array)
    spec = specification(LAYOUT, shapes(), dim, folder)
    tensors = network_state(random_values(GOLDEN_SEED), spec, SCOPE, folder)
    weights.save(folder / "m.safetensors", tensors | reduction_state(folder / "pca", spec, whiten), spec)
    return folder / "m.safetensors"


def test_the_network_gives_the_official_graphs_answers_in_the_golden_file(tmp_path: Path) -> None:
    model = write_imported(tmp_path)
    with np.load(GOLDEN, allow_pickle=False) as golden:
        arrays = dict(golden)
    official = Answer(
        np.concatenate([arrays["locations"][:, ::-1]] * 2, axis=1),
        arrays["feature"],
        arrays["scales"],
        arrays["scores"],
    )
    query = golden_query()
    largest = compare(extract(model, query), official, arrays["descriptors"])
    assert largest["moved"] == 0
    # The best cell's feature as it is, before any normalisation.
    network = weights.load(model)
    scale, column, row = cells(official.locations, official.scales)[0]
    height, width = tf_size(query.photo.shape[:2], 1 / scale)
    pixels = resize_tf_bilinear(torch.from_numpy(query.photo).float(), height, width)
    with torch.inference_mode():
        features, _ = network(pixels.permute(2, 0, 1)[None])
    np.testing.assert_allclose(features[0, :, row, column].numpy(), arrays["feature"], rtol=1e-4, atol=1e-4)


def test_whitening_divides_the_components_by_their_deviations(tmp_path: Path) -> None:
    spec = specification(LAYOUT, shapes(), 40, tmp_path)
    pca = random_pca(3)
    for name, array in pca.items():
        write_datum(tmp_path / f"{name}.datum", array)
    features = np.random.default_rng(0).random((5, 1024), np.float32)
    for whiten in (False, True):
        reduction = weights.Delf(spec).reduction
        reduction.load_state_dict(
            {name.removeprefix("reduction."): t for name, t in reduction_state(tmp_path, spec, whiten).items()}
        )
        expected = plain_reduction(features, pca, 40, whiten)
        np.testing.assert_allclose(reduction(torch.from_numpy(features)).numpy(), expected, atol=1e-5)
    write_datum(tmp_path / "pca_variances.datum", np.zeros((1, 1024)))
    with pytest.raises(ModelError, match="without --whiten"):
        reduction_state(tmp_path, spec, True)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path: Path) -> None:
    good = shapes()
    first = f"{SCOPE}/block1/unit_1/bottleneck_v1/conv2/weights"
    for changed, message in (
        ({}, "different stages"),
        ({k: v for k, v in good.items() if k != "attonly/attention/compute/conv1/weights"}, "lacks"),
        ({k: v for k, v in good.items() if "unit_2/bottleneck_v1/conv1" not in k}, "lacks resnet"),
        (good | {f"{SCOPE}/conv1/weights": (5, 5, 3, 64)}, "lacks resnet_v1_50/conv1"),
        (good | {first: (3, 3, 64, 1 << 40)}, "larger than those of any ResNet"),
        (good | {first: (3,)}, "lacks"),
    ):
        with pytest.raises(ModelError, match=message):
            specification(LAYOUT, changed, 40, tmp_path)
    with pytest.raises(ModelError, match="different stages"):
        specification(replace(LAYOUT, strides=(2, 2)), good, 40, tmp_path)
    with pytest.raises(ModelError, match="different stages"):
        specification(replace(LAYOUT, strides=()), {}, 40, tmp_path)
    with pytest.raises(UsageError, match="1024 components"):
        specification(LAYOUT, good, 1025, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("conv1/weights", np.nan), ("conv1/BatchNorm/moving_variance", -1.0)], ids=["nan", "variance"]
)
def test_values_that_no_network_has_are_refused(tmp_path: Path, name: str, value: float) -> None:
    spec = specification(LAYOUT, shapes(), 40, tmp_path)
    values = {key: np.zeros(shape, np.float32) for key, shape in shapes().items()}
    values[f"{SCOPE}/{name}"].flat[0] = value
    with pytest.raises(ModelError, match=name):
        network_state(values, spec, SCOPE, tmp_path)


def test_a_datum_is_read_as_it_was_written(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    np.testing.assert_array_equal(read_datum(write_datum(tmp_path / "a.datum", array)), array)


def test_a_datum_of_the_release_is_read(shared: Path) -> None:
    folder = shared / "reference" / "delf_v1_20171026" / "pca"
    if not folder.is_dir():
        pytest.skip("needs the official PCA (reference/delf_v1_20171026)")
    variances = read_datum(folder / "pca_variances.datum")
    assert variances.shape == (1, 1024)
    # Variances of unit vectors around their mean: they fall, and what they add up to is what the mean leaves of one.
    assert (np.diff(variances[0]) <= 0).all()
    mean = read_datum(folder / "mean.datum")
    assert abs(variances.sum() + (mean**2).sum() - 1) < 0.01


# The shape says 2 x 2, and one value follows.
SHORT = b"\x0a\x04\x0a\x02\x02\x02\x12\x06\x0a\x04\x00\x00\x80\x3f"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 50, SHORT, SHORT.replace(b"\x02\x02\x02", b"\x02\x00\x00"), SHORT[:-2]],
    ids=["empty", "noise", "short", "no sides", "cut"],
)
def test_a_file_that_is_no_datum_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.datum"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="download the release again") as caught:
        read_datum(path)
    assert "\n" not in str(caught.value)


def test_a_datum_with_values_that_are_not_finite_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="finite"):
        read_datum(write_datum(tmp_path / "a.datum", [[1.0, np.inf]]))
    with pytest.raises(ModelError, match="no readable file"):
        read_datum(tmp_path / "none.datum")
    large = tmp_path / "large.datum"
    with large.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(ModelError, match="64 MiB"):
        read_datum(large)


def plain_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow's legacy bilinear resize, pixel by pixel."""
    rows, columns = pixels.shape[:2]
    out = np.zeros((height, width, pixels.shape[2]), np.float64)
    for i in range(height):
        for j in range(width):
            y, x = i * rows / height, j * columns / width
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = pixels[top, left] + (pixels[top, right] - pixels[top, left]) * (x - left)
            lower = pixels[bottom, left] + (pixels[bottom, right] - pixels[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize("size", [(7, 5), (9, 14), (18, 22), (9, 11), (1, 1), (40, 3)])
def test_the_resize_equals_its_plain_twin(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.float32)
    resized = resize_tf_bilinear(torch.from_numpy(pixels), *size).numpy()
    np.testing.assert_allclose(resized, plain_resize(pixels, *size), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(37, 50), (75, 101), (53, 71), (150, 201), (106, 142)])
def test_the_resize_equals_tensorflows(tensorflow: Any, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (75, 101, 3)).astype(np.float32)
    expected = tensorflow.compat.v1.image.resize_bilinear(pixels[None], size).numpy()[0]
    np.testing.assert_allclose(resize_tf_bilinear(torch.from_numpy(pixels), *size).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("sides", "scale", "size"),
    [
        ((100, 101), 0.5, (50, 50)),
        ((103, 5000), 0.5, (52, 2500)),
        ((5, 5), 0.1, (0, 0)),
        ((684, 1000), 0.3536, (242, 354)),
    ],
)
def test_halves_of_a_level_go_to_the_even_size(sides: tuple[int, int], scale: float, size: tuple[int, int]) -> None:
    assert tf_size(sides, scale) == size


def test_a_small_photo_keeps_its_levels_as_in_the_official_graph(tmp_path: Path) -> None:
    model = write_imported(tmp_path, dim=8)
    photo = np.random.default_rng(0).integers(0, 256, (8, 70, 3), np.uint8)
    features = extract(model, Query(photo, (0.05, 0.1, 1.0), 0.0, 100))
    # 1 x 7 pixels and 8 x 70, both less than a cell high; nothing is left at the first scale.
    assert sorted(zip(features.scales.round(3).tolist(), features.locations.tolist(), strict=True)) == [
        (1.0, [0.0, 0.0]),
        (1.0, [32.0, 0.0]),
        (1.0, [64.0, 0.0]),
        (10.0, [0.0, 0.0]),
    ]
