"""Clients of a running service (`delf-milvus serve`), for programs: the same results as of an index, over HTTP.

`DelfClient` waits, `AsyncDelfClient` is for an event loop; both need the extra `client` or `service`. A request that
the service is too busy for (429, 503) is sent again when it says so, as far as `patience` allows: searching changes
nothing, and adding or deleting twice is as good as once.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import PIL.Image

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
    ServiceError,
    UsageError,
    one_line,
)
from delf_milvus.features import Box
from delf_milvus.imaging.decode import Source, read_file
from delf_milvus.retrieval.answers import Correspondence, Hit, SearchResult
from delf_milvus.retrieval.search import Timings
from delf_milvus.store.filters import Filter
from delf_milvus.store.records import RECORD_FIELDS, ImageRecord

if TYPE_CHECKING:
    import httpx

_ERRORS: dict[str, type[DelfMilvusError]] = {
    "photo_too_large": ImageTooLargeError,
    "unsupported_format": ImageFormatError,
    "damaged_photo": ImageError,
    "not_found": NotFoundError,
    "invalid_input": InputError,
    "invalid_argument": UsageError,
    "collection_mismatch": CollectionError,
    "model_mismatch": ModelError,
    "database_unavailable": DatabaseError,
}
_BUSY = (429, 503)
_MOST_BYTES = 1_000_000_000


@dataclass(frozen=True)
class ImagePage:
    """Stored images in order of their ids. next: the `after` of the next page, None on the last one."""

    images: list[ImageRecord]
    next: str | None


@dataclass(frozen=True)
class _Call:
    """One request, and what its answer is made into."""

    method: str
    path: str
    made: Callable[[Any], Any]
    params: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


class _Client:
    """What both clients share: what is sent, and what becomes of the answers."""

    def __init__(self, url: str, api_key: str, patience: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address of a service: give http://host:port or https://host.")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience = patience

    def _search_call(
        self,
        image: Source,
        top_k: int | None,
        box: Box | None,
        filter: Filter,
        include_unverified: bool,
        max_false_alarm: float | None,
        parts: bool | None,
        turned: bool | None,
        correspondences: bool,
    ) -> _Call:
        options = {
            "top": top_k,
            "box": None if box is None else ",".join(repr(float(number)) for number in box),
            "filter": filter if isinstance(filter, str) else json.dumps(dict(filter)),
            "verified_only": not include_unverified,
            "max_false_alarm": max_false_alarm,
            "parts": parts,
            "turned": turned,
            "correspondences": correspondences,
        }
        name = str(image) if isinstance(image, str | Path) else ""
        return _Call("POST", "/v1/search", lambda answer: _result(answer, name), _params(options), _encoded(image))

    def _add_call(self, image: Source, image_id: str, metadata: Mapping[str, Any] | None, replace: bool) -> _Call:
        options = {"id": image_id, "metadata": json.dumps(dict(metadata or {})), "replace": replace}
        return _Call(
            "POST", "/v1/images", lambda answer: int(answer["stored"][0]["features"]), _params(options), _encoded(image)
        )

    def _list_call(self, prefix: str, limit: int, after: str, filter: Filter) -> _Call:
        text = filter if isinstance(filter, str) else json.dumps(dict(filter))
        options = {"prefix": prefix, "limit": limit, "after": after, "filter": text}
        return _Call(
            "GET",
            "/v1/images",
            lambda answer: ImagePage([_record(one) for one in answer["images"]], answer["next"]),
            _params(options),
        )

    def _answered(self, call: _Call, response: httpx.Response) -> Any:
        """What an answer says; raises the error that it is."""
        if response.is_success:
            return call.made(response.json())
        raise _error(response)

    def _wait(self, response: httpx.Response, until: float) -> float | None:
        """Seconds after which to ask again, None for never."""
        if response.status_code not in _BUSY:
            return None
        try:
            seconds = max(0.1, float(response.headers.get("retry-after", "1")))
        except ValueError:
            seconds = 1.0
        return seconds if time.monotonic() + seconds <= until else None


class DelfClient(_Client):
    """A service, for programs without an event loop; safe to use from several threads. A context manager.

    url: of the service. api_key: where it asks for one. timeout: seconds for one answer. patience: seconds that a
    request is repeated while the service is too busy; 0: not at all.

    Errors are those of an index where it has one for the situation (ImageError, NotFoundError, UsageError,
    CollectionError, DatabaseError ...), else ServiceError, as for keys that do not allow it and for no answer at all.
    """

    def __init__(self, url: str, api_key: str = "", *, timeout: float = 90.0, patience: float = 60.0) -> None:
        super().__init__(url, api_key, patience)
        self._http = _httpx().Client(base_url=self._url, headers=self._headers, timeout=timeout)

    def search(
        self,
        image: Source,
        top_k: int | None = None,
        *,
        box: Box | None = None,
        filter: Filter = "",
        include_unverified: bool = False,
        max_false_alarm: float | None = None,
        parts: bool | None = None,
        turned: bool | None = None,
        correspondences: bool = False,
    ) -> SearchResult:
        """Find the stored images that show the same thing as a photo: arguments and result as of `DelfIndex.search`.

        max_false_alarm, parts, turned: instead of the service's settings. correspondences: fetch the inliers of each
        hit too; without, `hit.correspondence` is empty.
        """
        call = self._search_call(
            image, top_k, box, filter, include_unverified, max_false_alarm, parts, turned, correspondences
        )
        result: SearchResult = self._asked(call)
        return result

    def add(
        self, image: Source, image_id: str, metadata: Mapping[str, Any] | None = None, *, replace: bool = True
    ) -> int:
        """Store one photo; returns its number of features. replace=False: ServiceError (409) for a stored id."""
        count: int = self._asked(self._add_call(image, image_id, metadata, replace))
        return count

    def delete(self, image_ids: Sequence[str]) -> list[str]:
        """Delete images; returns the ids that were there."""
        deleted = []
        for image_id in image_ids:
            try:
                deleted += self._asked(_Call("DELETE", _image_path(image_id), lambda answer: answer["deleted"]))
            except NotFoundError:  # noqa: PERF203 - a request takes far longer
                continue
        return deleted

    def list(self, prefix: str = "", limit: int = 50, *, after: str = "", filter: Filter = "") -> ImagePage:
        """A page of the stored images whose id starts with `prefix`; the next one with `after=page.next`."""
        page: ImagePage = self._asked(self._list_call(prefix, limit, after, filter))
        return page

    def show(self, image_id: str) -> ImageRecord:
        """What is stored of one image; raises NotFoundError."""
        record: ImageRecord = self._asked(_Call("GET", _image_path(image_id), _record))
        return record

    def status(self) -> dict[str, Any]:
        """`store`: as of `DelfIndex.status`; `service`: the service itself."""
        found: dict[str, Any] = self._asked(_Call("GET", "/v1/status", dict))
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> DelfClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, call: _Call) -> Any:
        until = time.monotonic() + self._patience
        while True:
            try:
                response = self._http.request(call.method, call.path, params=call.params, content=call.content)
            except _httpx().HTTPError as error:
                raise _unreachable(self._url, error) from error
            try:
                return self._answered(call, response)
            except DelfMilvusError:
                seconds = self._wait(response, until)
                if seconds is None:
                    raise
            time.sleep(seconds)


class AsyncDelfClient(_Client):
    """A service, for an event loop: methods, results and errors as of `DelfClient`, awaited."""

    def __init__(self, url: str, api_key: str = "", *, timeout: float = 90.0, patience: float = 60.0) -> None:
        super().__init__(url, api_key, patience)
        self._http = _httpx().AsyncClient(base_url=self._url, headers=self._headers, timeout=timeout)

    async def search(
        self,
        image: Source,
        top_k: int | None = None,
        *,
        box: Box | None = None,
        filter: Filter = "",
        include_unverified: bool = False,
        max_false_alarm: float | None = None,
        parts: bool | None = None,
        turned: bool | None = None,
        correspondences: bool = False,
    ) -> SearchResult:
        """As `DelfClient.search`."""
        call = self._search_call(
            image, top_k, box, filter, include_unverified, max_false_alarm, parts, turned, correspondences
        )
        result: SearchResult = await self._asked(call)
        return result

    async def add(
        self, image: Source, image_id: str, metadata: Mapping[str, Any] | None = None, *, replace: bool = True
    ) -> int:
        """As `DelfClient.add`."""
        count: int = await self._asked(self._add_call(image, image_id, metadata, replace))
        return count

    async def delete(self, image_ids: Sequence[str]) -> list[str]:
        """As `DelfClient.delete`."""
        deleted = []
        for image_id in image_ids:
            try:
                deleted += await self._asked(_Call("DELETE", _image_path(image_id), lambda answer: answer["deleted"]))
            except NotFoundError:  # noqa: PERF203 - a request takes far longer
                continue
        return deleted

    async def list(self, prefix: str = "", limit: int = 50, *, after: str = "", filter: Filter = "") -> ImagePage:
        """As `DelfClient.list`."""
        page: ImagePage = await self._asked(self._list_call(prefix, limit, after, filter))
        return page

    async def show(self, image_id: str) -> ImageRecord:
        """As `DelfClient.show`."""
        record: ImageRecord = await self._asked(_Call("GET", _image_path(image_id), _record))
        return record

    async def status(self) -> dict[str, Any]:
        """As `DelfClient.status`."""
        found: dict[str, Any] = await self._asked(_Call("GET", "/v1/status", dict))
        return found

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncDelfClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _asked(self, call: _Call) -> Any:
        import asyncio

        until = time.monotonic() + self._patience
        while True:
            try:
                response = await self._http.request(call.method, call.path, params=call.params, content=call.content)
            except _httpx().HTTPError as error:
                raise _unreachable(self._url, error) from error
            try:
                return self._answered(call, response)
            except DelfMilvusError:
                seconds = self._wait(response, until)
                if seconds is None:
                    raise
            await asyncio.sleep(seconds)


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise UsageError("A client of a service needs httpx: run `pip install 'delf-milvus[client]'`.") from error
    return httpx


def _params(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as query parameters; what is not given is left out."""
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}
    return {name: text for name, text in texts.items() if options[name] is not None and text}


