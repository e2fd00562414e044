"""What the global options mean, shared by all commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from delf_milvus.index import DelfIndex
    from delf_milvus.settings import LoadedSettings


Stages = dict[str, dict[str, Any]]


@dataclass
class State:
    """The global options of one call."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def load(self, stages: Stages | None = None) -> LoadedSettings:
        """The settings of this call; `stages` are a command's own flags, {"search": {"top": 5}}."""
        from delf_milvus.settings import load

        flags = dict(self.flags)
        for stage, values in (stages or {}).items():
            flags[stage] = {**flags.get(stage, {}), **values}
        return load(flags, self.config)

    def open(self, stages: Stages | None = None, *, create: bool = False, any_model: bool = False) -> DelfIndex:
        """The index that the options name.

        create: whether the collection may be made. any_model: take the collection with whatever model made it.
        """
        from delf_milvus.index import DelfIndex

        settings = self.load(stages).settings
        return DelfIndex.open(settings=settings, create=create, any_model=any_model)


def state_of(context: typer.Context) -> State:
    """The options of the call that `context` belongs to."""
    state = context.find_object(State)
    assert state is not None, "the root callback sets the state"
    return state
