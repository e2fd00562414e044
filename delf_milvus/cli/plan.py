"""`delf-milvus plan`: what a collection of some size will need. No database, no model."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delf_milvus.cli.completion import presets
from delf_milvus.cli.index import one_profile
from delf_milvus.cli.output import data_json, data_line, data_table
from delf_milvus.cli.state import state_of
from delf_milvus.errors import UsageError

if TYPE_CHECKING:
    from delf_milvus.planning.model import Estimate, Plan


def plan(
    context: typer.Context,
    images: Annotated[str, typer.Option(help="Photos: 250000, 250k, 10M, 1.5B.")],
    features: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Stored of a photo. Default: the preset's")
    ] = None,
    indexed: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Of these, in the index. Default: the settings', or all")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, max=32768, help="Components of a descriptor.")] = 40,
    profile: Annotated[str | None, typer.Option(help="auto, FLAT, IVF_PQ, HNSW ... Default: the settings'")] = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=presets, help="fast, standard or paper. Default: the settings'")
    ] = None,
    milvus: Annotated[str, typer.Option(help="Release of the server.")] = "2.6",
    replicas: Annotated[int, typer.Option(min=1, max=1000, help="Copies of what is loaded.")] = 1,
    queries_per_second: Annotated[
        float | None, typer.Option(min=0, help="Searches a second that are wanted of the cluster.")
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="TOML file: query_cores, query_memory_gib, data_cores, extract_cores, gpus ...")
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="What `delf-milvus bench` measured on your machines.")
    ] = None,
) -> None:
    """Estimate memory, disk, machines and time for so many photos, and say where each figure is from.

    nlist, m, nbits, nprobe, neighbours and candidates are those of the settings. A letter after each line names the
    source of its coefficients, listed below.

    Example: delf-milvus plan --images 10M

    Example: delf-milvus plan --images 1.5B --features 300 --queries-per-second 20

    Example: delf-milvus plan --images 1B --indexed 80

    Example: delf-milvus --json plan --images 250k --preset paper --profile HNSW
    """
    from delf_milvus.planning import coefficients as known
    from delf_milvus.planning import hardware as machines
    from delf_milvus.planning.model import PlanRequest, make_plan
    from delf_milvus.planning.units import parse_count
    from delf_milvus.store.profiles import Engine, Wishes

    state = state_of(context)
    settings = state.load({"extract": {"preset": preset}}).settings
    own, extract = settings.store, settings.extract
    release = Engine.of(f"Milvus {milvus}").release
    if not milvus[:1].isdigit() or release == Engine.of("Milvus").release:
        raise UsageError(f"--milvus is a release like 2.6, not {milvus!r}.")
    request = PlanRequest(
        images=parse_count(images),
        features=features or extract.plan.stored_features,
        indexed=indexed or own.indexed_features,
        query_features=extract.plan.query_features,
        dim=dim,
        profile=one_profile(profile) or own.profile,
        wishes=Wishes(own.nlist, own.m, own.nbits),
        nprobe=own.nprobe,
        neighbours=settings.search.neighbours,
        candidates=settings.search.candidates,
        preset=extract.preset,
        release=release,
        replicas=replicas,
        queries_per_second=queries_per_second,
    )
    made = make_plan(
        request,
        machines.read(hardware) if hardware else None,
        known.read(coefficients) if coefficients else known.DEFAULTS,
    )
    if state.json:
        data_json(made.to_dict())
    else:
        _tell(made)


def _tell(plan: Plan) -> None:
    from delf_milvus.planning.units import count_text

    request = plan.request
    data_line(f"{count_text(request.images)} photos, Milvus {'.'.join(map(str, request.release))}")
    sources = list(dict.fromkeys(one.source for one in plan.estimates))
    letters = dict(zip(sources, string.ascii_letters, strict=False))
    data_table(
        ("what", "estimate", "of", "from"),
        ((one.what, _shown(one), one.note or "-", letters[one.source]) for one in plan.estimates),
        shorten=("of",),
    )
    data_line()
    data_table(
        ("what would change", "memory", "storage", "search"),
        ((d.change, _factor(d.memory), _factor(d.storage), _factor(d.search)) for d in plan.drivers),
    )
    shares = sorted(plan.shares.items(), key=lambda share: -share[1])
    data_line("memory of query nodes: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    data_line()
    for source, letter in letters.items():
        data_line(f"{letter}  {source}")


def _shown(one: Estimate) -> str:
    from delf_milvus.planning.units import bytes_text, rounded_text, seconds_text

    if one.value is None:
        return "not measured"
    if one.unit == "bytes":
        return bytes_text(one.value)
    if one.unit == "seconds":
        return seconds_text(one.value)
    return rounded_text(one.value) + ("/s" if one.unit == "per second" else "")


def _factor(value: float | None) -> str:
    return "not measured" if value is None else f"x {value:.2f}"
