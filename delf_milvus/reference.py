"""The reference pages of the command line and of the settings, written from the code itself.

`python -m delf_milvus.schemas FOLDER` writes them beside the schemas, as `commands.md` and `settings.md`. The commands
are read from what Typer was given, and not from what it makes of it, which differs from release to release.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo, OptionInfo
from typer.utils import get_params_from_function

from delf_milvus import errors
from delf_milvus.cli.main import app
from delf_milvus.settings import PRESETS, Settings

PROGRAM = "delf-milvus"

_KINDS = {bool: "flag", int: "integer", float: "number", str: "text", Path: "path", SecretStr: "text, secret"}

REASONS = {
    "uri": "a file needs no server",
    "model": "comes with the package",
    "decode.max_pixels": "300 MB as decoded",
    "extract.preset": "measured: 0.002 mAP less than `paper` on UKBench, for half of the work",
    "extract.precision": "bf16 is slower than fp32 where the processor has no instructions for it",
    "extract.selection": "which of the two retrieves better differs between models",
    "store.consistency": "a program sees what it wrote, at no wait for others",
    "store.profile": "below 100,000 descriptors comparing with all of them is as fast, and exact",
    "store.nlist": "about the square root of the rows of one segment balances its two steps",
    "store.m": "measured: two components a sub-vector lose nothing that can be told",
    "store.nbits": "codes of more bits are accepted by servers, and then never built",
    "store.nprobe": "measured: loses nothing that can be told against exact search",
    "store.indexed_features": "measured: fewer lose accuracy",
    "store.indexed_choice": "measured: the best scores lose 1.7 times as much on places",
    "store.retry_seconds": "longer than a small standalone server takes to start",
    "store.batch_bytes": "far below the largest message",
    "store.bulk_from": "an import waits some ten seconds, in which that many rows go by upserts",
    "ingest.on_error": "one damaged photo should not end a night's work; the exit code tells of it",
    "ingest.engine": "needs no cluster",
    "ingest.decode_threads": "decoding takes a few per cent of a CPU network's time, and most of a GPU's",
    "ingest.queue": "enough to bridge a slow photo",
    "search.candidates": "measured: 200 add 0.004 to 0.005 mAP on places, for twice the work",
    "search.neighbours": "measured: 240 add 0.006 to 0.008 mAP on places, and 1.2 s a query to the embedded database",
    "search.mode": "quantised neighbours miss matches that a comparison with all finds",
    "search.parts": "six times the work, and one more chance for a wrong answer each",
    "search.turned": "four times the work, and one more chance for a wrong answer each",
    "search.expand": "measured: twice the time, for 0.007 to 0.016 mAP on places",
    "search.inlier_weight": "measured: 0.25 is worse on places, 1.5 on objects",
    "search.global_weight": "measured: 0.15 and 1 are worse on places",
    "search.similar_images": "measured: 100 are worse on places, 3000 no better",
    "verify.max_false_alarm": "one query without a match in a hundred is answered by mistake",
    "service.breaker_failures": "one may be chance, and with each a client waits in vain",
    "service.breaker_seconds": "shorter than a small standalone server takes to start",
}
"""Why a default is what it is, by the setting's dotted name, for those where something can be said."""


def write(folder: Path) -> list[Path]:
    """Write both pages into a folder, which must exist; returns their paths."""
    paths = []
    for name, text in (("commands.md", commands()), ("settings.md", settings())):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command as it is typed.

    names: of an option; none for an argument. value: what it takes, "flag" for one that takes nothing. default: as
    text, "required", or "" where there is none.
    """

    names: tuple[str, ...]
    value: str
    default: str
    help: str


@dataclass(frozen=True)
class Command:
    """One command: its words after the program's name, its help text and what it takes."""

    words: tuple[str, ...]
    help: str
    parameters: tuple[Parameter, ...]


