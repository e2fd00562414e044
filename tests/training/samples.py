"""Generated photos and a tiny network, for training in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from conftest import make_photo, save_photo

from delf_milvus.model import weights
from delf_milvus.model.spec import ModelSpec, TrunkSpec
from delf_milvus.model.trunk import Trunk

TRUNK = TrunkSpec(layout="v2", units=(1, 1, 1), widths=(8, 8, 16))


def write_trunk(path: Path, seed: int = 0) -> Path:
    """A weight file with a random trunk."""
    torch.manual_seed(seed)
    state = {f"trunk.{name}": value for name, value in Trunk(TRUNK).state_dict().items()}
    weights.save(path, state, ModelSpec(trunk=TRUNK, selection="norm", attention_channels=0))
    return path


def write_classes(root: Path, each: int = 12) -> Path:
    """Three classes of photos, told apart by their colour."""
    for number, name in enumerate(("blue", "green", "red")):
        for seed in range(each):
            photo = make_photo(100 * number + seed, 96, 80) // 2
            photo[..., 2 - number] += 110
            save_photo(root / name / f"{seed}.png", photo)
    return root


def write_places(root: Path, places: int = 4, views: int = 3) -> Path:
    """Folders of one scene each, moved and darkened from view to view."""
    for place in range(places):
        scene = make_photo(5000 + place, 200, 160)
        for view in range(views):
            moved = cv2.warpAffine(scene, np.array([[1.0, 0.0, 4 * view], [0.0, 1.0, -3 * view]]), (200, 160))
            save_photo(root / f"place{place}" / f"{view}.png", (moved * (1 - 0.1 * view)).astype(np.uint8))
    return root


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
