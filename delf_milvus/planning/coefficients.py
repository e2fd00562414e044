"""What a plan multiplies with, each with where it is from; and the file that `bench` writes and `plan` reads.

- Every default was measured by the project, is worked out from the widths of the fields, or says that it is assumed.
  `bench` measures most of them anew on the user's machine; what its file lacks stays at the default.
- Times were measured on two cores that client and server shared. "core seconds" are the wall time times these two
  cores: an upper bound.
- Growth was recorded at 100,000, 1M and 10M descriptors on one machine, and at 1M and 5M on another of the same kind,
  with nothing beside it. What was fitted to which of these, and which were held out, is said where a coefficient is
  fitted; `tests/planning` compares with all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delf_milvus.errors import InputError, UsageError, one_line

FORMAT = "delf-milvus coefficients"

_GROWTH = "measured by the project on 2 cores, Milvus 2.3.5: README.md, Benchmarks, growth"
_MERGED = "measured by the project on 2 cores, Milvus 2.3.5: tests/benchmarks/segments.py, between nprobe 8 and 64"
_WRITES = "measured by the project on 2 cores, Milvus 2.3.5: README.md, Benchmarks, tests/benchmarks/moving.py"
_ROUNDS = "assumed by the project: segments are indexed as written, and again when merged"
_LITE = "measured by the project on 2 cores, Milvus Lite 3.2: 1M rows, nprobe 16 and 64 (2.3 s, 2.6 s; 1.45 GB)"
_LITE_PROCESS = "measured by the project, 2026-11-27, Milvus Lite 3.2: delf-milvus list of a collection of four images"
_LITE_ROWS = "measured by the project on 2 cores, Milvus Lite 3.2: README.md, Benchmarks"
_LITE_BENCH = "measured by the project on 2 cores, 2026-11-27, Milvus Lite 3.2: delf-milvus bench, 30,000 rows"
_CPU = "measured by the project, Intel without AMX: tests/benchmarks/README.md, What computes the network"
_GPU = "measured by the project on one NVIDIA H200: tests/benchmarks/README.md, What computes the network"
_COMPARING = "measured by the project on 2 cores: README.md, Benchmarks"
_WORKED_OUT = "worked out: deploy/helm/values.yaml"
_WIDTHS = "worked out: widths of the fields, schemas/images.schema.json"


@dataclass(frozen=True)
class Coefficient:
    """A number to multiply with. unit: of the value. source: who measured or worked it out, and where that is told."""

    value: float
    unit: str
    source: str


Coefficients = Mapping[str, Coefficient]

DEFAULTS: dict[str, Coefficient] = {
    # Base and working memory are fitted to the growth at 100,000, 5M and 10M; 1M is held out. The bytes of a row are
    # not fitted: they are worked out from the fields.
    "memory_base_bytes": Coefficient(375e6, "bytes of a server's process", _GROWTH),
    "memory_working_bytes": Coefficient(300e6, "bytes that loading and searching hold, at most", _GROWTH),
    "memory_room": Coefficient(1.5, "times what is loaded", _WORKED_OUT),
    "primary_key_bytes": Coefficient(16, "bytes a row", _WORKED_OUT),
    "image_text_bytes": Coefficient(300, "bytes an image: id, paths of 50 characters, checksum", _WIDTHS),
    "storage_copies": Coefficient(2, "times what is stored, until what was compacted is collected", _WORKED_OUT),
    # Fitted to 100,000 and 10M; 1M and 5M are held out.
    "disk_base_bytes": Coefficient(354e6, "bytes of a standalone server's folder", _GROWTH),
    "disk_row_bytes": Coefficient(814, "bytes a row of 40 components, logs included", _GROWTH),
    "proxy_memory_bytes": Coefficient(4 * 2**30, "bytes a proxy", _WORKED_OUT),
    "coordinator_memory_bytes": Coefficient(4 * 2**30, "bytes", _WORKED_OUT),
    "streaming_memory_bytes": Coefficient(8 * 2**30, "bytes a streaming node", _WORKED_OUT),
    # A segment: the same rows before and after their segments were merged. The others are fitted to the growth at
    # 100,000 and 10M with 120 neighbours, given that; 1M and 5M are held out.
    "search_neighbour_seconds": Coefficient(0.28e-6, "seconds a neighbour that is returned", _GROWTH),
    "search_neighbour_core_seconds": Coefficient(0.56e-6, "core seconds a neighbour that is returned", _GROWTH),
    "search_segment_seconds": Coefficient(100e-6, "core seconds a query descriptor and segment", _MERGED),
    "search_code_seconds": Coefficient(8.9e-9, "core seconds a code of IVF_PQ that is visited", _GROWTH),
    # Fitted to all, so that the largest of the relative errors is the least: the two machines differ by 1.7x.
    "build_base_seconds": Coefficient(57, "seconds", _GROWTH),
    "build_list_seconds": Coefficient(187e-9, "core seconds a row and list of IVF_PQ", _GROWTH),
    "build_rounds": Coefficient(2, "times, where segments are merged: as written, and merged", _ROUNDS),
    "write_rows_per_second": Coefficient(41_125, "rows a second", _WRITES),
    "bulk_rows_per_second": Coefficient(65_000, "rows a second", _WRITES),
    "lite_memory_base_bytes": Coefficient(233e6, "bytes of the process without torch", _LITE_PROCESS),
    "lite_memory_row_bytes": Coefficient(1270, "bytes a row of 40 components", _LITE),
    "lite_disk_row_bytes": Coefficient(344, "bytes a row of 40 components, index included", _LITE_BENCH),
    "lite_neighbour_seconds": Coefficient(20e-6, "seconds a neighbour that is returned", _LITE_ROWS),
    "lite_code_seconds": Coefficient(6.4e-9, "seconds a code of IVF_SQ8 that is visited", _LITE),
    "lite_write_rows_per_second": Coefficient(9_000, "rows a second", _LITE),
    "compare_seconds": Coefficient(0.054 / (100 * 500 * 500), "core seconds a pair of descriptors", _COMPARING),
    "fetch_seconds": Coefficient(0.038 / (100 * 1000), "seconds a feature of a candidate", _COMPARING),
    "vote_seconds": Coefficient(14e-6, "seconds a query descriptor", _COMPARING),
    # fast: the pyramid has a third of the cells of that of standard.
    "extract_fast_core_seconds": Coefficient(1.24 / 3, "core seconds a photo of 640 x 426", _CPU + " (a third)"),
    "extract_standard_core_seconds": Coefficient(1.24, "core seconds a photo of 640 x 426", _CPU),
    "extract_paper_core_seconds": Coefficient(2.73, "core seconds a photo of 640 x 426", _CPU),
    "gpu_fast_photos_per_second": Coefficient(138, "photos a second from files of many sizes", _GPU),
    "gpu_standard_photos_per_second": Coefficient(80, "photos a second from files of many sizes", _GPU),
    "gpu_paper_photos_per_second": Coefficient(50, "photos a second from files of many sizes", _GPU),
}

_OF_SEARCHES = {
    "search_neighbour_seconds",
    "search_neighbour_core_seconds",
    "search_segment_seconds",
    "search_code_seconds",
    "lite_neighbour_seconds",
    "lite_code_seconds",
}

SEARCHED = {"server": "IVF_PQ", "lite": "IVF_SQ8"}
"""The index whose times the defaults know, by backend."""


class _Measured(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(ge=0, allow_inf_nan=False)
    unit: str
    source: str


class CoefficientFile(BaseModel):
    """What `bench` writes.

    made_at: ISO 8601, UTC. machine: what was measured. coefficients: by the names of DEFAULTS. not_measured: what was
    not, and why. held_out: how far the fitted times are from a measurement that they were not fitted to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = Field(default=FORMAT, pattern=f"^{FORMAT}$")
    version: int = Field(default=1, ge=1, le=1)
    made_at: str
    machine: str
    coefficients: dict[str, _Measured]
    not_measured: list[str] = []
    held_out: list[str] = []

    @classmethod
    def of(cls, measured: Coefficients, **told: Any) -> CoefficientFile:
        """The file with these coefficients."""
        return cls(coefficients={name: _Measured(**asdict(one)) for name, one in measured.items()}, **told)

    def write(self, path: Path) -> None:
        """Write it as JSON; raises InputError where that cannot be written."""
        try:
            path.write_text(json.dumps(self.model_dump(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{one_line(path)} cannot be written: {error.strerror or 'input/output error'}."
            ) from error


def read(path: Path) -> dict[str, Coefficient]:
    """The defaults, with what a file of `bench` has measured instead.

    Raises InputError for a file that cannot be read, UsageError for one that is none of `bench`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror or 'input/output error'}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{one_line(path)} is no file of coefficients: make one with `delf-milvus bench`.") from error
    try:
        file = CoefficientFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{one_line(path)} is no file of coefficients ({one_line(where)}: {one_line(first['msg'])}): make one with "
            "`delf-milvus bench`."
        ) from error
    if unknown := sorted(file.coefficients.keys() - DEFAULTS.keys()):
        raise UsageError(
            f"{one_line(path)} has a coefficient that no plan knows, {one_line(unknown[0])!r}: leave it out."
        )
    measured = {name: Coefficient(one.value, one.unit, one.source) for name, one in file.coefficients.items()}
    for name, one in measured.items():
        # Rates and room are divided by or multiplied with, and no search is free: none of them can be nothing.
        nothing = name.endswith("per_second") or name in _OF_SEARCHES or DEFAULTS[name].unit.startswith("times")
        if one.value == 0 and nothing:
            raise UsageError(
                f"{one_line(path)}: {name} is 0, which nothing takes: measure it again with `delf-milvus bench`."
            )
    return {**DEFAULTS, **measured}
