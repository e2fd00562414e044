"""Photos that come with scikit-image, for tests that need real ones; importing it skips where there is none."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

skimage_data = pytest.importorskip("skimage.data", reason="needs scikit-image (extra: demo)")


def photo(name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    path = next(Path(skimage_data.__file__).parent.glob(f"{name}.*"))
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
