"""How often drawings made of the same parts are taken for one another.

    python tests/benchmarks/drawn_streets.py --streets 12

The streets of `examples/pictures/draw.py` are rows of houses with equal windows, doors and letters. Three views of each
are stored; then other streets, none of which is stored, ask for a match. Every answer is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Before torch loads: threads that wait by spinning starve others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples/pictures"))

from draw import street
from scenes import view

from delf_milvus import DelfIndex


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streets", type=int, default=12)
    count = parser.parse_args().streets
    with tempfile.TemporaryDirectory() as folder, DelfIndex.open(Path(folder) / "streets.db") as index:
        for number in range(count):
            for seen in range(3):
                index.add(view(street(number), seen), image_id=f"{number}/{seen}")
        best = [index.search(street(100 + number), include_unverified=True).hits[0] for number in range(count)]
        right = [index.search(view(street(number), 7)).hits for number in range(count)]
    for bar in (0.01, 0.001, 0.0001):
        wrong = sum(hit.false_alarm <= bar for hit in best)
        kept = sum(bool(hits) and hits[0].false_alarm <= bar for hits in right)
        print(f"bar {bar:g}: {wrong} of {count} unknown streets answered, {kept} of {count} known ones found")
    print(
        f"first answers that are right: {sum(h[0].image_id.split('/')[0] == str(n) for n, h in enumerate(right) if h)}"
    )


if __name__ == "__main__":
    main()
