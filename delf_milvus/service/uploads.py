"""Photos in requests: the body itself, or the fields of a form. Never an address to fetch."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from delf_milvus.service.problems import RefusedError

_FIELD_BYTES = 256 * 1024
_CHARSETS = frozenset({"", "utf-8", "utf8", "us-ascii", "iso-8859-1"})
_RAW = ("image/", "application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True)
class Upload:
    """One photo. name: that of its file, "" where there is none."""

    data: bytes
    name: str = ""


@dataclass(frozen=True)
class Uploads:
    """The photos of a request, and the texts beside them, by the names of their fields."""

    photos: list[Upload]
    fields: dict[str, list[str]]


async def read_uploads(request: Request, most: int) -> Uploads:
    """All photos of a request, at least one and at most `most`; what is too large is refused while it comes in.

    Raises RefusedError: 415 for another kind of body, 400 for one that cannot be read or has none, 413 for too many.
    """
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind.startswith(_RAW):
        data = await request.body()
        if not data:
            raise RefusedError(400, "no_photo", "The request has no body; send the bytes of a photo.")
        return Uploads([Upload(data)], {})
    if kind != "multipart/form-data":
        raise RefusedError(
            415,
            "unsupported_media_type",
            "Send a photo as the body (image/jpeg ...), or as the field `photo` of multipart/form-data.",
        )
    # Decoders of Python's such as unicode_escape make text of it that is none.
    _, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"").decode("latin-1").lower()
    if charset not in _CHARSETS:
        raise RefusedError(415, "unsupported_media_type", "Send the form in UTF-8.")
    # Starlette answers a damaged form with 400 by itself.
    form = await request.form(max_files=most + 1, max_fields=4 * most + 32, max_part_size=_FIELD_BYTES)
    try:
        return await _of_form(form, most)
    finally:
        await form.close()


async def _of_form(form: FormData, most: int) -> Uploads:
    photos: list[Upload] = []
    fields: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "photo":
                raise RefusedError(422, "invalid_argument", f"A photo is in the field {name!r}; name it `photo`.")
            photos.append(Upload(await value.read(), value.filename or ""))
        else:
            fields.setdefault(name, []).append(value)
    if not photos:
        raise RefusedError(400, "no_photo", "The form has no file; send a photo in the field `photo`.")
    if len(photos) > most:
        raise RefusedError(413, "too_many_photos", f"The request has more than {most} photos; send them in several.")
    return Uploads(photos, fields)
