"""`delf-milvus serve`: the HTTP service and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delf_milvus.cli.output import say
from delf_milvus.cli.state import Stages, state_of
from delf_milvus.errors import UsageError


def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1, this machine only")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any. Default: 8080")] = None,
    photos: Annotated[
        list[Path] | None, typer.Option(help="Folder whose stored photos may be shown; again for more. Default: none")
    ] = None,
    uploads: Annotated[
        Path | None, typer.Option(help="Folder that added photos are kept in. Default: they are not kept")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Photos that are computed at once. Default: 1")] = None,
    preset: Annotated[str | None, typer.Option(help="The preset that the collection was made with.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without keys: anybody may search and write.")
    ] = False,
) -> None:
    """Serve searches, photos and a page over HTTP until it is stopped; needs the extra `service`.

    Keys are set as DELF_MILVUS_SERVICE__READ_KEYS and DELF_MILVUS_SERVICE__WRITE_KEYS, or in the settings file. The log
    is JSON lines on stderr.

    Example: delf-milvus serve --photos photos/ --uploads uploads/
    """
    state = state_of(context)
    try:
        from delf_milvus.service.logs import set_up
        from delf_milvus.service.server import serve as run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The service needs {error.name}, which is not installed: run `pip install 'delf-milvus[service]'`."
        ) from error
    import asyncio

    stages: Stages = {
        "service": {
            **{"host": host, "port": port, "photos": photos, "uploads": uploads, "threads": threads},
            "insecure": insecure or None,
        },
        "extract": {"preset": preset},
    }
    settings = state.load(stages).settings
    set_up(state.quiet)

    def listening(address: str) -> None:
        if not state.quiet:
            say(f"delf-milvus serves on {address} (stop it with Ctrl+C)")

    asyncio.run(run(settings, listening))
