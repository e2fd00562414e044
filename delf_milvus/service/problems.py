"""Every answer that is an error: one shape, the status that HTTP has for it, and one sentence that says what to do.

What goes wrong inside (an address of the database, a path) is in the log, under the request's id, and not in answers.
"""

from __future__ import annotations

import math

from starlette.responses import JSONResponse

from delf_milvus.errors import (
    CollectionError,
    DatabaseError,
    DelfMilvusError,
    ImageError,
    ImageFormatError,
    ImageTooLargeError,
    InputError,
    ModelError,
    NotFoundError,
    UsageError,
    one_line,
)

CLIENT_GONE = 499
"""Status in log and metrics of a request whose client left before the answer."""

_STATUS: dict[type[DelfMilvusError], tuple[int, str]] = {
    ImageTooLargeError: (413, "photo_too_large"),
    ImageFormatError: (415, "unsupported_format"),
    ImageError: (422, "damaged_photo"),
    NotFoundError: (404, "not_found"),
    InputError: (422, "invalid_input"),
    UsageError: (422, "invalid_argument"),
    CollectionError: (409, "collection_mismatch"),
    ModelError: (409, "model_mismatch"),
    DatabaseError: (503, "database_unavailable"),
}


class RefusedError(Exception):
    """A request that is answered with an error. retry_after: seconds after which it may be asked again."""

    def __init__(self, status: int, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        error = {"kind": self.kind, "message": self.message}
        return JSONResponse({"error": error}, self.status, headers)


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


def database_unavailable(seconds: float = 5) -> RefusedError:
    """The answer while the database is away. seconds: after which it may be asked again."""
    message = "The database cannot be reached or failed while answering; try again in a moment."
    return RefusedError(503, _STATUS[DatabaseError][1], message, seconds)


def refusal_of(error: DelfMilvusError) -> RefusedError:
    """What a client is told of an error of ours."""
    kind = next(kind for kind in type(error).__mro__ if kind in _STATUS or kind is DelfMilvusError)
    status, name = _STATUS.get(kind, (500, "failed"))
    if status == 503:
        return database_unavailable()
    return RefusedError(status, name, one_line(error))
