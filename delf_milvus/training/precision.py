"""Mixed precision: the network's arithmetic while it is trained. Weights and their updates stay fp32.

bf16 has the range of fp32 and needs no more than torch's autocast. Gradients in fp16 would fall below its range: the
loss is scaled up, and a step whose gradients overflow is left out (`torch.amp.GradScaler`).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from delf_milvus.model.runtime import has_fast_bf16
from delf_milvus.settings import Precision


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic. auto: bf16 where the processor computes it faster than fp32, on other GPUs fp16,
    else fp32."""
    if precision == "auto":
        if has_fast_bf16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class Arithmetic:
    """Forward passes in a dtype, and the steps of an optimizer that fit it."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.device = device
        self.dtype = training_dtype(precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clipped: list[torch.nn.Parameter] | None = None,
        clip: float = 0.0,
    ) -> None:
        """One step down the gradient of a loss; the gradient of `clipped` has a norm of `clip` at most."""
        optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if clipped:
            self._scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(clipped, clip)
        self._scaler.step(optimizer)
        self._scaler.update()

    def recipe(self) -> dict[str, str]:
        """What a model card says of it."""
        return {"precision": str(self.dtype).removeprefix("torch.")}

    def state(self) -> str:
        """What a resumed run needs of it, as JSON; bf16 and fp32 need nothing."""
        return json.dumps(self._scaler.state_dict())

    def restore(self, state: str) -> None:
        """The inverse of `state`; what another dtype needed is left."""
        values: dict[str, Any] = json.loads(state)
        if values and self._scaler.is_enabled():
            self._scaler.load_state_dict(values)
