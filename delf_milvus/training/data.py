"""Labelled photos: class folders or a CSV file of Google Landmarks in, uint8 tensors out.

A class is a folder of photos, or a landmark; its name is "<root's name>/<folder's name or landmark id>", so that
several roots can be trained on together. Up to `MOST_IN_MEMORY` photos are decoded once and kept in memory, shrunk;
more are read whenever they are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from delf_milvus.errors import InputError, one_line
from delf_milvus.ingestion.scan import scan
from delf_milvus.training.landmark_csv import photos_by_landmark
from delf_milvus.training.processes import Processes
from delf_milvus.training.vision import datasets

MOST_IN_MEMORY = 50_000
"""Photos that are kept: of 250 x 330 pixels, 12 GB."""


@dataclass(frozen=True)
class LabelledPhotos:
    """Paths and their class numbers, with the class names in order of the numbers."""

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def labelled_photos(roots: Sequence[Path], exclude: Iterable[str] = ()) -> LabelledPhotos:
    """Every photo in the class folders of `roots`, in a stable order, without the classes named in `exclude`.

    A root that is a file is a CSV file of Google Landmarks.
    Raises InputError for a root without class folders, or a file that is no such CSV.
    """
    left_out = set(exclude)
    paths: list[Path] = []
    labels: list[int] = []
    classes: list[str] = []
    for root in roots:
        for name, own in (photos_by_landmark(root) if root.is_file() else _photos_by_folder(root)).items():
            if name in left_out:
                continue
            paths += own
            labels += [len(classes)] * len(own)
            classes.append(f"{root.name}/{name}")
    return LabelledPhotos(paths, labels, classes)


def _photos_by_folder(root: Path) -> dict[str, list[Path]]:
    try:
        folder = datasets.ImageFolder(str(root))
    except FileNotFoundError as error:
        raise InputError(f"{root} has no folders of photos, one a class, to train on.") from error
    found: dict[str, list[Path]] = {name: [] for name in folder.classes}
    for path, label in folder.samples:
        found[folder.classes[label]].append(Path(path))
    return found


def unlabelled_photos(roots: Sequence[Path], exclude: Iterable[str] = ()) -> list[Path]:
    """Every photo of folders, at any depth, and of CSV files of Google Landmarks, in a stable order, without those in
    folders, or of landmarks, that are named in `exclude`.

    Raises InputError where there is none.
    """
    left_out = set(exclude)
    paths: list[Path] = []
    for root in roots:
        if root.suffix.lower() == ".csv":
            own = photos_by_landmark(root)
            paths += [path for landmark, found in own.items() if landmark not in left_out for path in found]
        else:
            paths += [photo.path for photo in scan([root]).photos if not left_out & set(photo.path.parts)]
    if not paths:
        raise InputError(f"There are no photos in {', '.join(map(str, roots))}; give --data folders of photos.")
    return paths


def split(photos: LabelledPhotos, every: int) -> tuple[LabelledPhotos, LabelledPhotos]:
    """(training, validation): each `every`-th photo validates."""
    held = set(range(every - 1, len(photos.paths), every))

    def part(keep: Callable[[int], bool]) -> LabelledPhotos:
        chosen = [i for i in range(len(photos.paths)) if keep(i)]
        return LabelledPhotos([photos.paths[i] for i in chosen], [photos.labels[i] for i in chosen], photos.classes)

    return part(lambda i: i not in held), part(lambda i: i in held)


def require_batch(roots: Sequence[Path], photos: LabelledPhotos, batch: int, views: int = 1) -> None:
    """Raise InputError where `views` of each training photo do not fill one batch."""
    count = len(photos.paths)
    if count * views < batch:
        raise InputError(
            f"{', '.join(map(str, roots))} has {count} photos to train on, fewer than one batch of {batch}: "
            "add photos or lower --batch."
        )


def require_readable(photos: LabelledPhotos) -> None:
    """Raise InputError for a file whose first bytes are no photo's: before hours of work rather than during them."""
    for path in photos.paths:
        if not cv2.haveImageReader(str(path)):
            raise InputError(f"{one_line(path)} is not a readable photo; remove it, or --exclude its folder.")


def read_rgb(path: Path, longest: int | None = None, shortest: int | None = None) -> Tensor:
    """A photo as uint8 (3, H, W), shrunk so that its longest or shortest side is at most so many pixels.

    Raises InputError when it cannot be decoded.
    """
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise InputError(f"{one_line(path)} is not a readable photo.")
    height, width = bgr.shape[:2]
    factor = 1.0
    if longest is not None:
        factor = min(factor, longest / max(height, width))
    if shortest is not None:
        factor = min(factor, shortest / min(height, width))
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
    rgb = np.ascontiguousarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).transpose(2, 0, 1))
    return torch.from_numpy(rgb)


class PhotoDataset(Dataset[tuple[Tensor, int]]):
    """Photos with the shortest side at most `shortest` pixels, each drawn through `transform`.

    What is drawn of a photo depends on `seed`, the epoch (`set_epoch`) and the photo alone: not on the number of
    processes, nor on whether the run was resumed. most: photos that are kept in memory.
    """

    def __init__(
        self,
        photos: LabelledPhotos,
        shortest: int,
        transform: Callable[[Tensor], Tensor],
        *,
        seed: int = 0,
        most: int | None = None,
    ) -> None:
        self.paths, self.labels, self.shortest = photos.paths, photos.labels, shortest
        few = len(self.paths) <= (MOST_IN_MEMORY if most is None else most)
        self.images = [read_rgb(path, shortest=shortest) for path in self.paths] if few else []
        self.transform = transform
        self._seed = seed
        # Shared, so that a worker that lives on sees another epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, in workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index] if self.images else read_rgb(self.paths[index], shortest=self.shortest)
        drawn = np.random.SeedSequence([self._seed, int(self._epoch), index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(drawn[0]))
            return self.transform(image), self.labels[index]


Batches = DataLoader[tuple[Tensor, int]]

MOST_WORKERS = 16
"""Processes that draw photos for one GPU, at most."""


def batches(photos: PhotoDataset, share: int, seed: int, here: Processes) -> Batches:
    """This process's part, `share` photos, of each whole batch to learn from, drawn in workers.

    One worker where the CPU computes the network too; for a GPU its part of the cores but one. `in_order_of` sets the
    epoch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cuda = here.device.type == "cuda"
    return DataLoader(
        photos,
        share,
        # With one process too: its order of an epoch is the same for any number of them.
        sampler=DistributedSampler(photos, here.count, here.rank, seed=seed, drop_last=True),
        drop_last=True,
        num_workers=min(MOST_WORKERS, max(1, cores // here.count - 1)) if cuda else 1,
        persistent_workers=True,
        pin_memory=cuda,
    )


def in_order_of(epoch: int, loader: Batches) -> Batches:
    """A loader of `batches` with the order and the draws of an epoch, which depend on nothing else."""
    assert isinstance(loader.sampler, DistributedSampler)
    assert isinstance(loader.dataset, PhotoDataset)
    loader.sampler.set_epoch(epoch)
    loader.dataset.set_epoch(epoch)
    return loader
