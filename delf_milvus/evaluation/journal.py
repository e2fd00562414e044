"""Results of single queries, kept on disk as they come: a run that ended early goes on where it was.

A line is one JSON object with a `key`, which says what the result depends on, and the result. Lines are only added,
each by one write. A last line that was cut off by a crash does not count, and is removed by the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from delf_milvus.errors import InputError, one_line


def digest_of(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def size_of(path: Path) -> int:
    """Bytes of a photo: what of it a result's key depends on. Raises InputError."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror or 'input/output error'}.") from error


class Journal:
    """The results in one file; a context manager.

    Raises InputError for a file that cannot be read or written, or has a line, before its last, that is no result.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        try:
            self._file.seek(0)
            data = self._file.read()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                self._file.truncate(end)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        for line, content in enumerate(data[:end].splitlines(), 1):
            self._take(line, content)

    def _take(self, line: int, content: bytes) -> None:
        try:
            result = json.loads(content)
            self._results[result["key"]] = result
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{one_line(self._path)}, line {line}, is no result of an evaluation; remove the line, or the file."
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The latest result of a key."""
        return self._results.get(key)

    def add(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep a result. Raises InputError when it cannot be written."""
        result = {"key": key, **values}
        try:
            self._file.write(json.dumps(result, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._results[key] = result

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{one_line(path)} cannot be written: {error.strerror or 'input/output error'}.")
