"""From a photo to its local features: pyramid, network, selection, reduction.

A cell (row, column) of the map at pyramid scale s is a keypoint at pixel (stride * column / s, stride * row / s) of
the photo. Cells of all scales compete by their score alone; ties go to the earlier scale, then row by row, so that
the same photo always gives the same features. How a level is made is the model's (`spec.Pyramid`): a network meets the
pixels that it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delf_milvus.errors import ModelError
from delf_milvus.features import Box, Features, clipped_box
from delf_milvus.forking import OneProcess
from delf_milvus.model import weights
from delf_milvus.model.delf import pooled
from delf_milvus.model.resize import resize, resize_tf_bilinear, tf_size
from delf_milvus.model.runtime import load_network, resolve_device, resolve_dtype
from delf_milvus.model.spec import fingerprint_of, resolve, selection_of
from delf_milvus.settings import ExtractSettings

RgbImage = npt.NDArray[np.uint8]

_MOST_TOGETHER = 32
_PIXELS_TOGETHER = 16_000_000
"""Photos, and pixels of their largest level, that one pass of a GPU takes at most: some 4 GB."""

_MAP_SIDE = 512
"""Pixels of the longest side of an attention map: finer than the cells of any level that is used."""


_computing = OneProcess("Photos were computed")


class _Level(NamedTuple):
    """One level of the pyramid of N photos of one size, whose cells lie row by row: scores (N, n), maps (N, n, C),
    locations (n, 2) and scales (n,); rows and columns of its grid; its scale relative to the region."""

    scores: Tensor
    maps: Tensor
    locations: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]
    grid: tuple[int, int]
    scale: float


class Extractor:
    """Extracts features with one weight file and one set of settings; safe to use from several threads.

    Raises ModelError when the weight file is missing, damaged, or lacks what the settings ask for, and UsageError when
    the machine lacks the settings' device or library.
    """

    def __init__(self, model: str | Path | None, settings: ExtractSettings) -> None:
        self.path = path = resolve(model)
        self.fingerprint = fingerprint_of(path, settings)
        network = weights.load(path)
        self.device = torch.device("cpu") if settings.runtime == "openvino" else resolve_device(settings.device)
        self.dtype = resolve_dtype(settings.precision, self.device)
        self.plan = settings.plan
        self.selection = selection_of(path, network.spec, settings)
        self._stride = network.spec.trunk.stride
        self._pyramid = network.spec.pyramid
        self._least_attention = settings.min_attention
        self._network = load_network(network, self.selection, settings, self.device)
        self._reduction = network.reduction.to(self.device)
        self._global_reduction = None if network.global_reduction is None else network.global_reduction.to(self.device)

    def extract(self, photo: RgbImage, count: int, box: Box | None = None) -> Features:
        """The `count` best features of a photo, (H, W, 3) uint8 RGB, or of the part of it inside `box`.

        box: x0, y0, x1, y1 in pixels. It is cut out before the pyramid, so that the whole budget of features goes to
        it; locations stay in pixels of the whole photo. Levels with a side shorter than one cell are left out, so a
        photo smaller than a cell has no features; the "tf-bilinear" pyramid keeps every level that has a pixel. Cells
        that score below `min_attention` are no features.

        Raises UsageError for a box that leaves nothing of the photo, and in a process that was forked after its parent
        had computed, ModelError where the network computes values that are no features.
        """
        height, width = photo.shape[:2]
        x0, y0, x1, y1 = map(int, clipped_box(box, width, height))
        region = photo[y0:y1, x0:x1]
        with torch.inference_mode():
            return self._selected(self._levels(region[None]), 1, count, (x0, y0), (width, height))[0]

    def extract_many(self, photos: Sequence[RgbImage], count: int) -> list[Features]:
        """What `extract` gives for each photo, to the rounding of the arithmetic; all have one shape.

        On a GPU one pass over `together` photos takes little longer than over one; on a CPU it takes as long as one by
        one, and more memory.
        """
        height, width = photos[0].shape[:2]
        with torch.inference_mode():
            return self._selected(self._levels(np.stack(photos)), len(photos), count, (0, 0), (width, height))

    @property
    def most_together(self) -> int:
        """The most that `together` says of photos of any shape."""
        return 1 if self.device.type == "cpu" else _MOST_TOGETHER

    def together(self, shape: tuple[int, int]) -> int:
        """How many photos of this height and width `extract_many` should be given at most: 1 on a CPU, and on a GPU as
        many as fill it, in bounded memory."""
        shrink = min(1.0, self.plan.longest_side / max(shape))
        largest = shape[0] * shape[1] * (shrink * max(self.plan.scales)) ** 2
        return max(1, min(self.most_together, int(_PIXELS_TOGETHER / max(largest, 1))))

    def attended(self, photo: RgbImage, count: int) -> tuple[Features, npt.NDArray[np.float32]]:
        """What `extract` gives, and the scores of all cells as a map over the photo.

        The map, (h, w) float32, has the photo's shape and at most 512 pixels a side. Each of its pixels is the highest
        score that a level has there, for levels compete by score alone; between cells it is interpolated. Without a
        level it is zero.
        """
        height, width = photo.shape[:2]
        with torch.inference_mode():
            levels = self._levels(photo[None])
            features = self._selected(levels, 1, count, (0, 0), (width, height))[0]
        factor = min(1.0, _MAP_SIDE / max(height, width))
        shape = max(1, round(height * factor)), max(1, round(width * factor))
        highest = np.zeros(shape, np.float32)
        for level in levels:
            scores = level.scores.float().cpu().numpy().reshape(level.grid)
            # Where the pixels of the map lie in the grid, whose first cell lies in the photo's first pixel.
            x, y = (
                ((np.arange(side) + 0.5) * full / side - 0.5) * (level.scale / self._stride)
                for side, full in ((shape[1], width), (shape[0], height))
            )
            columns, rows = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
            one = cv2.remap(scores, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            np.maximum(highest, one, out=highest)
        return features, highest

    def _levels(self, regions: npt.NDArray[np.uint8]) -> list[_Level]:
        """The levels of the pyramid of regions, (N, H, W, 3), that are not too small."""
        _computing.check()
        sides = regions.shape[1:3]
        shrink = min(1.0, self.plan.longest_side / max(sides))
        # A copy, whatever its layout: a turned photo of one column counts as contiguous, and has strides that torch
        # does not take.
        pixels = torch.from_numpy(regions.copy(order="C"))
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        levels = (self._level(pixels, scale * shrink) for scale in self.plan.scales)
        return [level for level in levels if level is not None]

    def _selected(
        self, levels: list[_Level], photos: int, count: int, offset: tuple[int, int], size: tuple[int, int]
    ) -> list[Features]:
        """The `count` best features of all levels, for each of so many photos. offset: x, y of the region in a photo of
        this size."""
        width, height = size
        if not levels:
            return [_no_features(self.fingerprint.dim, width, height)] * photos
        all_scores = torch.cat([level.scores for level in levels], dim=1)
        scores, order = (part[:, :count] for part in torch.sort(all_scores, dim=1, descending=True, stable=True))
        maps = torch.cat([level.maps for level in levels], dim=1)
        chosen = maps[torch.arange(len(order), device=order.device)[:, None], order]
        descriptors = self._reduction(chosen.flatten(0, 1)).view(*order.shape, -1).cpu().numpy()
        whole = self._global_descriptors([level.maps for level in levels])
        locations = np.concatenate([level.locations for level in levels])
        scales = np.concatenate([level.scales for level in levels])
        found = []
        for attention, rows, own, global_descriptor in zip(
            scores.cpu().numpy(), order.cpu().numpy(), descriptors, whole, strict=True
        ):
            if self._least_attention is not None:
                above = int(np.count_nonzero(attention >= self._least_attention))
                attention, rows, own = attention[:above], rows[:above], own[:above]
            places = locations[rows] + np.array(offset, np.float32)
            try:
                one = Features(places, scales[rows], attention, own, width, height, global_descriptor)
            except ValueError as error:
                raise ModelError(
                    f"The model {self.path} makes no sound features ({error}): it is damaged; take an intact copy."
                ) from error
            found.append(one)
        return found

    def _global_descriptors(self, maps: list[Tensor]) -> npt.NDArray[np.float32]:
        """(N, G) float32, of the maps (N, n, C) of all levels; of length 0 where the model has none."""
        if self._global_reduction is None:
            return np.zeros((len(maps[0]), 0), np.float32)
        return np.asarray(self._global_reduction(pooled(maps)).cpu().numpy())

    def _level(self, regions: Tensor, scale: float) -> _Level | None:
        """One level of the pyramid; None if it is too small."""
        pixels = self._resized(regions, scale)
        if pixels is None:
            return None
        features, scores = self._network(pixels)
        rows, columns = features.shape[2:]
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
        locations = (grid * (self._stride / scale)).astype(np.float32)
        return _Level(
            scores.flatten(1),
            features.permute(0, 2, 3, 1).flatten(1, 2),
            locations,
            np.full(rows * columns, 1 / scale, np.float32),
            (rows, columns),
            scale,
        )

    def _resized(self, regions: Tensor, scale: float) -> Tensor | None:
        """The pixels of one level, (N, h, w, 3), on the device that the regions are on; None if it is too small."""
        sides = regions.shape[1:3]
        if self._pyramid == "tf-bilinear":
            height, width = tf_size(sides, scale)
            if min(height, width) < 1:
                return None
            return torch.stack([resize_tf_bilinear(region.float(), height, width) for region in regions])
        height, width = (round(side * scale) for side in sides)
        if min(height, width) < self._stride:
            return None
        return regions if (height, width) == sides else resize(regions, height, width)


def _no_features(dim: int, width: int, height: int) -> Features:
    empty = np.zeros(0, np.float32)
    return Features(np.zeros((0, 2), np.float32), empty, empty, np.zeros((0, dim), np.float32), width, height)
