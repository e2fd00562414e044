"""One process that fuzzes one reader: `python fuzz_child.py TARGET SEED FIRST LAST SECONDS CPU_SECONDS FOLDER`.

It writes each input to FOLDER/input before it is read, and one JSON object a line to stdout: what has been done, and
findings. It ends after LAST inputs or SECONDS, and after a finding that taints the process. Its address space is
limited, and an input that takes more than CPU_SECONDS of processor time ends it by SIGPROF.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.fuzz_targets import TARGETS

from delf_milvus.errors import DelfMilvusError

_SPARE_MEGABYTES = 1500
_TELL_SECONDS = 0.5


def main() -> None:
    name, seed, *numbers = sys.argv[1:6]
    first, last, seconds = int(numbers[0]), int(numbers[1]), float(numbers[2])
    processor_seconds, folder = float(sys.argv[6]), Path(sys.argv[7])
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    target = TARGETS[name]
    (folder / "work").mkdir(exist_ok=True)
    seeds, read = target.start(folder / "work")
    for one in seeds:
        read(one)
    _limit_memory(target.megabytes + _SPARE_MEGABYTES)
    bound = _peak_megabytes() + target.megabytes
    counts = {"accepted": 0, "refused": 0}
    ends = time.monotonic() + seconds
    told = 0.0

    def tell(number: int, **more: str) -> None:
        report.write(json.dumps({"next": number + 1, **counts, **more}) + "\n")

    def found(number: int, data: bytes, kind: str, error: str, trace: str = "") -> None:
        (folder / f"finding-{number}").write_bytes(data)
        tell(number, kind=kind, error=error, trace=trace, input=f"finding-{number}")

    report.write(json.dumps({"next": first, **counts}) + "\n")
    for number in range(first, last):
        rng = random.Random(f"{name} {seed} {number}")
        data = target.mutation(rng, rng.choice(seeds), seeds)
        (folder / "input").write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, processor_seconds)
        try:
            read(data)
            counts["accepted"] += 1
        except DelfMilvusError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                found(number, data, "sentence", f"a message of several lines: {error}")
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            found(number, data, "exception", f"{type(error).__name__}: {str(error)[:500]}", "\n".join(lines[-24:]))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if _peak_megabytes() > bound:
            found(number, data, "memory", f"more than {target.megabytes} MB")
            break
        now = time.monotonic()
        if now > ends:
            break
        if now - told > _TELL_SECONDS:
            told = now
            tell(number)
    tell(number, end="yes")
    # Readers leave databases and loops behind, whose ends could hang.
    with contextlib.suppress(OSError):
        report.flush()
    os._exit(0)


def _peak_megabytes() -> float:
    # Linux hands the peak of who started a process on to it, and says its own here.
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _limit_memory(megabytes: int) -> None:
    """Bound the address space to what is taken now and so much more, where the system tells the former."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = taken + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
