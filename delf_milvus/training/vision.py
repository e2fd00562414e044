"""The one door to torchvision.

PyPI's torchvision for Linux is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and
its import then fails with a RuntimeError about `torchvision::nms`. Declaring the two missing operators first lets
`datasets` and `transforms.v2` work; nothing here calls the operators themselves.
"""

from __future__ import annotations

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _import() -> None:
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SIGNATURE)
        import torchvision  # noqa: F401


_import()

from torchvision import datasets  # noqa: E402
from torchvision.transforms import v2 as transforms  # noqa: E402

__all__ = ["datasets", "transforms"]
