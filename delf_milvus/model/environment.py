"""What the libraries of the network read from the environment, once, when they are loaded."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    """Set it for a process that is ours alone, before torch is loaded; what is set already stays."""
    # oneDNN compiles its kernels for each size of photo and keeps 1024 of them, which is some 20 sizes: folders with
    # more would compile anew for every photo.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    # Threads that wait by spinning starve the ones that decode and write, tenfold where other programs run too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