def _image_path(image_id: str) -> str:
    return f"/v1/images/{quote(image_id, safe='')}"


def _encoded(image: Source) -> bytes:
    """A photo as the bytes of a file: as they are, or as PNG. Raises InputError."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return read_file(Path(image), _MOST_BYTES, "shrink it")
    stream = io.BytesIO()
    try:
        picture = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
        picture.save(stream, "PNG")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ImageError("This is no picture that can be sent; give a path, bytes or an RGB array.") from error
    return stream.getvalue()


def _result(answer: Mapping[str, Any], name: str) -> SearchResult:
    return SearchResult(
        query=name,
        model=answer["model"],
        matched=answer["matched"],
        hits=[_hit(one) for one in answer["hits"]],
        timings=Timings(**answer["timings"]),
        query_features=answer["query_features"],
        calibrated=answer["calibrated"],
    )


def _hit(answer: Mapping[str, Any]) -> Hit:
    points = answer["correspondence"] or {"query_points": [], "image_points": [], "residuals": []}
    inliers = Correspondence(
        np.array(points["query_points"], np.float32).reshape(-1, 2),
        np.array(points["image_points"], np.float32).reshape(-1, 2),
        np.array(points["residuals"], np.float32),
    )
    boxes = {one: tuple(answer[one]) if answer[one] else None for one in ("box", "query_box")}
    return Hit(**{**answer, **boxes, "correspondence": inliers})


def _record(answer: Mapping[str, Any]) -> ImageRecord:
    return ImageRecord(**{one: answer[one] for one in RECORD_FIELDS}, metadata=answer["metadata"])


def _error(response: httpx.Response) -> DelfMilvusError:
    """The error that an answer is."""
    try:
        problem = response.json()["error"]
        kind, message = str(problem["kind"]), one_line(problem["message"])
    except (ValueError, KeyError, TypeError):
        kind, message = "http_error", f"The service answered with status {response.status_code}."
    if kind in _ERRORS:
        return _ERRORS[kind](message)
    after = response.headers.get("retry-after", "")
    return ServiceError(message, response.status_code, kind, float(after) if after.isdecimal() else None)


def _unreachable(url: str, error: Exception) -> ServiceError:
    return ServiceError(
        f"The service at {url} did not answer ({type(error).__name__}): does it run, and is the address right?"
    )
