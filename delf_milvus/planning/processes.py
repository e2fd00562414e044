"""What a process of this machine takes in memory, and which one listens on a port: Linux's /proc, nothing elsewhere."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PROC = Path("/proc")
_LISTENING = "0A"


def resident_bytes(pid: int | None = None) -> int | None:
    """Bytes of memory that a process (None: this one) holds; None where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (_PROC / str(pid or "self") / "status").read_text(encoding="utf-8")
        return 1024 * int(text.partition("VmRSS:")[2].split()[0])
    return None


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine; None where there is none that can be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text(encoding="ascii").splitlines()[1:]:
                parts = line.split()
                if parts[3] == _LISTENING and int(parts[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{parts[9]}]")
    if not inodes:
        return None
    for folder in _PROC.glob("[0-9]*"):
        # Processes of others cannot be looked into, and any may end meanwhile.
        with contextlib.suppress(OSError):
            if any(os.readlink(one) in inodes for one in _readable(folder / "fd")):
                return int(folder.name)
    return None


def name_of(pid: int) -> str:
    """The name of a process, of 15 characters at most; "" where it cannot be told."""
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _readable(folder: Path) -> list[Path]:
    return [one for one in folder.iterdir() if one.is_symlink()]
