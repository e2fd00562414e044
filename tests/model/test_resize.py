"""The levels of a pyramid are the same on every device: the sums against OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_photo
from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.model.resize import resize, resize_by_sums

SIDES = st.integers(16, 120)


def compared(pixels: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Differences in levels between OpenCV's resize and the sums."""
    by_opencv, by_sums = resize(pixels, height, width), resize_by_sums(pixels, height, width)
    assert by_sums.shape == by_opencv.shape == (len(pixels), height, width, 3)
    assert by_sums.dtype == by_opencv.dtype == torch.uint8
    return (by_sums.int() - by_opencv.int()).abs().numpy()


@given(SIDES, SIDES, st.floats(0.2, 2.5), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_sums_are_what_opencv_gives_but_for_rounding(height: int, width: int, scale: float, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), np.uint8)
    difference = compared(torch.from_numpy(noise), round(height * scale), round(width * scale))
    assert difference.max() <= 1


@pytest.mark.parametrize("scale", [0.25, 0.3536, 0.5, 0.7071, 1.4142, 2.0])
def test_nearly_every_pixel_of_a_photo_is_the_same(scale: float) -> None:
    pixels = torch.from_numpy(np.stack([make_photo(seed, 321, 243) for seed in range(2)]))
    difference = compared(pixels, round(243 * scale), round(321 * scale))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.9
