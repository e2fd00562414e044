"""The door of the service: every request passes it on its way in, and every answer on its way out.

In order: a request id, a bound on the requests at once, no pages of other sites, rates, keys; then bounds on the size
of the body and on the time it may take, while it comes in. On the way out: headers that keep browsers from guessing, a
line in the log, and the metrics. No error leaves it but in our shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from delf_milvus.service.access import bearer, check_same_site, client_of_key
from delf_milvus.service.core import Service, Visit
from delf_milvus.service.problems import CLIENT_GONE, ClientGoneError, RefusedError

log = logging.getLogger(__name__)

OPEN = frozenset({"/", "/app.js", "/app.css", "/healthz", "/readyz", "/v1/openapi.json"})
"""Paths that say nothing of the collection: they need no key and count to no rate."""

_HEALTH = frozenset({"/healthz", "/readyz"})
_IMAGES = "/v1/images"
_REJECTED = frozenset({401, 403, 408, 413, 429, 503})
_FORM_BYTES = 512 * 1024
_DRAIN_SECONDS = 2.0
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {
    # The page's own files, its photos as blobs, and nothing from anywhere else.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Door:
    """ASGI middleware around the routes of a service."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else "unknown"
        given = headers.get("x-request-id", "")
        visit = Visit(given if _ID.fullmatch(given) else uuid.uuid4().hex, address)
        scope.setdefault("state", {})["visit"] = visit
        body = _Body(self._service, visit, scope, headers, receive)
        answer = _Answer(visit, send)
        self._service.visits += 1
        status = 500
        try:
            self._check(scope, headers, visit)
            _keep_encoded(scope)
            await self._app(scope, body, answer)
            status = answer.status
        except RefusedError as refusal:
            visit.kind, status = refusal.kind, refusal.status
            visit.rejected = status in _REJECTED
            if not answer.started:
                await body.drain()
                await refusal.response()(scope, receive, answer)
        except (ClientGoneError, ClientDisconnect):
            visit.kind, status = "client_gone", CLIENT_GONE
        except asyncio.CancelledError:
            visit.kind, status = "cancelled", CLIENT_GONE
            raise
        except Exception:
            visit.kind = "internal"
            log.exception("request failed", extra={"fields": {"id": visit.id}})
            if not answer.started:
                message = f"The service failed; its log says why, under request id {visit.id}."
                await RefusedError(500, visit.kind, message).response()(scope, receive, answer)
        finally:
            self._service.visits -= 1
            self._service.buffered -= visit.received
            self._tell(scope, visit, status)

    def _check(self, scope: Scope, headers: Headers, visit: Visit) -> None:
        """Refuse who may not ask."""
        service, path, method = self._service, scope["path"], scope["method"]
        if path in _HEALTH:
            return
        if service.visits > service.settings.connections:
            raise RefusedError(503, "too_busy", "Too many requests at once; try again in a moment.", 1)
        if service.stopping:
            raise RefusedError(503, "stopping", "The service is stopping; try again in a moment.", 5)
        check_same_site(headers, service.names, linked=path in OPEN)
        if path in OPEN:
            return
        key = bearer(headers)
        visit.role = service.keys.role(key) if service.keys else "write"
        if visit.role and service.keys:
            visit.client = client_of_key(key)
        service.rate.take(visit.client)
        if visit.role is None:
            what = "is not known" if key else "is missing"
            raise RefusedError(401, "unauthorized", f"The API key {what}; send `Authorization: Bearer KEY`.")
        writes = path.startswith(_IMAGES) and method not in ("GET", "HEAD")
        if writes and visit.role != "write":
            raise RefusedError(403, "forbidden", "This key may search and read, but not add or delete.")

    def _tell(self, scope: Scope, visit: Visit, status: int) -> None:
        seconds = time.perf_counter() - visit.started
        route = getattr(scope.get("route"), "path", "other")
        self._service.meters.request(scope["method"], route, status, seconds)
        if visit.kind:
            self._service.meters.error(visit.kind, rejected=visit.rejected)
        fields = {
            "id": visit.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "waited": round(visit.waited, 4),
            "bytes": visit.received,
            "client": visit.client,
        }
        level = logging.DEBUG if scope["path"] in _HEALTH else logging.INFO
        log.log(level, "request", extra={"fields": fields | ({"error": visit.kind} if visit.kind else {})})


class _Body:
    """The body of a request, as it comes in: counted, bounded, and in time."""

    def __init__(self, service: Service, visit: Visit, scope: Scope, headers: Headers, receive: Receive) -> None:
        self._service = service
        self._visit = visit
        self._receive = receive
        self._deadline = time.monotonic() + service.settings.body_seconds
        self._complete = False
        self._polite = "expect" not in headers
        settings = service.settings
        many = scope["path"] == _IMAGES
        self._most = settings.max_body_bytes if many else settings.max_photo_bytes + _FORM_BYTES
        self._declared = headers.get("content-length", "")

    async def __call__(self) -> Message:
        """The next message. Raises RefusedError: 413, 408, or 503 where memory is short."""
        if self._complete:
            return await self._receive()
        if self._declared.isdecimal() and int(self._declared[:18]) > self._most:
            raise self._too_large()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            self._complete = True
            seconds = self._service.settings.body_seconds
            raise RefusedError(408, "slow_upload", f"The photo did not arrive within {seconds:g} s.") from None
        self._complete = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self._visit.received += size
        self._service.buffered += size
        if self._visit.received > self._most:
            raise self._too_large()
        if self._service.buffered > self._service.settings.buffer_bytes:
            raise RefusedError(503, "too_busy", "Too many uploads at once; try again in a moment.", 2)
        return message

    async def drain(self) -> None:
        """Read on for a moment before a refusal: a client that still sends would not see the answer."""
        if self._complete or not self._polite or self._declared in ("", "0"):
            return
        read = 0

        async def rest() -> None:
            nonlocal read
            while read <= self._most:
                message = await self._receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rest(), _DRAIN_SECONDS)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, "body_too_large", f"The request has more than {self._most:,} bytes; shrink the photo.")


class _Answer:
    """The answer to a request, with the headers of every answer."""

    def __init__(self, visit: Visit, send: Send) -> None:
        self._visit = visit
        self._send = send
        self.started = False
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._visit.id
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


def _keep_encoded(scope: Scope) -> None:
    """Leave ids in paths encoded, so that `a%2Fphoto` is an id with a slash, and `a/photo` the photo of `a`."""
    raw = scope.get("raw_path")
    if raw and scope["path"].startswith(_IMAGES + "/"):
        scope["path"] = raw.decode("ascii", "replace")
