"""`fuzz_child.py` with a reader that does to its process what its input says, to see whether that is found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz import fuzz_child
from fuzz.fuzz_targets import TARGETS, Target

from delf_milvus.errors import InputError


def read(data: bytes) -> object:
    match data:
        case b"raise":
            raise KeyError("x")
        case b"lines":
            raise TwoLinesError("one\ntwo")
        case b"memory":
            return len(bytearray(b"x") * (400 << 20))
        case b"loop":
            while True:
                pass
        case b"crash":
            os.abort()
    return data


class TwoLinesError(InputError):
    def __str__(self) -> str:
        return str(self.args[0])


TARGETS["broken"] = Target(lambda folder: ([b"whole"], read), lambda *_: os.environb[b"BROKEN_INPUT"])

if __name__ == "__main__":
    fuzz_child.main()
