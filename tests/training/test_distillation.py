"""Distillation on generated photos and a tiny network: what is pruned is consistent, and the small network learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_photo, save_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from delf_milvus.cli.main import app
from delf_milvus.errors import InputError, ModelError, UsageError
from delf_milvus.model import weights
from delf_milvus.model.delf import Delf
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.runtime import prepare
from delf_milvus.model.spec import ModelSpec, TrunkSpec
from delf_milvus.settings import ExtractSettings
from delf_milvus.training.pruning import Shape, pruned, sources

pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")

from delf_milvus.training.distillation import DistillationConfig, distill, pieces

LARGE = ModelSpec(
    trunk=TrunkSpec(layout="v2", units=(2, 2, 4), widths=(8, 8, 16)), dim=8, attention_channels=16, global_dim=4
)
SAME = Shape(units=(2, 2, 4), widths=(8, 8, 16), outputs=(32, 32, 64), hidden=16)
SMALL = Shape(units=(1, 2, 3), widths=(4, 4, 8), outputs=(16, 32, 64), hidden=4)


def large_network(spec: ModelSpec = LARGE) -> Delf:
    """With statistics and scales that differ from channel to channel, as a trained one's do."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Delf(spec).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif "projection" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network


def write(path: Path, network: Delf) -> Path:
    weights.save(path, dict(network.state_dict()), network.spec)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for seed in range(24):
        folder = root / "kept" if seed < 20 else root / "left"
        save_photo(folder / f"{seed}.png", make_photo(seed, 96, 80))
    return root


def config(data: Path, out: Path, init: Path, **changes: object) -> DistillationConfig:
    plain = DistillationConfig(
        data=(data,),
        out=out,
        init=init,
        units=SMALL.units,
        widths=SMALL.widths,
        outputs=SMALL.outputs,
        hidden=SMALL.hidden,
        epochs=8,
        piecewise=4,
        batch=4,
        load=64,
        crop=64,
        learning_rate=0.01,
        validate_every=5,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_network_pruned_to_its_own_size_is_itself() -> None:
    network = large_network()
    copy = pruned(network, SAME)
    assert copy.spec.trunk.stage_channels == network.spec.trunk.stage_channels
    pixels = torch.rand(1, 3, 70, 90) * 255
    with torch.inference_mode():
        for own, theirs in zip(copy(pixels), network(pixels), strict=True):
            torch.testing.assert_close(own, theirs)


def test_channels_that_weigh_nothing_are_pruned_without_a_trace() -> None:
    network = large_network()
    with torch.no_grad():
        for stage in network.trunk.stages:
            for unit in stage.children():
                unit.conv2.weight[:, 1::2] = 0
                unit.conv3.weight[:, ::2] = 0
        network.attention.conv2.weight[:, 3:] = 0
    small = pruned(network, replace(SAME, widths=(4, 4, 8), hidden=4))
    pixels = torch.rand(1, 3, 70, 90) * 255
    with torch.inference_mode():
        for own, theirs in zip(small(pixels), network(pixels), strict=True):
            torch.testing.assert_close(own, theirs)


def test_a_narrower_network_folds_for_inference() -> None:
    small = pruned(large_network(), SMALL)
    pixels = torch.rand(1, 3, 70, 90) * 255
    with torch.inference_mode():
        quick = prepare(small, torch.device("cpu"), torch.float32)(pixels, "attention")
        for own, plain in zip(quick, small(pixels), strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": (3, 2, 4)}, "between 1 and the 2"),
        ({"widths": (8, 8, 17)}, "between 1 and the 16"),
        ({"hidden": 0}, "between 1 and the 16"),
        ({"outputs": (32, 32, 32)}, "keeps its 64 channels"),
        ({"units": (2, 2)}, "3 stages, not 2"),
    ],
)
def test_a_shape_that_is_not_smaller_is_refused(
    changes: dict[str, object], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pruned(large_network(), replace(SAME, **changes))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="does not fit"):
        distill(config(data, tmp_path / "run", write(tmp_path / "large.safetensors", large_network()), **changes))


