"""The machines that a plan counts with: a small TOML file, or the sizes of deploy/helm."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delf_milvus.errors import InputError, UsageError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GIB = 2**30


class Hardware(BaseModel):
    """Machines. Memory is what a container may use, in GiB; cores are those of one machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    query_cores: int = Field(default=8, ge=1, le=4096, description="Cores of a query node, or of the one server.")
    query_memory_gib: float = Field(
        default=32, ge=1, le=65536, allow_inf_nan=False, description="Memory of a query node."
    )
    data_cores: int = Field(default=8, ge=1, le=4096, description="Cores of a data node, which builds indexes.")
    build_hours: float = Field(
        default=24, gt=0, allow_inf_nan=False, description="Hours that building the whole index may take."
    )
    extract_cores: int = Field(default=16, ge=1, le=1_000_000, description="Cores that extract photos, all together.")
    gpus: int = Field(default=1, ge=1, le=100_000, description="GPUs that extract photos.")


def read(path: Path) -> Hardware:
    """Hardware of a TOML file; what it leaves out stays at the default.

    Raises InputError for a file that cannot be read, UsageError for one that makes no sense.
    """
    try:
        return Hardware.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror or 'input/output error'}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        problem = f"there is none; known are {', '.join(Hardware.model_fields)}"
        raise UsageError(
            f"{one_line(path)}: {one_line(name)}: {problem if first['type'] == 'extra_forbidden' else first['msg']}."
        ) from error
    except ValueError as error:
        raise UsageError(f"{one_line(path)} is no TOML file: {one_line(error)}.") from error