def walk(group: typer.Typer = app, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """Every command of a Typer app, in the order of its help."""
    for info in group.registered_commands:
        callback = info.callback
        assert callback is not None
        name = info.name or callback.__name__.replace("_", "-")
        # The help ends with the examples, which the command line keeps apart.
        text = "\n\n".join(part for part in (info.help or callback.__doc__, info.epilog) if part)
        yield Command((*words, name), inspect.cleandoc(text), parameters(callback))
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        assert inner.name is not None
        yield from walk(inner.typer_instance, (*words, inner.name))


def parameters(callback: Any) -> tuple[Parameter, ...]:
    """What a command's function takes from the command line."""
    found = []
    for meta in get_params_from_function(callback).values():
        info = meta.default
        if isinstance(info, OptionInfo):
            names = info.param_decls or (f"--{meta.name.replace('_', '-')}",)
        elif isinstance(info, ArgumentInfo):
            names = ()
        elif meta.annotation is typer.Context:
            continue
        else:
            # A plain parameter is an option without a help text.
            info, names = OptionInfo(default=info), (f"--{meta.name.replace('_', '-')}",)
        text, _, said = (info.help or "").partition(" Default: ")
        default = info.default
        if default is ... or default is inspect.Parameter.empty:
            shown = "required"
        elif said or default in (None, False, ""):
            shown = said
        else:
            shown = str(default)
        names = tuple(one for name in names for one in name.split("/"))
        value = info.metavar or _span(_kind(meta.annotation), info.min, info.max)
        found.append(Parameter(names, value, shown, text))
    return tuple(found)


def commands() -> str:
    """The page of the command line."""
    callback = app.registered_callback
    assert callback is not None
    lines = [
        "# Command line",
        "",
        f"{app.info.help} Written from the code by `make schemas`.",
        "",
        "```text",
        f"{PROGRAM} [GLOBAL OPTIONS] COMMAND [OPTIONS] [ARGUMENTS]",
        "```",
        "",
        "stdout is data, stderr is progress and remarks; with `--json` stdout is one JSON object. An option that has a "
        "setting of its name takes its default from the [settings](settings.md).",
        "",
        "## Global options",
        "",
        *_table(parameters(callback.callback)),
        "",
        "## Exit codes",
        "",
        *_exit_codes(),
    ]
    for command in walk():
        arguments = [parameter.value for parameter in command.parameters if not parameter.names]
        options = ["[OPTIONS]"] if any(parameter.names for parameter in command.parameters) else []
        name = " ".join((PROGRAM, *command.words))
        prose, examples = _examples(command.help)
        lines += ["", f"## {name}", "", "```text", " ".join((name, *options, *arguments)), "```", "", *prose]
        if command.parameters:
            lines += ["", *_table(command.parameters)]
        if examples:
            lines += ["", "```text", *examples, "```"]
    return "\n".join(lines) + "\n"


def settings() -> str:
    """The page of the settings."""
    lines = [
        "# Settings",
        "",
        "Every setting of the command line and of `Settings` in Python. Written from the code by `make schemas`.",
        "",
        "A value comes from, in falling order: a flag, the environment, `.env`, a TOML file (`--config FILE`, or "
        "`delf_milvus.toml` in the current folder), the default here; `delf-milvus config show` says which. In TOML a "
        'group is a table: `[search]`, `top = 5`. Python programs give `Settings(search={"top": 5})`, and read no '
        "other source unless they call `delf_milvus.settings.load`. Figures are from "
        "[tests/benchmarks](../tests/benchmarks/README.md).",
        "",
        "## Presets",
        "",
        "What `extract.preset` stands for. Each part can be set on its own.",
        "",
        "| preset | longest_side, pixels | scales | stored_features | query_features |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{name}` | {plan.longest_side} | {', '.join(f'{scale:g}' for scale in plan.scales)} | "
        f"{plan.stored_features} | {plan.query_features} |"
        for name, plan in PRESETS.items()
    ]
    groups: dict[str, tuple[type[BaseModel], list[tuple[str, FieldInfo]]]] = {}
    for group, model, name, field in _fields(Settings):
        groups.setdefault(group, (model, []))[1].append((name, field))
    for group, (model, fields) in groups.items():
        about = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ") if group else ""
        lines += ["", f"## {group or 'At the top'}", ""]
        lines += [about, ""] if about else []
        lines += ["| setting, environment variable | value | default | what | why this default |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for name, field in fields:
            dotted = f"{group}.{name}" if group else name
            variable = f"DELF_MILVUS_{dotted.replace('.', '__').upper()}"
            cells = (
                f"`{dotted}`<br>`{variable}`",
                _field_kind(field),
                _default(field),
                field.description or "",
                REASONS.get(dotted, ""),
            )
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _fields(model: type[BaseModel], group: str = "") -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """(group, its model, name, field) of every setting, a group's own before those of the groups in it."""
    inner = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((f"{group}.{name}" if group else name, kind))
        else:
            yield group, model, name, field
    for name, kind in inner:
        yield from _fields(kind, name)


def _field_kind(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "`true`, `false`"
    low: list[tuple[str, object]] = []
    high: list[tuple[str, object]] = []
    for limit in field.metadata:
        if isinstance(limit, Ge):
            low.append(("at least", limit.ge))
        elif isinstance(limit, Gt):
            low.append(("above", limit.gt))
        elif isinstance(limit, Le):
            high.append(("at most", limit.le))
        elif isinstance(limit, Lt):
            high.append(("below", limit.lt))
    return ", ".join([_kind(field.annotation), *(f"{word} {_number(value)}" for word, value in low + high)])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined, "every setting has a default"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value in (None, "") or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_number(value)}`"


def _number(value: object) -> str:
    """Whole numbers with all their digits."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _kind(annotation: Any) -> str:
    """A type in words."""
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if origin in (list, tuple):
        return f"{_kind(inner[0])}, several"
    if origin is dict:
        return f"table of {_kind(inner[1])}"
    raise TypeError(f"no words for {annotation}")


def _span(kind: str, low: float | None, high: float | None) -> str:
    limits = [f"{word} {_number(value)}" for word, value in (("at least", low), ("at most", high)) if value is not None]
    return ", ".join([kind, *limits])


def _examples(text: str) -> tuple[list[str], list[str]]:
    """The paragraphs of a help text, and the commands of its `Example:` lines."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in text.split("\n\n"):
        line = paragraph.replace("\n", " ")
        if line.startswith("Example: "):
            examples.append(line.removeprefix("Example: "))
        else:
            prose += ["", line] if prose else [line]
    return prose, examples


def _table(found: Iterable[Parameter]) -> Iterator[str]:
    yield "| argument or option | value | default | what |"
    yield "| --- | --- | --- | --- |"
    for parameter in found:
        name = ", ".join(f"`{name}`" for name in parameter.names) or f"`{parameter.value}`"
        yield _row((name, parameter.value if parameter.names else "", parameter.default, parameter.help))


def _exit_codes() -> Iterator[str]:
    """The codes that the program's own help names, and the exceptions of Python programs that stand for them."""
    raised: dict[int, list[str]] = {}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.DelfMilvusError):
            raised.setdefault(kind.exit_code, []).append(f"`{name}`")
    yield "| code | meaning | exceptions in Python |"
    yield "| --- | --- | --- |"
    found = re.search(r"Exit codes: ([^.]*)\.", str(app.info.epilog))
    assert found, "the program's help names its exit codes"
    for part in " ".join(found[1].split()).split("; "):
        code, _, meaning = part.partition(" ")
        yield _row((code, meaning, ", ".join(raised.get(int(code), []))))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
