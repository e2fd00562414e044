"""TensorFlow's legacy bilinear resize, which the official DELF exports make their pyramid with.

`ResizeBilinear` without aligned corners and half pixels: pixel i of the output lies at i * (input / output) of the
input, so that the pixel (0, 0) stays where it is, a coordinate is divided by the scale and nothing else, and shrinking
averages nothing. torch and OpenCV resize with half pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def tf_size(sides: Sequence[int], scale: float) -> tuple[int, int]:
    """Height and width of a level, as the exports compute them: in fp32, halves to the even number."""
    height, width = np.rint(np.asarray(sides, np.float32) * np.float32(scale)).astype(int).tolist()
    return height, width


def resize_tf_bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize (H, W, C) float pixels to (height, width, C), in the order of TensorFlow's kernel."""
    (top, bottom, down), (left, right, across) = (
        _neighbours(inputs, outputs, pixels.device)
        for inputs, outputs in zip(pixels.shape[:2], (height, width), strict=True)
    )
    if pixels.shape[1] != width:
        start = pixels[:, left]
        pixels = start + (pixels[:, right] - start) * across[:, None]
    if pixels.shape[0] != height:
        start = pixels[top]
        pixels = start + (pixels[bottom] - start) * down[:, None, None]
    return pixels


def _neighbours(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of (outputs,) cells: the cell before it, the one after it, and how far it is from the first."""
    places = torch.arange(outputs, device=device).float() * float(np.float32(inputs) / np.float32(outputs))
    before = places.floor().long()
    return before, (before + 1).clamp_max(inputs - 1), places - before
