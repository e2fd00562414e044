"""The answers of the service, route by route."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from delf_milvus.errors import DatabaseError, DelfMilvusError, NotFoundError
from delf_milvus.imaging.decode import content_digest
from delf_milvus.retrieval.answers import Hit, SearchResult
from delf_milvus.service import wire
from delf_milvus.service.core import Service
from delf_milvus.service.problems import RefusedError, refusal_of
from delf_milvus.service.uploads import Upload, read_uploads
from delf_milvus.store.filters import Filter
from delf_milvus.store.records import ImageRecord

_PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/app.css": ("app.css", "text/css"),
}

Errors = dict[int | str, dict[str, Any]]


def _errors(*statuses: int) -> Errors:
    return {status: {"model": wire.ProblemAnswer} for status in (401, 403, 422, 429, 503, *statuses)}


def _photo_body(fields: dict[str, Any], *, several: bool) -> dict[str, Any]:
    """How OpenAPI describes a photo as the body itself, or in a form."""
    file = {"type": "string", "format": "binary"}
    photo = {"type": "array", "items": file, "description": "The photos."} if several else file
    raw = {"schema": file}
    form = {"type": "object", "required": ["photo"], "properties": {"photo": photo, **fields}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "image/jpeg": raw,
                "image/*": raw,
                "application/octet-stream": raw,
                "multipart/form-data": {"schema": form},
            },
        }
    }


def _fields(model: type[Any]) -> dict[str, Any]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def _decoded(image_id: Annotated[str, Path(description="An image's id; `/` in it is sent as %2F.")]) -> str:
    return unquote(image_id)


ImageId = Annotated[str, Depends(_decoded)]


def router(service: Service) -> APIRouter:
    """All routes of a service."""
    made = APIRouter()
    made.include_router(_search_routes(service))
    made.include_router(_image_routes(service))
    made.include_router(_operation_routes(service))
    made.include_router(_page_routes())
    return made


def _search_routes(service: Service) -> APIRouter:
    made = APIRouter(tags=["search"])

    @made.post(
        "/v1/search",
        response_model=wire.SearchAnswer,
        responses=_errors(400, 408, 409, 413, 415, 504),
        openapi_extra=_photo_body(_fields(wire.SearchOptions), several=False),
    )
    async def search(request: Request, options: Annotated[wire.SearchOptions, Query()]) -> Any:
        """Find the stored images that show the same thing as a photo.

        The photo is the body, or the field `photo` of a form; options are query parameters or fields of the form.
        """
        uploads = await read_uploads(request, 1)
        given = options.model_dump(exclude_unset=True) | _single(uploads.fields)
        asked = _valid(wire.SearchOptions, given)
        photo = uploads.photos[0]
        _check_size(service, photo)
        filter = _filter(asked.filter)
        whole = service.index.settings
        views = {name: value for name in ("parts", "turned") if (value := getattr(asked, name)) is not None}
        verify = whole.verify
        if asked.max_false_alarm is not None:
            verify = verify.model_copy(update={"max_false_alarm": asked.max_false_alarm})
        index = service.index.searching(whole.search.model_copy(update=views), verify)
        async with _blamed(service, filter):
            result = await service.compute(
                request,
                lambda: index.search(
                    photo.data,
                    asked.top,
                    box=asked.corners,
                    filter=filter,
                    include_unverified=not asked.verified_only,
                ),
            )
        answer = _answer(service, result, correspondences=asked.correspondences)
        service.meters.search(result.matched, answer["timings"], request.state.visit.waited)
        return answer

    return made


def _image_routes(service: Service) -> APIRouter:
    made = APIRouter(tags=["images"])

    @made.post(
        "/v1/images",
        status_code=201,
        response_model=wire.AddAnswer,
        responses=_errors(400, 408, 409, 413, 415, 504)
        | {207: {"model": wire.AddAnswer, "description": "Some of several photos failed; each is listed."}},
        openapi_extra=_photo_body(
            {
                "id": {"type": "array", "items": {"type": "string"}, "description": "Ids, one for each photo, in the "
                       "same order; without any the names of the files."},
                "metadata": {"type": "array", "items": {"type": "string"}, "description": "JSON objects: one for each "
                             "photo, or one for all."},
                "replace": _fields(wire.AddOptions)["replace"],
            },
            several=True,
        ),
    )  # fmt: skip
    async def add(request: Request, options: Annotated[wire.AddOptions, Query()]) -> Any:
        """Store photos, replacing images of the same id.

        Photos are fields `photo` of a form, with fields `id` and `metadata` in the same order; or one is the body.
        """
        uploads = await read_uploads(request, service.settings.max_photos)
        wanted = _named(uploads.photos, uploads.fields, options)
        stored, failed = [], []
        for photo, image_id, metadata, replace in wanted:
            try:
                stored.append(await _add(service, request, photo, image_id, metadata, replace))
            except (RefusedError, DelfMilvusError) as error:  # noqa: PERF203 - a photo takes far longer
                if len(wanted) == 1:
                    raise
                refusal = error if isinstance(error, RefusedError) else refusal_of(error)
                problem = {"kind": refusal.kind, "message": refusal.message}
                failed.append({"image_id": image_id, "error": problem})
        answer = {"stored": stored, "failed": failed}
        return JSONResponse(answer, 207) if failed else answer

    @made.get("/v1/images", response_model=wire.ImagesPage, responses=_errors(504))
    async def images(options: Annotated[wire.ListOptions, Query()]) -> Any:
        """A page of the stored images, in order of their ids."""
        filter = _filter(options.filter)

        def listing() -> Awaitable[list[ImageRecord]]:
            return service.index.list(options.prefix, options.limit + 1, after=options.after, filter=filter)

        async with _blamed(service, filter):
            records = await service.ask(listing)
        page = records[: options.limit]
        shown = await service.on_files(lambda: [_record(service, record) for record in page])
        return {"images": shown, "next": page[-1].image_id if len(records) > len(page) else None}

    @made.get(
        "/v1/images/{image_id:path}/photo",
        response_class=Response,
        responses=_errors(404) | {200: {"content": {"image/*": {}}, "description": "The photo as it was stored."}},
    )
    async def photo(request: Request, image_id: ImageId) -> Response:
        """The photo of an image, where it lies in a folder that the service may show, and is unchanged."""
        record = await service.ask(lambda: service.index.show(image_id))
        if await _known(service, request, record, "photo"):
            return Response(status_code=304, headers=_cached(record, "photo"))
        found = await service.on_files(service.photos.read, record)
        return Response(found.data, media_type=found.media_type, headers=_cached(record, "photo"))

    @made.get(
        "/v1/images/{image_id:path}/thumbnail",
        response_class=Response,
        responses=_errors(404) | {200: {"content": {"image/jpeg": {}}, "description": "A small JPEG, upright."}},
    )
    async def thumbnail(
        request: Request,
        image_id: ImageId,
        side: Annotated[
            int, Query(ge=wire.MIN_SIDE, le=wire.MAX_SIDE, description="Longest side at most, pixels.")
        ] = 320,
    ) -> Response:
        """The photo of an image, smaller, as a JPEG without anything that its file says beside the pixels."""
        record = await service.ask(lambda: service.index.show(image_id))
        kind = f"thumbnail{side}"
        if await _known(service, request, record, kind):
            return Response(status_code=304, headers=_cached(record, kind))
        made = await service.on_files(service.photos.thumbnail, record, side)
        return Response(made, media_type="image/jpeg", headers=_cached(record, kind))

    @made.get("/v1/images/{image_id:path}", response_model=wire.ImageAnswer, responses=_errors(404))
    async def image(image_id: ImageId) -> Any:
        """What is stored of an image."""
        record = await service.ask(lambda: service.index.show(image_id))
        return await service.on_files(_record, service, record)

    @made.delete("/v1/images/{image_id:path}", response_model=wire.DeleteAnswer, responses=_errors(404))
    async def delete(image_id: ImageId) -> Any:
        """Delete an image, and its photo where the service keeps it."""
        async with service.alone(image_id):
            record = await service.ask(lambda: service.index.show(image_id))
            deleted = await service.ask(lambda: service.index.delete([image_id]))
            await service.on_files(service.photos.forget, record.uri)
        return {"deleted": deleted}

    return made


def _operation_routes(service: Service) -> APIRouter:
    made = APIRouter(tags=["operation"])

    @made.get("/v1/status", response_model=wire.StatusAnswer, responses=_errors(504))
    async def status(request: Request) -> Any:
        """Database, collection, index and model, and the service itself."""
        store = await service.ask(service.index.status)
        if not service.settings.show_uris:
            store["uri"] = ""
        settings, whole = service.settings, service.index.settings
        return {
            "store": store,
            "service": {
                "version": service.version,
                "uptime_seconds": round(service.uptime, 1),
                "keys": bool(service.keys),
                "may_write": request.state.visit.role == "write",
                "photos": bool(service.photos),
                "uploads": service.photos.uploads is not None,
                "max_photo_bytes": settings.max_photo_bytes,
                "max_pixels": whole.decode.max_pixels,
                "top": whole.search.top,
                "max_false_alarm": whole.verify.max_false_alarm,
                "waiting": service.queue.length,
                "running": service.queue.running,
            },
        }

    @made.get("/healthz", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def healthz() -> Response:
        """Whether the process answers at all."""
        return Response("ok\n", media_type="text/plain")

    @made.get("/readyz", response_model=wire.ReadyAnswer, responses={503: {"model": wire.ReadyAnswer}})
    async def readyz() -> Response:
        """Whether the database answers and the model is loaded."""
        found = {"database": await service.database_answers(), "model": service.model_loaded}
        ready = all(found.values()) and not service.stopping
        answer = {"ready": ready, **found, "breaker": service.breaker.state}
        return JSONResponse(answer, 200 if ready else 503)

    @made.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters and histograms for Prometheus; with keys set it needs one."""
        return Response(service.meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return made


def _page_routes() -> APIRouter:
    made = APIRouter(include_in_schema=False)
    folder = files("delf_milvus.service") / "page"

    def shown(name: str, media_type: str) -> Callable[[Request], Response]:
        data = (folder / name).read_bytes()
        headers = {"ETag": f'"{content_digest(data)[:32]}"', "Cache-Control": "no-cache"}

        def page(request: Request) -> Response:
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            return Response(data, media_type=media_type, headers=headers)

        return page

    for path, (name, media_type) in _PAGE.items():
        made.add_route(path, shown(name, media_type), methods=["GET"])
    return made


async def _add(
    service: Service, request: Request, photo: Upload, image_id: str, metadata: str, replace: bool
) -> dict[str, Any]:
    """Store one photo, keeping its file where uploads are kept. Raises RefusedError and what the index raises."""
    if not image_id:
        raise RefusedError(422, "invalid_argument", "The photo has no id: send the field or parameter `id`.")
    _check_size(service, photo)
    try:
        values = wire.json_object(metadata) if metadata.strip() else {}
    except ValueError as error:
        raise RefusedError(422, "invalid_argument", f"The metadata must be a JSON object, but {error}.") from None

    async def added() -> dict[str, Any]:
        async with service.alone(image_id):
            before: ImageRecord | None = None
            with contextlib.suppress(NotFoundError):
                before = await service.index.show(image_id)
            if before is not None and not replace:
                raise RefusedError(409, "exists", f"An image {image_id!r} is stored already; delete it, or replace it.")
            path = await service.on_files(service.photos.keep, photo.data, image_id)
            kept = str(path) if path else ""
            try:
                features = await service.index.add(photo.data, image_id, values, kept)
            except BaseException:
                if before is None or before.uri != kept:
                    await service.on_files(service.photos.forget, kept)
                raise
            if before is not None and before.uri != kept:
                await service.on_files(service.photos.forget, before.uri)
            return {"image_id": image_id, "features": features, "replaced": before is not None}

    return await service.compute(request, added)


def _filter(text: str) -> Filter:
    try:
        return wire.filter_of(text)
    except ValueError as error:
        raise RefusedError(422, "invalid_argument", f"The filter looks like JSON, but {error}.") from None


@contextlib.asynccontextmanager
async def _blamed(service: Service, filter: Filter) -> AsyncIterator[None]:
    """An expression that the database does not take is the client's fault, not the database's, if that answers."""
    try:
        yield
    except DatabaseError:
        if isinstance(filter, str) and filter.strip() and await service.database_answers():
            raise RefusedError(
                422, "invalid_argument", "The database does not take this filter: write it as `year >= 2020`."
            ) from None
        raise


def _answer(service: Service, result: SearchResult, *, correspondences: bool) -> dict[str, Any]:
    answer = result.to_dict()
    for hit, shown in zip(result.hits, answer["hits"], strict=True):
        if not service.settings.show_uris:
            shown["uri"] = ""
        if correspondences:
            shown["correspondence"] = _points(hit)
    return answer


def _points(hit: Hit) -> dict[str, Any]:
    inliers = hit.correspondence
    return {
        name: getattr(inliers, name).astype(float).round(2).tolist()
        for name in ("query_points", "image_points", "residuals")
    }


def _record(service: Service, record: ImageRecord) -> dict[str, Any]:
    shown = record.to_dict() | {"photo": service.photos.may_show(record)}
    return shown if service.settings.show_uris else shown | {"uri": "", "root": ""}


def _named(
    photos: list[Upload], fields: dict[str, list[str]], options: wire.AddOptions
) -> list[tuple[Upload, str, str, bool]]:
    """Each photo with its id, metadata and whether it may replace."""
    ids = fields.pop("id", [options.id] if options.id else [photo.name for photo in photos])
    metadata = fields.pop("metadata", [options.metadata])
    replace = _valid(wire.AddOptions, {"replace": options.replace} | _single(fields)).replace
    if len(metadata) == 1:
        metadata *= len(photos)
    if len(ids) != len(photos) or len(metadata) != len(photos):
        raise RefusedError(
            422,
            "invalid_argument",
            f"There are {len(photos)} photos, {len(ids)} ids and {len(metadata)} metadata: send one for each photo.",
        )
    if len(set(ids)) < len(ids):
        raise RefusedError(422, "invalid_argument", "Two photos have the same id; send each id once.")
    return [(photo, ids[i], metadata[i], replace) for i, photo in enumerate(photos)]


def _single(fields: dict[str, list[str]]) -> dict[str, str]:
    if twice := next((name for name, values in fields.items() if len(values) > 1), None):
        raise RefusedError(422, "invalid_argument", f"The field {twice!r} is there more than once.")
    return {name: values[0] for name, values in fields.items()}


def _valid(model: type[Any], values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RefusedError(422, "invalid_argument", sentence_of(error.errors(include_url=False))) from None


def sentence_of(errors: Any) -> str:
    """What is wrong with options, in one sentence about the first of them."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"] if part not in ("query", "path", "body"))
    if first["type"] == "extra_forbidden":
        return f"There is no option {name!r}."
    return f"Option {name}: {first['msg'].removeprefix('Value error, ')}."


def _check_size(service: Service, photo: Upload) -> None:
    most = service.settings.max_photo_bytes
    if len(photo.data) > most:
        raise RefusedError(413, "photo_too_large", f"The photo has more than {most:,} bytes; shrink it.")
    if not photo.data:
        raise RefusedError(400, "no_photo", "The photo is empty.")


def _cached(record: ImageRecord, kind: str) -> dict[str, str]:
    return {"ETag": f'"{kind}-{record.sha256[:32]}"', "Cache-Control": "private, no-cache"}


async def _known(service: Service, request: Request, record: ImageRecord, kind: str) -> bool:
    """Whether the client has what it asks for, and may still see it."""
    if request.headers.get("if-none-match") != _cached(record, kind)["ETag"]:
        return False
    return await service.on_files(service.photos.may_show, record)
