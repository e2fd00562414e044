"""ResNet-50 up to the stride-16 block, in the layouts that published DELF weights come in.

One small specification says in what the layouts differ; the network below is written once.

Invariants:
  - input is RGB in [0, 255], NCHW, any floating dtype; normalisation is part of the trunk;
  - output is the raw residual sum of the last stage and the map that descriptors are read from
    (for the pre-activation layout: after its closing BatchNorm and ReLU; otherwise the same map);
  - every convolution pads by (kernel - 1) / 2 on both sides, so map cell (r, c) is centred on input
    pixel (stride * r, stride * c) exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from delf_milvus.model.spec import TrunkSpec


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (stride), 1x1, each followed by BatchNorm; ReLU after the sum (layouts v1 and v1.5)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, epsilon: float) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width, epsilon)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width, epsilon)
        self.conv3 = _convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs, epsilon)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if inputs != outputs:
            self.downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs, epsilon))

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            shortcut = self.downsample(x)
        else:
            shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(self.conv2(x)))
        return torch.relu_(self.bn3(self.conv3(x)).add_(shortcut))


class PreactivationBottleneck(nn.Module):
    """BatchNorm and ReLU before each of 1x1, 3x3 (stride), 1x1; the shortcut takes the activated input (v2)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, epsilon: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, epsilon)
        self.conv1 = _convolution(inputs, width, 1)
        self.bn2 = nn.BatchNorm2d(width, epsilon)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn3 = nn.BatchNorm2d(width, epsilon)
        self.conv3 = _convolution(width, outputs, 1)
        self.downsample: nn.Conv2d | None = None
        if inputs != outputs or stride > 1:
            self.downsample = _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu_(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        y = torch.relu_(self.bn2(self.conv1(activated)))
        y = torch.relu_(self.bn3(self.conv2(y)))
        total: Tensor = self.conv3(y).add_(shortcut)
        return total


class Trunk(nn.Module):
    """ResNet stem and stages by a `TrunkSpec`.

    `forward` takes RGB in [0, 255], (N, 3, H, W), and returns (raw, features), each
    (N, spec.channels, ceil(H / stride), ceil(W / stride)): the residual sum of the last stage, and the
    activated map that descriptors are read from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: TrunkSpec) -> None:
        super().__init__()
        self.spec = spec
        preactivation = spec.layout == "v2"
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.input_bn = nn.BatchNorm2d(3, spec.epsilon, affine=False) if preactivation else nn.Identity()
        self.conv1 = _convolution(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64, spec.epsilon)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        stages = []
        inputs = 64
        unit_type = PreactivationBottleneck if preactivation else Bottleneck
        for units, width, outputs, stride in zip(
            spec.units, spec.widths, spec.stage_channels, spec.strides, strict=True
        ):
            strided = units - 1 if spec.layout == "v1" else 0
            stage = []
            for unit in range(units):
                stage.append(unit_type(inputs, width, outputs, stride if unit == strided else 1, spec.epsilon))
                inputs = outputs
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.final_bn = nn.BatchNorm2d(inputs, spec.epsilon) if preactivation else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # Normalised in the dtype of the pixels: bf16 could not hold 255 levels around a mean.
        x = self.input_bn((pixels - self.mean) / self.std).to(self.conv1.weight.dtype)
        x = self.pool(torch.relu_(self.bn1(self.conv1(x))))
        raw = self.stages(x)
        if self.final_bn is None:
            return raw, raw
        # Not in place: OpenVINO's converter would have it change `raw`.
        return raw, torch.relu(self.final_bn(raw))
