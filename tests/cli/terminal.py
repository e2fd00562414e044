"""delf-milvus on a terminal of its own, which answers what it is asked."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from test_commands import RUN

CELL = (9, 18)  # pixels


def on_terminal(
    folder: Path,
    *arguments: object,
    columns: int = 100,
    answers: dict[bytes, bytes] | None = None,
    program: Sequence[str] = RUN,
    **environment: str,
) -> tuple[int, bytes]:
    """Run a command whose input, output and errors are one terminal; returns its exit code and what was printed.

    answers: what the terminal says when it is asked. program: instead of delf-milvus.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, columns * CELL[0], 40 * CELL[1]))
    process = subprocess.Popen(
        [*program, *map(str, arguments)],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")},
            **{"DELF_MILVUS_EXTRACT__PRESET": "fast", "TERM": "xterm-256color", **environment},
        },
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    printed = b""
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.1)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                read = os.read(ours, 1 << 16)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not read:
                break
            printed += read
            for question, answer in (answers or {}).items():
                if question in read:
                    os.write(ours, answer)
        return process.wait(timeout=30), printed
    finally:
        process.kill()
        os.close(ours)
