"""How the levels of a pyramid are made: as OpenCV resizes, or as TensorFlow's legacy bilinear resize does.

The official DELF exports make theirs with the second: `ResizeBilinear` without aligned corners and half pixels. Pixel i
of the output lies at i * (input / output) of the input, so that the pixel (0, 0) stays where it is, a coordinate is
divided by the scale and nothing else, and shrinking averages nothing. torch and OpenCV resize with half pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize (N, H, W, 3) uint8 pixels to (N, height, width, 3) on the device that they are on.

    By area where they shrink, bilinear where they grow; both sides shrink or both grow. On a CPU by OpenCV, elsewhere
    by the same sums, which round to another level now and then.
    """
    if pixels.device.type != "cpu":
        return resize_by_sums(pixels, height, width)
    method = cv2.INTER_AREA if height <= pixels.shape[1] and width <= pixels.shape[2] else cv2.INTER_LINEAR
    photos = [cv2.resize(photo, (width, height), interpolation=method) for photo in pixels.numpy()]
    return torch.from_numpy(np.stack(photos))


def resize_by_sums(pixels: Tensor, height: int, width: int) -> Tensor:
    """What `resize` gives, by weighted sums of rows and then of columns, on any device."""
    resized = pixels.float()
    for dim, outputs in ((1, height), (2, width)):
        if (inputs := resized.shape[dim]) == outputs:
            continue
        cells, shares = _shares(inputs, outputs, pixels.device)
        shape = [1, 1, 1, 1]
        shape[dim] = outputs
        total = torch.zeros((), device=pixels.device)
        for cell, share in zip(cells, shares, strict=True):
            total = torch.addcmul(total, resized.index_select(dim, cell), share.view(shape))
        resized = total
    return resized.round_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=512)
def _shares(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which cells of a row each of its resized cells is the sum of, (K, outputs), and the share of each."""
    step = inputs / outputs
    number = np.arange(outputs)
    if outputs < inputs:
        begin, end = number * step, np.minimum((number + 1) * step, inputs)
        cells = np.floor(begin)[None] + np.arange(int(np.ceil(step)) + 1)[:, None]
        shares = np.maximum(np.minimum(cells + 1, end) - np.maximum(cells, begin), 0)
    else:
        place = np.clip((number + 0.5) * step - 0.5, 0, inputs - 1)
        cells = np.floor(place)[None] + np.arange(2)[:, None]
        shares = 1 - np.abs(cells - place)
    cells = np.minimum(cells, inputs - 1).astype(np.int64)
    shares = (shares / shares.sum(axis=0)).astype(np.float32)
    return torch.from_numpy(cells).to(device), torch.from_numpy(shares).to(device)


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
