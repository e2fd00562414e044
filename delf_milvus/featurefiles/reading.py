"""The process that reads `.h5` files for this one: started with the first question, ended where it does not answer.

It is asked one question at a time, from any thread. One that it does not answer in time, or dies of, is a damaged file;
the next question starts it anew. It ends with this process, whose end closes its stdin.
"""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy.typing as npt

from delf_milvus import errors
from delf_milvus.errors import DelfMilvusError, InputError
from delf_milvus.featurefiles import npz
from delf_milvus.featurefiles.arrays import damaged
from delf_milvus.featurefiles.hdf5 import ARRAYS, library

SECONDS = 60.0
"""In which a question must be answered: the largest photo that is read takes one or two."""


class _Reader:
    """A process, and the pipes to it. Belongs to the process that started it: a fork starts its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "delf_milvus.featurefiles.hdf5"]
        # A package that was put on the path of this process alone is found there too.
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.owner = os.getpid()
        self._process = subprocess.Popen(  # noqa: S603 - this Python, with a module of ours
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._buffer = b""

    def ask(self, question: list[str]) -> tuple[dict[str, Any], bytes]:
        """The head and the body of an answer. Raises OSError where it dies, TimeoutError where it is silent."""
        assert self._process.stdin is not None
        until = time.monotonic() + SECONDS
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        while b"\n" not in self._buffer:
            self._read(until)
        line, _, self._buffer = self._buffer.partition(b"\n")
        head: dict[str, Any] = json.loads(line)
        pieces = io.BytesIO()
        pieces.write(self._buffer)
        while pieces.tell() < head["bytes"]:
            self._buffer = b""
            self._read(until)
            pieces.write(self._buffer)
        self._buffer = b""
        return head, pieces.getvalue()

    def _read(self, until: float) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(self._process.stdout.fileno(), 1 << 20)
        if not piece:
            raise BrokenPipeError
        self._buffer += piece

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


_lock = threading.Lock()
_reader: _Reader | None = None


def names(path: Path) -> list[str]:
    """The photos that a file has features of, sorted. Raises InputError."""
    found: list[str] = _answer(path, "", "names")[0]["names"]
    return found


def arrays(path: Path, name: str) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """The arrays of one photo as they are stored, by name, and who made the features of the file, "" where it does not
    say. Raises InputError, NotFoundError for a photo that the file does not have."""
    source = f"{path}#{name}"
    head, body = _answer(path, name, "arrays")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        entries = {entry.removesuffix(".npy") for entry in archive.namelist()}
        return {key: npz.array(archive, key, source) for key in ARRAYS if key in entries}, head["extractor"]


def extractor(path: Path) -> str:
    """Who made the features of a file, "" where it does not say. Raises InputError."""
    found: str = _answer(path, "", "extractor")[0]["extractor"]
    return found


def _answer(path: Path, name: str, kind: str) -> tuple[dict[str, Any], bytes]:
    global _reader  # noqa: PLW0603 - one for the whole process, as starting it takes longer than most answers
    # Without the library, say so before any process is started.
    library()
    with _lock:
        if _reader is None or _reader.owner != os.getpid():
            _reader = _Reader()
        try:
            head, body = _reader.ask([os.path.abspath(path), name, kind])
        except BaseException as error:
            # Whatever interrupted it, the rest of that answer must not be taken for the next one.
            _reader.end()
            _reader = None
            if isinstance(error, TimeoutError):
                damaged(str(path), f"it is damaged: the HDF5 library did not read it within {SECONDS:g} s", error)
            if isinstance(error, OSError):
                damaged(str(path), "it is damaged: the HDF5 library crashed when it read it", error)
            raise
    if "error" in head:
        kind_of_error: type[DelfMilvusError] = getattr(errors, head["error"], InputError)
        raise kind_of_error(head["message"])
    return head, body
