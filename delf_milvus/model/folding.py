"""The trunk rewritten for inference: the same function to the rounding of its arithmetic, in fewer passes over memory.

Layers between the convolutions cost a fifth of the time, all of it spent on moving maps through memory. So
  - a BatchNorm behind a convolution becomes part of its weights;
  - a BatchNorm and ReLU in front of 1x1 convolutions (pre-activation) become, in fp32, one bound for each channel, and
    the rest of the BatchNorm part of their weights, with s = scale and b = shift:
        relu(s x + b) = s max(x, -b / s) + b   where s > 0,
        relu(s x + b) = s min(x, -b / s) + b   where s < 0,
        relu(s x + b) = relu(b)                where s = 0;
  - the last 1x1 convolution of a pre-activation unit is a matrix product that adds to the shortcut in place;
  - pixels are normalised by one subtraction, whose factor is part of the first convolution;
  - ReLU follows the pooling of the stem, on a quarter of the cells: it commutes with a maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from delf_milvus.model.trunk import Bottleneck, PreactivationBottleneck, Trunk


def fold_behind(parent: nn.Module, convolution: str, batchnorm: str) -> None:
    """Make a BatchNorm part of the convolution in front of it, where the parent has both."""
    conv, norm = getattr(parent, convolution), getattr(parent, batchnorm)
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        setattr(parent, convolution, fuse_conv_bn_eval(conv, norm))
        setattr(parent, batchnorm, nn.Identity())


def fold_bottleneck(unit: Bottleneck) -> None:
    """Make every BatchNorm of a post-activation unit part of the convolution in front of it."""
    for index in ("1", "2", "3"):
        fold_behind(unit, "conv" + index, "bn" + index)
    if unit.downsample is not None:
        fold_behind(unit.downsample, "0", "1")


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What an evaluated BatchNorm computes for each channel: (scale, shift), each (C,) fp64."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


class Bound(nn.Module):
    """BatchNorm and ReLU without the BatchNorm: max(x, -b / s), or min, for each channel, in fp32.

    scale, shift: (C,) fp64, what is left for the convolutions behind: relu(BatchNorm(x)) = scale * bound(x) + shift.
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = _scale_and_shift(norm)
        bound = (-shift / scale).float()
        constant = ~bound.isfinite()
        lower = torch.where(scale > 0, bound, -torch.inf).masked_fill(constant, 0)
        upper = torch.where(scale < 0, bound, torch.inf).masked_fill(constant, 0)
        self.register_buffer("lower", lower.view(1, -1, 1, 1))
        self.register_buffer("upper", upper.view(1, -1, 1, 1))
        self.bounded_above = bool((upper < torch.inf).any())
        self.scale = scale.masked_fill(constant, 0)
        self.shift = torch.where(constant, shift.clamp_min(0), shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lower, self.upper) if self.bounded_above else torch.maximum(x, self.lower)


class InferenceUnit(nn.Module):
    """A `PreactivationBottleneck` for inference in `dtype`, channels last.

    Takes (N, C, h, w) in `dtype`, and changes it: the result may lie in the same memory.
    """

    expansion: Tensor

    def __init__(self, unit: PreactivationBottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1, self.downsample = fuse_conv_bn_eval(unit.conv1, unit.bn2), unit.downsample
        self.bound: Bound | None = None
        self.norm: nn.BatchNorm2d | None = None
        if dtype == torch.float32:
            self.bound = Bound(unit.bn1)
            self.conv1 = _behind(self.bound, self.conv1)
            self.downsample = None if self.downsample is None else _behind(self.bound, self.downsample)
        else:
            # A bound is not near zero, where a dtype of few bits is dense: it would cost a quarter more error.
            self.norm = unit.bn1
        self.conv1 = self.conv1.to(dtype)
        self.downsample = None if self.downsample is None else self.downsample.to(dtype)
        self.conv2 = fuse_conv_bn_eval(unit.conv2, unit.bn3).to(dtype)
        self.register_buffer("expansion", unit.conv3.weight[:, :, 0, 0].T.to(dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        if self.bound is not None:
            activated = self.bound(x)
        else:
            assert self.norm is not None
            activated = torch.relu_(self.norm(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        y = torch.relu_(self.conv2(torch.relu_(self.conv1(activated))))
        total = _rows(shortcut).addmm_(_rows(y), self.expansion)
        count, channels, height, width = shortcut.shape
        return total.view(count, height, width, channels).permute(0, 3, 1, 2)


def _rows(maps: Tensor) -> Tensor:
    """(N, C, h, w) as (N h w, C), without a copy where the maps are channels last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _behind(bound: Bound, convolution: nn.Conv2d) -> nn.Conv2d:
    """The 1x1 convolution of relu(BatchNorm(x)), as one of bound(x); fp32."""
    weight = convolution.weight.double()[:, :, 0, 0]
    bias = weight @ bound.shift
    if convolution.bias is not None:
        bias = bias + convolution.bias.double()
    folded = nn.Conv2d(convolution.in_channels, convolution.out_channels, 1, convolution.stride)  # type: ignore[arg-type] # a pair
    folded.weight = nn.Parameter((weight * bound.scale)[:, :, None, None].float())
    folded.bias = nn.Parameter(bias.float())
    return folded


class InferenceTrunk(Trunk):
    """A `Trunk` for inference with convolutions in `dtype`; the given one must be a copy, for parts of it are used.

    `forward` takes pixels of any dtype, uint8 too, and returns what `Trunk.forward` does; the maps are in `dtype`.
    """

    centre: Tensor

    def __init__(self, trunk: Trunk, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.spec = trunk.spec
        fold_behind(trunk, "conv1", "bn1")
        scale, shift = 1 / trunk.std.double().flatten(), -(trunk.mean / trunk.std).double().flatten()
        if isinstance(trunk.input_bn, nn.BatchNorm2d):
            own_scale, own_shift = _scale_and_shift(trunk.input_bn)
            scale, shift = scale * own_scale, shift * own_scale + own_shift
        self.register_buffer("centre", (-shift / scale).float().view(1, 3, 1, 1))
        self.conv1 = trunk.conv1
        self.conv1.weight = nn.Parameter((self.conv1.weight.double() * scale.view(1, 3, 1, 1)).to(dtype))
        self.conv1.to(dtype)
        self.pool = trunk.pool
        for unit in trunk.modules():
            if isinstance(unit, Bottleneck):
                fold_bottleneck(unit)
        self.stages = nn.Sequential(
            *(
                InferenceUnit(unit, dtype) if isinstance(unit, PreactivationBottleneck) else unit.to(dtype)
                for stage in trunk.stages
                for unit in stage.children()
            )
        )
        self.final_bn = trunk.final_bn

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # Centred in fp32: bf16 could not hold 255 levels around a mean.
        x = torch.sub(pixels, self.centre).to(self.conv1.weight.dtype)
        raw = self.stages(torch.relu_(self.pool(self.conv1(x))))
        return raw, raw if self.final_bn is None else torch.relu_(self.final_bn(raw))
