"""How the network runs: BatchNorm folded, channels last, bf16 where the processor computes it faster than fp32.

`prepare` returns a network that computes the same function as the one it is given; the given one is not changed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch

from delf_milvus.model.delf import Delf
from delf_milvus.model.folding import InferenceTrunk, fold_behind

Precision = Literal["auto", "bf16", "fp32"]


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
    if precision == "fp32" or (precision == "auto" and not has_fast_bf16(device)):
        return torch.float32
    return torch.bfloat16


def prepare(network: Delf, device: torch.device, dtype: torch.dtype) -> Delf:
    """A copy of `network` for inference: folded, channels last, convolutions in `dtype`, the rest in fp32."""
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        network.trunk = InferenceTrunk(network.trunk, dtype)
        if network.attention is not None:
            fold_behind(network.attention, "conv1", "bn")
            # Convolutions alone change dtype: they are the cost, and they tolerate it. Not the last, of one channel: its
            # result is the order of the features.
            network.attention.conv1.to(dtype)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # not in the stubs
