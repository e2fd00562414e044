"""The command line with a witness: `python watched_tool.py NOTES MOMENT ARGUMENT...` runs `delf-milvus ARGUMENT...`.

NOTES gets a line, a time and an event, whenever a call that changes the database begins ("in insert features") or has
been answered ("after insert features"), and for each step with the files of an export ("rename images"). Nothing else
is changed: the calls go to the real database.

MOMENT is "", or JSON: {"event": "after insert features", "occurrence": 2, "seconds": 0.01}. So long after the event was
noted for the so many-th time, counted from 0, the process ends itself by SIGKILL, in which nothing is cleaned up.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

CHANGES = (
    "CreateCollection",
    "DropCollection",
    "AlterCollection",
    "LoadCollection",
    "ReleaseCollection",
    "CreateIndex",
    "DropIndex",
    "Insert",
    "Upsert",
    "Delete",
    "Flush",
    "CreateAlias",
    "AlterAlias",
    "DropAlias",
)
_EXPORTED = re.compile(r"\.?(?P<kind>images|features|manifest)[-\d]*\.(parquet|json)(?P<partial>\.partial)?")


class Witness:
    """Notes events, and kills the process at the moment that was asked for."""

    def __init__(self, notes: str, moment: str) -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._moment = json.loads(moment) if moment else {}
        self._left = int(self._moment.get("occurrence", 0))
        self._guard = threading.Lock()

    def note(self, event: str) -> None:
        """Write the event down; it may be the last one."""
        with self._guard:
            os.write(self._notes, f"{time.monotonic():.6f} {event}\n".encode())
            if event != self._moment.get("event"):
                return
            self._left -= 1
            if self._left != -1:
                return
        seconds = float(self._moment["seconds"])
        if not seconds:
            _kill()
        timer = threading.Timer(seconds, _kill)
        timer.daemon = True
        timer.start()

    def watch_database(self) -> None:
        """Note the calls of every client that this process will open."""
        from pymilvus.grpc_gen import milvus_pb2_grpc

        stub = milvus_pb2_grpc.MilvusServiceStub
        make = stub.__init__

        def made(self_: Any, channel: Any) -> None:
            make(self_, channel)
            for name in CHANGES:
                setattr(self_, name, _Call(getattr(self_, name), _words(name), self.note))

        stub.__init__ = made

    def watch_files(self, folder: str) -> None:
        """Note what this process does to the files of an export into that folder."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.remove") or not isinstance(arguments[0], str | os.PathLike):
                return
            parent, name = os.path.split(os.fspath(arguments[0]))
            if parent == folder and (found := _EXPORTED.fullmatch(name)):
                partial = "partial " if found["partial"] else ""
                self.note(f"{event.removeprefix('os.')} {partial}{found['kind']}")

        sys.addaudithook(hook)


class _Call:
    """A method of the stub that notes when it begins and when it has been answered."""

    def __init__(self, call: Any, name: str, note: Callable[[str], None]) -> None:
        self._call = call
        self._name = name
        self._note = note

    def __call__(self, request: Any, *arguments: Any, **options: Any) -> Any:
        what = f"{self._name}{_kind(request)}"
        self._note(f"in {what}")
        answer = self._call(request, *arguments, **options)
        self._note(f"after {what}")
        return answer

    def future(self, request: Any, *arguments: Any, **options: Any) -> Any:
        what = f"{self._name}{_kind(request)}"
        self._note(f"in {what}")
        answer = self._call.future(request, *arguments, **options)
        answer.add_done_callback(lambda _: self._note(f"after {what}"))
        return answer


def _kind(request: Any) -> str:
    # An alias is told apart by its own name, not by what it stands for.
    own = getattr(request, "alias", "") or getattr(request, "collection_name", "")
    names = [own, *getattr(request, "collection_names", ())]
    kinds = (kind for kind in ("features", "images", "current") for name in names if name.endswith(f"_{kind}"))
    return f" {found}" if (found := next(kinds, "")) else ""


def _words(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r" \1", name).lower()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the command line under a witness."""
    from delf_milvus.cli.main import run

    notes, moment, *arguments = sys.argv[1:]
    witness = Witness(notes, moment)
    witness.watch_database()
    if "export" in arguments:
        witness.watch_files(arguments[-1])
    sys.argv = ["delf-milvus", *arguments]
    run()


if __name__ == "__main__":
    main()
