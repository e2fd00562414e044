"""The trunk computes what the published layouts compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from delf_milvus.model import weights
from delf_milvus.model.spec import IMAGENET_MEAN, IMAGENET_STD, TrunkSpec
from delf_milvus.model.trunk import Trunk

torchvision = pytest.importorskip("delf_milvus.training.vision", reason="needs torchvision (extra: train)")


def pixels(seed: int = 0, height: int = 97, width: int = 130) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, height, width, generator=generator) * 255


@torch.inference_mode()
def test_v1_5_equals_torchvisions_resnet50_up_to_layer3() -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    reference = resnet50(weights=None).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    trunk = Trunk(TrunkSpec(layout="v1.5")).eval()
    names = {"conv1": "conv1", "bn1": "bn1", "layer1": "stages.0", "layer2": "stages.1", "layer3": "stages.2"}
    state = {}
    for name, value in reference.state_dict().items():
        first, rest = name.split(".", 1)
        if first in names:
            state[f"{names[first]}.{rest}"] = value
    trunk.load_state_dict(state)
    x = pixels()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    y = (x / 255 - mean) / std
    y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(y))))
    expected = reference.layer3(reference.layer2(reference.layer1(y)))
    raw, features = trunk(x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert raw is features


@torch.inference_mode()
def test_v2_equals_the_published_layers_applied_one_by_one(shared: Path) -> None:
    path = shared / "weights" / "imagenet_resnet50v2_to_block3.npz"
    archive = {k: torch.from_numpy(v) for k, v in np.load(path, allow_pickle=False).items()}

    def normalise(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = archive[f"{name}_running_mean"], archive[f"{name}_running_var"]
        return functional.batch_norm(x, mean, var, archive[f"{name}_gamma"], archive[f"{name}_beta"], eps=1e-5)

    x = pixels()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    y = normalise((x / 255 - mean) / std, "batchnorm0")
    y = functional.conv2d(y, archive["conv0_weight"], stride=2, padding=3)
    y = functional.max_pool2d(functional.relu(normalise(y, "batchnorm1")), 3, 2, 1)
    for stage, units in ((1, 3), (2, 4), (3, 6)):
        batchnorm = convolution = 0
        for unit in range(units):
            stride = 2 if unit == 0 and stage > 1 else 1
            activated = functional.relu(normalise(y, f"stage{stage}_batchnorm{batchnorm}"))
            z = functional.conv2d(activated, archive[f"stage{stage}_conv{convolution}_weight"])
            z = functional.relu(normalise(z, f"stage{stage}_batchnorm{batchnorm + 1}"))
            z = functional.conv2d(z, archive[f"stage{stage}_conv{convolution + 1}_weight"], stride=stride, padding=1)
            z = functional.relu(normalise(z, f"stage{stage}_batchnorm{batchnorm + 2}"))
            z = functional.conv2d(z, archive[f"stage{stage}_conv{convolution + 2}_weight"])
            batchnorm, convolution = batchnorm + 3, convolution + 3
            if unit == 0:
                y = functional.conv2d(activated, archive[f"stage{stage}_conv{convolution}_weight"], stride=stride)
                convolution += 1
            y = y + z
    raw, features = weights.initial_trunk(path).eval()(x)
    torch.testing.assert_close(raw, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features, functional.relu(normalise(y, "stage4_batchnorm0")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["v1", "v1.5", "v2"])
@torch.inference_mode()
def test_a_cell_is_centred_on_its_multiple_of_the_stride(layout: str) -> None:
    torch.manual_seed(1)
    spec = TrunkSpec(layout=layout, units=(1, 1, 1), widths=(8, 8, 8))  # type: ignore[arg-type]
    trunk = Trunk(spec).eval()
    assert spec.stride == 16
    x = pixels(height=160, width=160)
    before = trunk(x)[1]
    assert before.shape == (1, spec.channels, 10, 10)
    # Changing pixels symmetrically around one cell's centre changes the map symmetrically around that cell.
    changed = x.clone()
    changed[:, :, 80 - 3 : 80 + 4, 80 - 3 : 80 + 4] = 255
    touched = ((trunk(changed)[1] - before).abs().sum(1)[0] > 1e-5).nonzero()
    assert len(touched)
    centre = (touched.min(0).values + touched.max(0).values) / 2
    assert centre.tolist() == [5.0, 5.0]


def test_v1_strides_in_the_last_unit_and_subsamples_its_shortcut() -> None:
    trunk = Trunk(TrunkSpec(layout="v1", units=(2, 2, 2), widths=(4, 4, 4))).eval()
    strides = [[unit.conv2.stride[0] for unit in stage] for stage in trunk.stages]
    assert strides == [[1, 1], [1, 2], [1, 2]]
    assert trunk.stages[1][1].downsample is None
    assert trunk(pixels(height=64, width=64))[1].shape[2:] == (4, 4)
