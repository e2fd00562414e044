"""One global GeM vector a photo, of the bundled model's own trunk: what local features are worth beside it.

    python tests/benchmarks/global_descriptor.py --data ../shared/data --cache runs/judge --save global.json

The vector is the generalised mean (power 3) over the cells of the trunk's map at scale 1, L2-normalised, centred by the
mean over all photos, and normalised again (Radenovic et al., fine-tuning CNN image retrieval with no human annotation,
TPAMI 2018). Photos are ranked by cosine similarity. Queries and figures are those of judge.py, whose --save a run with
--against reads: prints the mean difference, the package's minus the global vector's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import torch
from judge import SETS, Figures, alike, compare, means, note
from numpy.typing import NDArray

from delf_milvus.imaging.decode import decode
from delf_milvus.model.extractor import Extractor
from delf_milvus.model.runtime import prepare
from delf_milvus.model.weights import load
from delf_milvus.settings import DecodeSettings, Settings

POWER = 3.0
Vectors = NDArray[np.float32]


def vectors_of(data: Path, cache: Path) -> tuple[list[str], Vectors]:
    """Names and GeM vectors, (N, C), before centring; kept in the cache, set by set."""
    settings = Settings()
    extractor = Extractor("bundled", settings.extract)
    network = prepare(load(extractor.path), extractor.device, extractor.dtype)
    names: list[str] = []
    parts: list[Vectors] = []
    for group in SETS:
        path = cache / f"{extractor.fingerprint.short}-gem-{group}.npz"
        if not path.is_file():
            photos = sorted(p for p in (data / group).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
            started = time.perf_counter()
            found = [gem(network, p, extractor.plan.longest_side) for p in photos]
            np.savez(path, names=[p.relative_to(data).as_posix() for p in photos], vectors=np.array(found))
            print(f"{group}: {len(photos)} photos in {time.perf_counter() - started:.0f} s", flush=True)
        with np.load(path) as archive:
            names += [str(name) for name in archive["names"]]
            parts.append(archive["vectors"])
    return names, np.concatenate(parts)


def gem(network: torch.nn.Module, path: Path, longest_side: int) -> Vectors:
    """(C,), L2-normalised."""
    photo = decode(path, DecodeSettings())
    shrink = longest_side / max(photo.shape[:2])
    if shrink < 1:
        size = (round(photo.shape[1] * shrink), round(photo.shape[0] * shrink))
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)[None].float()
        features, _ = network(pixels, "norm")
        pooled = features.float().clamp(min=1e-6).pow(POWER).mean(dim=(2, 3)).pow(1 / POWER)[0]
        return np.asarray(torch.nn.functional.normalize(pooled, dim=0).numpy())


def centred(vectors: Vectors) -> Vectors:
    moved = vectors - vectors.mean(axis=0)
    return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), np.float32)


def judged(names: list[str], vectors: Vectors, among: list[int], queries: list[str]) -> Figures:
    """Figures of every query, by set, with the photos `among` as the collection."""
    same = alike(names)
    number = {name: i for i, name in enumerate(names)}
    collection = vectors[among]
    figures: Figures = {}
    for name in queries:
        order = np.argsort(-(collection @ vectors[number[name]]), kind="stable")
        note(figures, name, [names[among[i]] for i in order.tolist()], same[name])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/judge"))
    parser.add_argument("--save", type=Path, help="JSON file for the figures of every query")
    parser.add_argument("--against", type=Path, help="such a file of judge.py")
    options = parser.parse_args()
    names, vectors = vectors_of(options.data, options.cache)
    vectors = centred(vectors)
    queries = list(alike(names))
    alone = [i for i, name in enumerate(names) if name.startswith("ukbench")]
    runs = {
        "alone": judged(names, vectors, alone, [q for q in queries if q.startswith("ukbench")]),
        "with distractors": judged(names, vectors, list(range(len(names))), queries),
    }
    for run, figures in runs.items():
        print(f"{run}: {means(figures)}")
    if options.save:
        options.save.write_text(json.dumps(runs))
    if options.against:
        theirs = json.loads(options.against.read_text())
        for run, figures in runs.items():
            print(f"the package's minus these, {run}, mean and 95 % interval:")
            compare(theirs.get(run, {}), figures)


if __name__ == "__main__":
    main()