@given(st.integers(1, 12), st.integers(0, 12))
def test_every_unit_stands_for_the_next_ones_of_the_larger_stage(ours: int, more: int) -> None:
    ranges = sources(ours, ours + more)
    assert [i for stands_for in ranges for i in stands_for] == list(range(ours + more))
    assert all(ranges)


@settings(max_examples=50)
@given(
    st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(0, 2)] * 3), st.tuples(st.booleans(), st.booleans())
)
def test_pieces_take_every_unit_once_and_chain_through_the_larger_network(
    ours: tuple[int, ...], more: tuple[int, ...], narrow: tuple[bool, bool]
) -> None:
    from delf_milvus.model.trunk import Trunk

    theirs = tuple(a + b for a, b in zip(ours, more, strict=True))
    large = Trunk(TrunkSpec(units=theirs, widths=(2, 2, 2)))
    outputs = (*(4 if one else 8 for one in narrow), 8)
    found = pieces(Trunk(TrunkSpec(units=ours, widths=(1, 1, 1), outputs=outputs)), large)
    assert [unit for piece in found for unit in piece.own] == list(range(sum(ours)))
    assert [piece.before for piece in found] == [0, *(piece.after for piece in found[:-1])]
    assert found[-1].after == sum(theirs)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    return distill(config(data, folder / "run", write(folder / "large.safetensors", large_network())), lambda _: None)


def test_the_small_network_learns_to_give_the_features_of_the_large_one(finished: Path) -> None:
    log = [json.loads(line) for line in (finished.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, 9))
    assert log[3]["loss"] < log[0]["loss"]
    assert log[7]["loss"] < log[4]["loss"]
    assert log[7]["cosine"] > 0.5
    assert f"cosine {log[7]['cosine']}" in (finished.parent / "MODEL_CARD.md").read_text()
    photo = make_photo(1, 200, 160)
    large = Extractor(finished.parents[1] / "large.safetensors", ExtractSettings()).extract(photo, 50)
    small = Extractor(finished, ExtractSettings()).extract(photo, 50)
    assert small.descriptors.shape[1] == large.descriptors.shape[1]
    assert len(small.global_descriptor) == len(large.global_descriptor) == 4
    assert np.dot(small.global_descriptor, large.global_descriptor) > 0.5


def test_a_resumed_run_ends_where_an_unbroken_one_does(data: Path, tmp_path: Path) -> None:
    large = write(tmp_path / "large.safetensors", large_network())
    said: list[str] = []
    stopped = config(data, tmp_path / "run", large, epochs=2, piecewise=2)
    distill(stopped, said.append)
    distill(replace(stopped, epochs=3), said.append)
    assert "resuming after epoch 2" in said
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]


def test_excluded_folders_are_not_learnt_from(data: Path, tmp_path: Path) -> None:
    large = write(tmp_path / "large.safetensors", large_network())
    said: list[str] = []
    distill(config(data, tmp_path / "run", large, exclude=("left",), epochs=1, piecewise=1), said.append)
    assert said[0] == "16 photos to learn from, 4 to validate"


def test_what_cannot_be_distilled_is_one_sentence(data: Path, tmp_path: Path) -> None:
    large = write(tmp_path / "large.safetensors", large_network())
    with pytest.raises(InputError, match="fewer than one batch"):
        distill(config(data, tmp_path / "run", large, batch=64))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photos in"):
        distill(config(tmp_path / "empty", tmp_path / "other", large))
    headless = write(tmp_path / "headless.safetensors", Delf(replace(LARGE, selection="norm", attention_channels=0)))
    with pytest.raises(ModelError, match="attention"):
        distill(config(data, tmp_path / "third", headless))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--units", "2,x,5"], "--units takes whole numbers"),
        (["--epochs", "2", "--piecewise", "3"], "--piecewise 3 is more than --epochs 2"),
        (["--init", "nowhere.safetensors"], "There is no model file"),
    ],
)
def test_options_that_mean_nothing_are_one_sentence(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        app, ["train", "distill", "--data", str(data), "--out", str(tmp_path / "run"), *arguments]
    )
    assert done.exit_code != 0
    assert message in str(done.exception)
    assert not (tmp_path / "run").exists()
