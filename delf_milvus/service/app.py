"""The ASGI application: the routes behind the door, and every error in one shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from delf_milvus.errors import DatabaseError, DelfMilvusError
from delf_milvus.service.core import Service, log
from delf_milvus.service.door import Door
from delf_milvus.service.problems import RefusedError, refusal_of
from delf_milvus.service.routes import router, sentence_of

_KINDS = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}


def create_app(service: Service) -> FastAPI:
    """The application of a service, for any ASGI server; it must run in the event loop of the service's index."""
    app = FastAPI(
        title="delf-milvus",
        version=service.version,
        summary="Find the photos that show the same thing, with proof.",
        openapi_url="/v1/openapi.json",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(Door, service=service)],
        separate_input_output_schemas=False,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.include_router(router(service))

    def refused(request: Request, refusal: RefusedError) -> Response:
        request.state.visit.kind = refusal.kind
        return refusal.response()

    async def of_ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, DelfMilvusError)
        if isinstance(error, DatabaseError):
            log.error("database", extra={"fields": {"id": request.state.visit.id, "error": str(error)}})
        return refused(request, refusal_of(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = _KINDS.get(error.status_code, "http_error")
        what = {404: "There is nothing at this path.", 405: "This path does not take that method."}
        answer = refused(
            request,
            RefusedError(error.status_code, kind, what.get(error.status_code, f"{str(error.detail).rstrip(chr(46))}.")),
        )
        answer.headers.update(error.headers or {})
        return answer

    async def of_options(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(request, RefusedError(422, "invalid_argument", sentence_of(error.errors())))

    handlers: dict[Any, Any] = {
        DelfMilvusError: of_ours, HTTPException: of_http, RequestValidationError: of_options,
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    return app
