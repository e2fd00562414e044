"""How the network runs: on which device, in which arithmetic, by which library.

`prepare` returns a network that computes the same function as the one it is given; the given one is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from delf_milvus.errors import UsageError
from delf_milvus.model.delf import Delf
from delf_milvus.model.folding import InferenceTrunk, fold_behind
from delf_milvus.model.spec import Selection
from delf_milvus.settings import Device, ExtractSettings, Precision

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""RGB (N, H, W, 3) in [0, 255], uint8 or fp32, on the network's device, to (features (N, C, h, w), scores (N, 1, h, w)
fp32); safe to call from threads."""


def resolve_device(device: Device) -> torch.device:
    """The device of an `extract.device` setting; raises UsageError for a GPU that torch does not see."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError(
            "extract.device = cuda, and torch sees no GPU; install a CUDA build of torch, or set extract.device to cpu."
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def load_network(network: Delf, selection: Selection, settings: ExtractSettings, device: torch.device) -> Network:
    """The network for inference as the settings ask for it; the given one is not changed.

    Raises UsageError when the settings' library is not installed.
    """
    dtype = resolve_dtype(settings.precision, device)
    if settings.runtime == "openvino":
        from delf_milvus.model.openvino_network import OpenVinoNetwork

        return OpenVinoNetwork(network, selection, dtype)
    prepared = prepare(network, device, dtype)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        # (N, H, W, 3) seen as (N, 3, H, W) is channels last already.
        features, scores = prepared(pixels.permute(0, 3, 1, 2), selection)
        return features, scores

    return run


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the network runs faster in bf16 than in fp32 on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and computes_bf16_fast(processor)


def computes_bf16_fast(processor: str) -> bool:
    """Whether a processor multiplies bf16 matrices faster than fp32 ones, by the text of Linux's /proc/cpuinfo.

    Its kind says so and not a measurement, so that the same machine always computes the same. The bf16 instructions
    alone do not tell: AMD's cores run them at twice the rate of fp32, Intel's at half of it where the matrix unit (AMX)
    is absent or hidden by a hypervisor.
    """
    return "amx_bf16" in processor or ("avx512_bf16" in processor and "AuthenticAMD" in processor)


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic for a `precision` setting."""
    if precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def prepare(network: Delf, device: torch.device, dtype: torch.dtype) -> Delf:
    """A copy of `network` for inference: folded, channels last, convolutions in `dtype`, the rest in fp32."""
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        network.trunk = InferenceTrunk(network.trunk, dtype)
        if network.attention is not None:
            fold_behind(network.attention, "conv1", "bn")
            # Convolutions alone change dtype: they are the cost, and they tolerate it. Not the last, of one channel:
            # its result is the order of the features.
            network.attention.conv1.to(dtype)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # not in the stubs
