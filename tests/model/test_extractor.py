"""From photo to features: keypoint places, selection, boxes, small photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import make_photo
from models import TINY, tiny_network, write_tiny_model

from delf_milvus.errors import ModelError, UsageError
from delf_milvus.model import weights
from delf_milvus.model.extractor import Extractor
from delf_milvus.settings import ExtractSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def extractor(model: Path, **settings: object) -> Extractor:
    return Extractor(model, ExtractSettings(precision="fp32", **settings))  # type: ignore[arg-type]


def test_keypoints_lie_on_multiples_of_the_stride_divided_by_the_scale(model: Path) -> None:
    features = extractor(model, scales=(0.5, 1.0)).extract(make_photo(0), 4096)
    assert set(np.unique(features.scales)) == {1.0, 2.0}
    for scale in (1.0, 2.0):
        cells = features.locations[features.scales == scale] / (16 * scale)
        np.testing.assert_allclose(cells, np.round(cells), atol=1e-4)
        # Every cell of the level is there once: 320 x 240 gives 20 x 15, half of it 10 x 8.
        assert len(np.unique(cells, axis=0)) == len(cells) == {1.0: 300, 2.0: 80}[scale]


def test_a_large_photo_is_shrunk_and_its_keypoints_stay_in_its_own_pixels(model: Path) -> None:
    photo = make_photo(1, 400, 200)
    features = extractor(model, scales=(1.0,), longest_side=200).extract(photo, 4096)
    assert (features.width, features.height) == (400, 200)
    assert np.unique(features.scales).tolist() == [2.0]
    assert features.locations.max(0).tolist() == [384.0, 192.0]


def test_selection_keeps_the_highest_scores_of_all_scales(model: Path) -> None:
    everything = extractor(model).extract(make_photo(2), 4096)
    few = extractor(model).extract(make_photo(2), 50)
    assert len(few) == 50
    np.testing.assert_array_equal(few.attention, everything.attention[:50])
    np.testing.assert_array_equal(few.locations, everything.locations[:50])


def test_cells_below_the_least_attention_are_no_features(model: Path) -> None:
    everything = extractor(model).extract(make_photo(2), 4096)
    bar = float(everything.attention[30])
    above = extractor(model, min_attention=bar).extract(make_photo(2), 4096)
    np.testing.assert_array_equal(above.attention, everything.attention[everything.attention >= bar])
    np.testing.assert_array_equal(above.locations, everything.locations[: len(above)])
    assert 31 <= len(above) < len(everything)
    none = extractor(model, min_attention=1e9).extract(make_photo(2), 4096)
    assert (len(none), none.dim) == (0, 16)


def test_photos_of_one_shape_have_together_the_features_that_each_has_alone(model: Path) -> None:
    several = extractor(model, scales=(0.5, 1.0, 1.4142))
    photos = [make_photo(seed, 160, 120) for seed in range(5)]
    for photo, features in zip(photos, several.extract_many(photos, 60), strict=True):
        alone = several.extract(photo, 60)
        np.testing.assert_allclose(features.attention, alone.attention, rtol=1e-4)
        np.testing.assert_array_equal(features.locations, alone.locations)
        np.testing.assert_array_equal(features.scales, alone.scales)
        np.testing.assert_allclose(features.descriptors, alone.descriptors, atol=1e-4)
        np.testing.assert_allclose(features.global_descriptor, alone.global_descriptor, atol=1e-4)
        assert (features.width, features.height) == (160, 120)


def test_photos_together_lose_each_its_own_cells_below_the_least_attention(model: Path) -> None:
    photos = [make_photo(seed, 160, 120) for seed in range(4)]
    everything = extractor(model).extract_many(photos, 4096)
    bar = float(np.median([features.attention[20] for features in everything]))
    above = extractor(model, min_attention=bar).extract_many(photos, 4096)
    counts = [len(features) for features in above]
    assert counts == [int((features.attention >= bar).sum()) for features in everything]
    assert len(set(counts)) > 1


def test_photos_too_small_for_a_cell_have_together_no_features(model: Path) -> None:
    several = extractor(model, scales=(1.0,))
    none = several.extract_many([make_photo(0, 64, 10), make_photo(1, 64, 10)], 10)
    assert [(len(features), features.width, features.height) for features in none] == [(0, 64, 10)] * 2


def test_on_a_cpu_photos_are_extracted_one_by_one(model: Path) -> None:
    assert extractor(model, device="cpu").together((480, 640)) == 1


def test_features_equal_a_plain_pass_over_one_level(model: Path) -> None:
    photo = make_photo(3, 96, 64)
    features = extractor(model, scales=(1.0,)).extract(photo, 4096)
    network = tiny_network()
    with torch.inference_mode():
        cells, scores = network(torch.from_numpy(photo.transpose(2, 0, 1).copy())[None].float())
        flat = cells[0].reshape(cells.shape[1], -1).T
        descriptors = network.reduction(flat).numpy()
    order = np.argsort(-scores.reshape(-1).numpy(), kind="stable")
    np.testing.assert_allclose(features.attention, scores.reshape(-1).numpy()[order], rtol=1e-3, atol=1e-5)
    agreement = (features.descriptors * descriptors[order]).sum(1)
    assert np.quantile(agreement, 0.1) > 0.999


def test_the_global_descriptor_is_the_reduced_mean_of_all_levels(model: Path) -> None:
    photo = make_photo(3, 96, 64)
    features = extractor(model, scales=(1.0, 2.0)).extract(photo, 10)
    network = tiny_network()
    assert network.global_reduction is not None
    means = []
    for scale in (1, 2):
        pixels = cv2.resize(photo, (96 * scale, 64 * scale), interpolation=cv2.INTER_LINEAR)
        with torch.inference_mode():
            cells, _ = network(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float())
        mean = (np.maximum(cells[0].numpy().astype(np.float64), 1e-6) ** 3).mean(axis=(1, 2)) ** (1 / 3)
        means.append(mean / np.linalg.norm(mean))
    whole = torch.from_numpy(sum(means)).float()[None]
    np.testing.assert_allclose(features.global_descriptor, network.global_reduction(whole)[0].numpy(), atol=2e-3)
    assert features.top(3).global_descriptor is features.global_descriptor


def test_a_model_without_a_global_reduction_gives_none(tmp_path: Path) -> None:
    spec = replace(TINY, global_dim=0)
    weights.save(tmp_path / "m.safetensors", dict(tiny_network(spec=spec).state_dict()), spec)
    made = extractor(tmp_path / "m.safetensors")
    assert made.fingerprint.global_dim == 0
    assert made.extract(make_photo(3), 10).global_descriptor.shape == (0,)


def test_the_same_photo_gives_the_same_bytes(model: Path) -> None:
    one, two = (extractor(model).extract(make_photo(4), 200) for _ in range(2))
    for name in ("locations", "scales", "attention", "descriptors", "global_descriptor"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


def test_a_box_gives_features_of_that_part_in_pixels_of_the_whole(model: Path) -> None:
    photo = make_photo(5)
    box = (100.0, 50.0, 260.0, 210.0)
    features = extractor(model).extract(photo, 200, box)
    assert (features.width, features.height) == (320, 240)
    assert (features.locations >= (100, 50)).all()
    assert (features.locations <= (260 + 16, 210 + 16)).all()
    cut = extractor(model).extract(photo[50:210, 100:260], 200)
    np.testing.assert_array_equal(features.locations, cut.locations + np.float32([100, 50]))
    np.testing.assert_array_equal(features.descriptors, cut.descriptors)


@pytest.mark.parametrize("box", [(10, 10, 10, 40), (400, 0, 500, 100), (50, 50, 20, 80), (float("nan"), 0, 5, 5)])
def test_a_box_that_leaves_nothing_is_refused(model: Path, box: tuple[float, float, float, float]) -> None:
    with pytest.raises(UsageError, match="box"):
        extractor(model).extract(make_photo(5), 100, box)


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (15, 15)])
def test_a_photo_smaller_than_a_cell_has_no_features(model: Path, size: tuple[int, int]) -> None:
    features = extractor(model, scales=(1.0,)).extract(np.zeros((*size, 3), np.uint8), 100)
    assert len(features) == 0
    assert features.dim == 16


def test_asking_for_attention_of_a_model_without_it_says_what_to_do(tmp_path: Path) -> None:
    from dataclasses import replace

    from models import TINY

    from delf_milvus.model import weights

    spec = replace(TINY, selection="norm", attention_channels=0)
    path = tmp_path / "norm.safetensors"
    weights.save(path, dict(tiny_network(spec=spec).state_dict()), spec)
    assert Extractor(path, ExtractSettings()).fingerprint.selection == "norm"
    with pytest.raises(ModelError, match="no attention head"):
        Extractor(path, ExtractSettings(selection="attention"))


def test_the_fingerprint_tells_models_and_pyramids_apart(model: Path, tmp_path: Path) -> None:
    one = extractor(model).fingerprint
    assert one == extractor(model).fingerprint
    assert one != extractor(write_tiny_model(tmp_path / "other.safetensors", seed=1)).fingerprint
    assert one != extractor(model, scales=(1.0,)).fingerprint
    assert one != extractor(model, selection="norm").fingerprint
    # How many features are kept changes none of them.
    assert one == extractor(model, stored_features=7).fingerprint
    assert one == extractor(model, min_attention=0.5).fingerprint


def test_the_attention_map_has_each_keypoints_score_at_its_place(model: Path) -> None:
    photo = make_photo(3)
    one = extractor(model, scales=(1.0,))
    features, attention = one.attended(photo, 4096)
    assert features.digest == one.extract(photo, 4096).digest
    assert attention.shape == photo.shape[:2]
    columns, rows = features.locations.astype(int).T
    np.testing.assert_allclose(attention[rows, columns], features.attention, rtol=1e-4)
    # Between two cells it lies between their scores.
    between = attention[0, :17]
    assert between.min() >= min(between[0], between[16]) - 1e-4
    assert between.max() <= max(between[0], between[16]) + 1e-4


def test_the_attention_map_is_the_highest_of_all_levels_at_a_bounded_size(model: Path) -> None:
    photo = make_photo(4, 1200, 300)
    one = extractor(model, scales=(0.5, 1.0), longest_side=1200)
    features, attention = one.attended(photo, 4096)
    assert attention.shape == (128, 512)
    half, _ = extractor(model, scales=(0.5,), longest_side=1200).attended(photo, 4096)
    assert attention.max() >= 0.9 * max(float(features.attention[0]), float(half.attention[0]))
    assert attention.max() <= float(features.attention[0]) * (1 + 1e-5)


def test_a_photo_smaller_than_a_cell_has_an_empty_attention_map(model: Path) -> None:
    features, attention = extractor(model).attended(np.zeros((5, 7, 3), np.uint8), 100)
    assert len(features) == 0
    np.testing.assert_array_equal(attention, np.zeros((5, 7), np.float32))


def test_weights_whose_features_are_not_finite_are_told_as_a_damaged_model(tmp_path: Path) -> None:
    state = dict(tiny_network().state_dict())
    state["attention.conv2.bias"] = torch.full_like(state["attention.conv2.bias"], 3e38)
    state["attention.conv2.weight"] = torch.full_like(state["attention.conv2.weight"], 3e38)
    path = tmp_path / "model.safetensors"
    weights.save(path, state, TINY)
    with pytest.raises(ModelError, match=r"attention must be finite.*it is damaged"):
        extractor(path, scales=(1.0,), selection="attention").extract(make_photo(0), 20)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (40, 30)])
def test_a_photo_of_any_shape_may_be_turned(shape: tuple[int, int], model: Path) -> None:
    photo = make_photo(0)[: shape[0], : shape[1]].copy()
    for turns in range(4):
        turned = np.rot90(photo, turns)
        features = extractor(model, scales=(1.0,)).extract(turned, 10)
        assert (features.height, features.width) == turned.shape[:2]
        np.testing.assert_array_equal(
            features.descriptors, extractor(model, scales=(1.0,)).extract(turned.copy(), 10).descriptors
        )
