"""Weight files: what is written is read, and what is not ours is refused."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, tiny_network, write_tiny_model
from safetensors.torch import save_file

from delf_milvus.errors import ModelError
from delf_milvus.model import weights
from delf_milvus.model.spec import resolve


def test_a_saved_network_loads_with_the_same_output(tmp_path: Path) -> None:
    network = tiny_network()
    path = write_tiny_model(tmp_path / "model.safetensors")
    pixels = torch.rand(1, 3, 64, 80) * 255
    with torch.inference_mode():
        for mine, loaded in zip(network(pixels), weights.load(path)(pixels), strict=True):
            torch.testing.assert_close(mine, loaded)


def test_half_precision_is_kept_to_matrices_so_that_small_variances_survive(tmp_path: Path) -> None:
    state = dict(tiny_network().state_dict())
    state["trunk.bn1.running_var"] = torch.full_like(state["trunk.bn1.running_var"], 1e-9)
    path = tmp_path / "half.safetensors"
    weights.save(path, state, TINY, half=True)
    loaded = weights.load(path).state_dict()
    torch.testing.assert_close(loaded["trunk.bn1.running_var"], state["trunk.bn1.running_var"])
    torch.testing.assert_close(loaded["trunk.conv1.weight"], state["trunk.conv1.weight"].half().float())


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        resolve(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04pickle", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a delf-milvus weight file"):
        weights.load(path)


def test_safetensors_of_other_software_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match="not a delf-milvus weight file"):
        weights.load(path)


def test_missing_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    state = dict(tiny_network().state_dict())
    path = tmp_path / "model.safetensors"
    weights.save(path, {k: v for k, v in state.items() if not k.startswith("attention.")}, TINY)
    with pytest.raises(ModelError, match="attention"):
        weights.load(path)
    weights.save(path, state, replace(TINY, dim=8))
    with pytest.raises(ModelError, match="another shape"):
        weights.load(path)


def test_an_initial_trunk_is_whole_or_refused(tmp_path: Path) -> None:
    state = dict(tiny_network().state_dict())
    path = tmp_path / "initial.safetensors"
    counted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    weights.save(path, counted, TINY)
    torch.testing.assert_close(weights.initial_trunk(path).conv1.weight, state["trunk.conv1.weight"])
    for kept in (
        {k: v for k, v in state.items() if not k.startswith("trunk.")},
        {k: v for k, v in state.items() if k != "trunk.stages.0.0.conv2.weight"},
    ):
        weights.save(path, kept, TINY)
        with pytest.raises(ModelError, match="does not hold the tensors"):
            weights.initial_trunk(path)
    weights.save(path, state | {"trunk.conv1.weight": torch.zeros(64, 3, 5, 5)}, TINY)
    with pytest.raises(ModelError, match="another shape"):
        weights.initial_trunk(path)


def test_a_header_without_notes_has_none(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.safetensors")
    spec, tensors, _ = weights.read(path)
    save_file(tensors, path, {weights.METADATA_KEY: json.dumps({"spec": asdict(spec)})})
    assert weights.read(path)[2] == {}
    assert weights.load(path).spec == TINY


def archive(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


RANDOM = archive(conv0_weight=np.random.default_rng(0).random(4096))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04rest", RANDOM[: len(RANDOM) // 2], damaged(RANDOM), npy(), archive(a=np.array(["x"]))],
    ids=["empty", "text", "zip header", "cut short", "damaged", "one array", "no numbers"],
)
def test_an_archive_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "initial.npz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable") as caught:
        weights.initial_trunk(path)
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


def test_an_archive_with_layers_of_another_shape_is_refused(tmp_path: Path) -> None:
    names = [f"batchnorm0_{kind}" for kind in ("running_mean", "running_var")] + ["conv0_weight"]
    batchnorms = ["batchnorm1", "stage4_batchnorm0"]
    for stage, units in ((1, 3), (2, 4), (3, 6)):
        batchnorms += [f"stage{stage}_batchnorm{n}" for n in range(3 * units)]
        names += [f"stage{stage}_conv{n}_weight" for n in range(3 * units + 1)]
    names += [f"{b}_{kind}" for b in batchnorms for kind in ("gamma", "beta", "running_mean", "running_var")]
    path = tmp_path / "initial.npz"
    np.savez(path, **{name: np.zeros(2, np.float32) for name in names})
    with pytest.raises(ModelError, match="another shape"):
        weights.initial_trunk(path)


def test_an_archive_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "initial.npz"
    np.savez(path, batchnorm0_running_mean=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ModelError, match="readable"):
        weights.initial_trunk(path)


def test_an_archive_without_the_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "initial.npz"
    np.savez(path, something=np.zeros(3))
    with pytest.raises(ModelError, match="lacks"):
        weights.initial_trunk(path)


def test_published_imagenet_weights_are_a_trunk_without_attention(shared: Path) -> None:
    path = shared / "weights/imagenet_resnet50v2_to_block3.npz"
    spec, tensors = weights.initial(path)
    assert (spec.selection, spec.attention_channels) == ("norm", 0)
    for name, tensor in weights.initial_trunk(path).state_dict().items():
        torch.testing.assert_close(tensors[f"trunk.{name}"], tensor)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 10**12},
        {"dim": "16"},
        {"dim": -1},
        {"dim": True},
        {"attention_channels": 10**9},
        {"global_dim": 1.5},
        {"selection": "all"},
        {"trunk": {"widths": [8, 8, 10**7]}},
        {"trunk": {"widths": [8, 8, 16, 16]}},
        {"trunk": {"units": "abc"}},
        {"trunk": {"units": [1, 1, 10**6]}},
        {"trunk": {"strides": [0, 0, 0]}},
        {"trunk": {"std": [0.0, 1.0, 1.0]}},
        {"trunk": {"mean": [float("nan")] * 3}},
        {"trunk": {"epsilon": -1}},
        {"trunk": {"layout": "v9"}},
        {"trunk": []},
    ],
)
def test_a_file_that_declares_an_impossible_network_is_refused_before_it_is_built(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    spec = json.loads(json.dumps(asdict(TINY)))
    trunk = changes.get("trunk", {})
    spec |= {**changes, "trunk": {**spec["trunk"], **trunk} if isinstance(trunk, dict) else trunk}
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"delf_milvus": json.dumps({"spec": spec, "notes": {}})})
    for read in (weights.load, weights.initial_trunk):
        with pytest.raises(ModelError, match="not a delf-milvus weight file"):
            read(path)


def test_a_network_without_its_tensors_takes_no_memory(tmp_path: Path) -> None:
    spec = replace(TINY, trunk=replace(TINY.trunk, units=(30, 30, 30), widths=(8192, 8192, 8192)))
    path = tmp_path / "model.safetensors"
    weights.save(path, {"a": torch.zeros(1)}, spec)
    for read in (weights.load, weights.initial_trunk):
        # Half a terabyte, if it were built.
        with pytest.raises(ModelError, match="does not hold the tensors"):
            read(path)


def test_a_header_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"delf_milvus": "[" * 100_000})
    with pytest.raises(ModelError, match="not a delf-milvus weight file"):
        weights.load(path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = dict(tiny_network().state_dict())
    state["reduction.mean"] = torch.full_like(state["reduction.mean"], float("nan"))
    path = tmp_path / "model.safetensors"
    weights.save(path, state, TINY)
    with pytest.raises(ModelError, match=r"reduction\.mean holds values that are not finite"):
        weights.load(path)
