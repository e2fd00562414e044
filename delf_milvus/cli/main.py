"""The command line's root: global options, the commands, and the one place where errors are told."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from delf_milvus.cli import (
    bench,
    calibrate,
    config,
    data,
    evaluate,
    extract,
    index,
    ingest,
    manage,
    model,
    operate,
    plan,
    reindex,
    search,
    serve,
    train,
)
from delf_milvus.cli.examples import examples_last
from delf_milvus.cli.output import say
from delf_milvus.cli.state import State
from delf_milvus.errors import DelfMilvusError, one_line
from delf_milvus.model.environment import prepare_environment

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the photos that show the same thing, with proof: DELF local features on Milvus.",
    epilog=(
        "Example: delf-milvus ingest photos/\n\n"
        "Example: delf-milvus search query.jpg --out matches/\n\n"
        "Exit codes: 0 done, or a match; 1 no match, some files failed, or fsck found damage; 2 usage; "
        "3 database or Ray cluster unreachable, or a doctor's check failed; "
        "4 collection and model do not fit; 5 unreadable input; 130 interrupted."
    ),
)
app.command("ingest")(ingest.ingest)
app.command("extract")(extract.extract)
app.command("reindex")(reindex.reindex)
app.command("search")(search.search)
app.command("match")(search.match)
app.command("serve")(serve.serve)
app.command("calibrate")(calibrate.calibrate)
for command in (manage.status, manage.list_images, manage.show, manage.delete):
    app.command(command.__name__.removesuffix("_images"))(command)
app.add_typer(index.app, name="index")
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
for command in (operate.doctor, operate.fsck, operate.compact):
    app.command(command.__name__)(command)
app.command("export")(data.export)
app.command("import")(data.import_)
app.add_typer(config.app, name="config")
app.add_typer(evaluate.app, name="eval")
app.add_typer(train.app, name="train")
app.add_typer(model.app, name="model")
examples_last(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"delf-milvus {installed_version('delf-milvus')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    uri: Annotated[
        str | None,
        typer.Option(help="A path ending in .db (embedded) or http(s)://host:port. Default: delf_milvus.db"),
    ] = None,
    token: Annotated[str | None, typer.Option(help="Token, or user:password, of a server.")] = None,
    db: Annotated[str | None, typer.Option(help="Database on the server. Default: the server's own")] = None,
    collection: Annotated[str | None, typer.Option(help="Name of the collection. Default: delf")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose images, in a collection with tenants.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Weight file (.safetensors), or small, which is quicker. Default: bundled")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no remarks on stderr.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log what happens to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    flags = {"uri": uri, "token": token, "collection": collection, "model": model}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    given["store"] = {"db_name": db, "tenant": tenant}
    context.obj = State(given, config, json, quiet, verbose)
    _set_up_logging(quiet, verbose)


def _set_up_logging(quiet: bool, verbose: bool) -> None:
    """Log our own remarks only: what libraries say of damaged photos or of their connection reaches the user as an
    error of ours, or does not matter."""
    logging.basicConfig(level=logging.CRITICAL, format="%(levelname)s: %(message)s")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.getLogger("delf_milvus").setLevel(level)
    warnings.filterwarnings("ignore", module="PIL")


def run() -> None:
    """The console script: every foreseen error becomes one sentence and its exit code."""
    if sys.stderr is None:
        # Closed by the caller: the next file to be opened, perhaps the database, would get what C code prints.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    prepare_environment()
    # A refused certificate is told in our sentence; gRPC's core would print it too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app()
    except DelfMilvusError as error:
        say(f"Error: {one_line(error)}")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    run()
