"""Fuzz the readers of strangers' bytes for as long as you like.

    python tests/fuzz/fuzz_readers.py --minutes 30 --target images
    python tests/fuzz/fuzz_readers.py --minutes 60 --out found/          # all targets, in turns
    python tests/fuzz/fuzz_readers.py --target npz --input found/npz-exception-0

Prints a table: inputs, how many of them were read and refused, findings. Exit code 1 where there are findings; the
input of each is in the folder of --out, with its trace beside it. Another --seed makes other inputs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.fuzz_runner import Outcome, fuzz
from fuzz.fuzz_targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="again for more; all by default")
    parser.add_argument("--minutes", type=float, default=5.0, help="of all targets together")
    parser.add_argument("--seed", default=str(time.time_ns()), help="text that the inputs follow from")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder of what is found")
    parser.add_argument("--input", type=Path, help="read this one input in this process instead, with its trace")
    given = parser.parse_args()
    names = given.target or sorted(TARGETS)
    if given.input is not None:
        for name in names:
            _, read = TARGETS[name].start(Path(tempfile.mkdtemp()))
            print(read(given.input.read_bytes()))
        return 0
    outcomes = [
        fuzz(name, given.out, seconds=60 * given.minutes / len(names), seed=given.seed, told=_tell) for name in names
    ]
    print(f"\nseed {given.seed}\n\n| target | inputs | read | refused | minutes | findings |")
    print("| --- | --- | --- | --- | --- | --- |")
    for one in outcomes:
        counts = f"{one.inputs:,} | {one.accepted:,} | {one.refused:,}"
        print(f"| {one.target} | {counts} | {one.seconds / 60:.1f} | {len(one.findings)} |")
    if not any(one.findings for one in outcomes) and not any(given.out.glob("*")):
        shutil.rmtree(given.out, ignore_errors=True)
    return int(any(one.findings for one in outcomes))


def _tell(outcome: Outcome) -> None:
    print(f"{outcome.target}: {outcome.inputs:,} inputs in {outcome.seconds:.0f} s", file=sys.stderr)
    for finding in outcome.findings:
        print(f"  {finding.path}: {finding.kind}, {finding.error[:200]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
