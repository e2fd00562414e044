"""A smaller copy of a network to begin distillation with: fewer units, and the channels that weigh most.

A channel weighs what the BatchNorm behind it lets through times what the convolution after that makes of it (He et al.,
"Channel pruning for accelerating very deep neural networks", ICCV 2017, prune the same places by a costlier rule).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from delf_milvus.model.delf import AttentionHead, Delf
from delf_milvus.model.trunk import PreactivationBottleneck


@dataclass(frozen=True)
class Shape:
    """The size of the smaller network.

    units, widths, outputs: as in `TrunkSpec`; hidden: hidden channels of the attention head.
    """

    units: tuple[int, ...]
    widths: tuple[int, ...]
    outputs: tuple[int, ...]
    hidden: int


def sources(ours: int, theirs: int) -> list[range]:
    """For each of `ours` units, the units of the larger stage that it stands for, which may be none: those of the
    larger stage are spread evenly, and the first stands for the first."""
    bounds = [round(i * theirs / ours) for i in range(ours + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


@torch.no_grad()
def pruned(network: Delf, shape: Shape) -> Delf:
    """A network of the given shape with weights of `network`: one of the pre-activation layout with an attention head.

    Its reductions are the larger one's: the map that descriptors are read from keeps its channels. `network` is not
    changed. Raises ValueError for a shape that is not smaller.
    """
    spec = network.spec
    trunk = spec.trunk
    for given in (shape.units, shape.widths, shape.outputs):
        if len(given) != len(trunk.units):
            raise ValueError(f"there are {len(trunk.units)} stages, not {len(given)}")
    for fewer, most in (
        *zip(shape.units, trunk.units, strict=True),
        *zip(shape.widths, trunk.widths, strict=True),
        *zip(shape.outputs, trunk.stage_channels, strict=True),
        (shape.hidden, spec.attention_channels),
    ):
        if not 1 <= fewer <= most:
            raise ValueError(f"{fewer} is not between 1 and the {most} of the larger network")
    if shape.outputs[-1] != trunk.channels:
        raise ValueError(f"the last stage keeps its {trunk.channels} channels, not {shape.outputs[-1]}")
    smaller = replace(trunk, units=shape.units, widths=shape.widths, outputs=shape.outputs)
    small = Delf(replace(spec, trunk=smaller, attention_channels=shape.hidden)).eval()

    for name in ("input_bn", "conv1", "bn1", "final_bn"):
        getattr(small.trunk, name).load_state_dict(getattr(network.trunk, name).state_dict())
    inputs = torch.arange(small.trunk.conv1.out_channels)
    for number, (own, large) in enumerate(zip(small.trunk.stages, network.trunk.stages, strict=True)):
        assert isinstance(own, nn.Sequential)
        assert isinstance(large, nn.Sequential)
        following = network.trunk.stages[number + 1] if number + 1 < len(network.trunk.stages) else None
        outputs = _strongest(_stream_weight(large, following), shape.outputs[number])
        for unit, stands_for in zip(own, sources(len(own), len(large)), strict=True):
            source = large[stands_for[0]]
            assert isinstance(unit, PreactivationBottleneck)
            assert isinstance(source, PreactivationBottleneck)
            _fill_unit(unit, source, inputs, outputs)
            inputs = outputs
    assert small.attention is not None
    assert network.attention is not None
    _fill_head(small.attention, network.attention)
    for reduction, large_reduction in (
        (small.reduction, network.reduction),
        (small.global_reduction, network.global_reduction),
    ):
        if reduction is not None and large_reduction is not None:
            reduction.load_state_dict(large_reduction.state_dict())
    return small


def _stream_weight(stage: nn.Module, following: nn.Module | None) -> Tensor:
    """What each channel of a stage's output weighs in the stage behind, (C,); by its own size where there is none."""
    if following is None:
        sizes = [p.square().sum(dim=(1, 2, 3)) for name, p in stage.named_parameters() if name.endswith("conv3.weight")]
        return torch.stack(sizes).sum(dim=0)
    first = next(following.children())
    assert isinstance(first, PreactivationBottleneck)
    weight = first.conv1.weight.square().sum(dim=(0, 2, 3))
    if first.downsample is not None:
        weight = weight + first.downsample.weight.square().sum(dim=(0, 2, 3))
    return weight * first.bn1.weight.square()


def _strongest(weight: Tensor, count: int) -> Tensor:
    """The `count` channels of most weight, in their order."""
    return torch.sort(torch.topk(weight, count).indices).values


def _fill_unit(unit: PreactivationBottleneck, source: PreactivationBottleneck, inputs: Tensor, outputs: Tensor) -> None:
    """inputs, outputs: the channels of the larger network's streams that the smaller one's have."""
    first = _strongest(
        source.bn2.weight.square() * source.conv2.weight.square().sum(dim=(0, 2, 3)), unit.conv1.out_channels
    )
    second = _strongest(
        source.bn3.weight.square() * source.conv3.weight.square().sum(dim=(0, 2, 3)), unit.conv2.out_channels
    )
    for norm, large, kept in (
        (unit.bn1, source.bn1, inputs),
        (unit.bn2, source.bn2, first),
        (unit.bn3, source.bn3, second),
    ):
        for (_, own), (_, theirs) in zip(norm.state_dict().items(), large.state_dict().items(), strict=True):
            own.copy_(theirs[kept] if theirs.ndim else theirs)
    unit.conv1.weight.copy_(source.conv1.weight[first][:, inputs])
    unit.conv2.weight.copy_(source.conv2.weight[second][:, first])
    unit.conv3.weight.copy_(source.conv3.weight[outputs][:, second])
    if unit.downsample is not None and source.downsample is not None:
        unit.downsample.weight.copy_(source.downsample.weight[outputs][:, inputs])


def _fill_head(head: AttentionHead, source: AttentionHead) -> None:
    kept = _strongest(
        source.bn.weight.square() * source.conv2.weight.square().sum(dim=(0, 2, 3)), head.conv1.out_channels
    )
    head.conv1.weight.copy_(source.conv1.weight[kept])
    for (_, own), (_, theirs) in zip(head.bn.state_dict().items(), source.bn.state_dict().items(), strict=True):
        own.copy_(theirs[kept] if theirs.ndim else theirs)
    head.conv2.weight.copy_(source.conv2.weight[:, kept])
    assert head.conv2.bias is not None
    assert source.conv2.bias is not None
    head.conv2.bias.copy_(source.conv2.bias)
