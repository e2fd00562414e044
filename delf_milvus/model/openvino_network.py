"""The network on OpenVINO, which brings its own kernels for CPUs: fastest where they have matrix units for bf16.

OpenVINO computes the convolutions; the score of a cell comes from their maps as it does on torch, in fp32, for
OpenVINO's softplus has few bits where it is near zero, which is where most scores are.

One model of dynamic shape serves photos of every size: a model for each size is no faster. Nothing is written to disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from delf_milvus.errors import UsageError
from delf_milvus.model.delf import Delf
from delf_milvus.model.spec import Selection

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_KEPT_KERNELS = 500
"""Compiled kernels of a kind that are kept, a few dozen for each size of a map: bounds memory."""


class _Maps(nn.Module):
    """Pixels (N, H, W, 3), fp32, to two maps (N, h, w, channels): the descriptors, and what scores come from."""

    def __init__(self, network: Delf, selection: Selection) -> None:
        super().__init__()
        self.trunk = network.trunk
        self.attention = network.attention if selection == "attention" else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raw, features = self.trunk(pixels.permute(0, 3, 1, 2))
        scored = raw if self.attention is None else self.attention.hidden(features)
        # Channels last, as OpenVINO computes them and cells are taken from them.
        return features.permute(0, 2, 3, 1), scored.permute(0, 2, 3, 1)


class OpenVinoNetwork:
    """A network converted for the CPU; safe to call from several threads, which wait for each other.

    Computes in `dtype` (fp32, bf16 or fp16; OpenVINO takes fp32 instead where the processor lacks it) with as many
    threads as torch has. The given network is not changed. `rewrite` takes the converted model, pixels (N, H, W, 3) in
    and `_Maps` out, and returns the one that is compiled: a quantised one, say.

    Raises UsageError when OpenVINO is not installed.
    """

    def __init__(
        self,
        network: Delf,
        selection: Selection,
        dtype: torch.dtype,
        rewrite: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UsageError(
                "extract.runtime = openvino needs OpenVINO: pip install 'delf-milvus[openvino]', or set it to torch."
            ) from error
        self._attention = copy.deepcopy(network.attention) if selection == "attention" else None
        stride = network.spec.trunk.stride
        example = torch.zeros(1, 4 * stride, 4 * stride, 3)
        with torch.no_grad():
            model = openvino.convert_model(_Maps(network, selection).eval(), example_input=example)
        self._compiled: Any = openvino.Core().compile_model(
            rewrite(model),
            "CPU",
            {
                # Said, for OpenVINO picks bf16 by itself on a CPU that has it.
                "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "CPU_RUNTIME_CACHE_CAPACITY": _KEPT_KERNELS,
            },
        )

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(features (N, C, h, w), scores (N, 1, h, w)), fp32, of RGB (N, H, W, 3) in [0, 255]."""
        # A request of its own for each call: the maps lie in its memory, which lives as long as they do.
        request = self._compiled.create_infer_request()
        outputs = request.infer({0: pixels.float().numpy()}, share_inputs=True, share_outputs=True)
        features, scored = (torch.from_numpy(outputs[index]).permute(0, 3, 1, 2) for index in (0, 1))
        if self._attention is None:
            return features, torch.linalg.vector_norm(scored, dim=1, keepdim=True)
        return features, self._attention.score(scored)
