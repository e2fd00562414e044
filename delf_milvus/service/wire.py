"""What the service says and is told, as JSON: the fields of `--json`, with types, bounds and examples.

Clients read these too; FastAPI is not needed for them.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from delf_milvus.settings import MOST_ANSWERS
from delf_milvus.store.feature_store import StoreStatus

MIN_SIDE, MAX_SIDE = 32, 1600
"""Longest side of a thumbnail, pixels."""

Box = tuple[float, float, float, float]


class Points(BaseModel):
    """Inliers of one answer, row by row: (x, y) in pixels of the query, in pixels of the image, and the distance, in
    pixels of the image, between the latter and where the transform takes the former."""

    query_points: list[tuple[float, float]]
    image_points: list[tuple[float, float]]
    residuals: list[float]


class HitAnswer(BaseModel):
    """One answer; fields as of `delf_milvus.Hit`, and its inliers where they were asked for."""

    rank: int
    image_id: str
    uri: str
    verified: bool
    compared: bool
    inliers: int
    putatives: int
    confidence: float
    false_alarm: float
    score: float
    transform: list[list[float]] | None
    homography: list[list[float]] | None
    region: int
    box: Box | None
    query_box: Box | None
    metadata: dict[str, Any]
    correspondence: Points | None = None


_HIT: dict[str, Any] = {
    "rank": 1,
    "image_id": "holidays/tower.jpg",
    "uri": "",
    "verified": True,
    "compared": True,
    "inliers": 74,
    "putatives": 131,
    "confidence": 0.9996,
    "false_alarm": 0.00002,
    "score": 2.31,
    "transform": [[0.98, -0.03, 12.5], [0.03, 0.98, -4.0]],
    "homography": [[0.97, -0.03, 12.6], [0.03, 0.98, -4.1], [0.0, 0.0, 1.0]],
    "region": 1,
    "box": [12.0, 0.0, 630.0, 421.5],
    "query_box": [31.0, 8.0, 604.0, 410.0],
    "metadata": {"year": 2021},
    "correspondence": {"query_points": [[48.0, 80.0]], "image_points": [[57.2, 74.5]], "residuals": [1.7]},
}


class SearchAnswer(BaseModel):
    """The answer to one query; fields as of `delf_milvus.SearchResult`. `matched` is false where nothing is proved."""

    query: str
    model: str
    matched: bool
    query_features: int
    calibrated: bool
    hits: list[HitAnswer]
    timings: dict[str, float]

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "query": "",
                "model": "942d827e2fdc",
                "matched": True,
                "query_features": 500,
                "calibrated": True,
                "hits": [_HIT],
                "timings": {"decode": 0.01, "extract": 0.62, "neighbours": 0.21, "total": 1.02},
            }
        }
    )


class ImageAnswer(BaseModel):
    """A stored image; fields as of `delf_milvus.ImageRecord`. `photo`: whether the service can show it."""

    image_id: str
    uri: str
    sha256: str
    width: int
    height: int
    feature_count: int
    model: str
    ingested_at: str
    root: str
    metadata: dict[str, Any]
    photo: bool


class ImagesPage(BaseModel):
    """Stored images in order of their ids. `next`: the `after` of the next page, null on the last one."""

    images: list[ImageAnswer]
    next: str | None


class Problem(BaseModel):
    """kind: what went wrong, for programs. message: one sentence that says what to do."""

    kind: str
    message: str


class ProblemAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: Problem

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"error": {"kind": "not_found", "message": "No image tower.jpg is stored; list them."}}
        }
    )


class StoredImage(BaseModel):
    """One photo that was stored. `replaced`: whether there was an image of this id."""

    image_id: str
    features: int
    replaced: bool


class FailedImage(BaseModel):
    """One photo of several that could not be stored; the others are not affected."""

    image_id: str
    error: Problem


class AddAnswer(BaseModel):
    """What became of the photos of one request."""

    stored: list[StoredImage]
    failed: list[FailedImage]


class DeleteAnswer(BaseModel):
    """The ids that were deleted."""

    deleted: list[str]


class ServiceStatus(BaseModel):
    """The service itself. keys: whether it asks for keys. may_write: whether this caller may add and delete. photos,
    uploads: whether stored photos are shown, and added ones kept. top, max_false_alarm: what a search takes where it
    does not say. waiting, running: photos in the queue and in work."""

    version: str
    uptime_seconds: float
    keys: bool
    may_write: bool
    photos: bool
    uploads: bool
    max_photo_bytes: int
    max_pixels: int
    top: int
    max_false_alarm: float
    waiting: int
    running: int


class StatusAnswer(BaseModel):
    """store: as `delf-milvus status` prints. service: the service itself."""

    store: StoreStatus
    service: ServiceStatus


class ReadyAnswer(BaseModel):
    """Whether requests can be served, and what of it is missing. breaker: "open" while the database is not asked,
    because it did not answer; "trying" while one question is out to it."""

    ready: bool
    database: bool
    model: bool
    breaker: Literal["closed", "open", "trying"]


class SearchOptions(BaseModel):
    """How to search: query parameters, or fields beside the photo in a form."""

    model_config = ConfigDict(extra="forbid")

    top: int | None = Field(
        None, ge=1, le=MOST_ANSWERS, description="Answers at most; the service's setting if absent."
    )
    box: str | None = Field(
        None,
        max_length=200,
        description="x0,y0,x1,y1: the part of the photo to search for, pixels of the upright photo.",
        examples=["10,20,310,220"],
    )
    filter: str = Field(
        "",
        max_length=20_000,
        description="Only images that meet this, in declared fields: an expression, or a JSON object, whose values are "
        "data whatever they contain.",
        examples=["year >= 2020", '{"year": {">=": 2020}}'],
    )
    verified_only: bool = Field(True, description="False: images without proof follow the verified ones.")
    max_false_alarm: float | None = Field(
        None, gt=0, lt=1, description="Share of queries without a match that may be answered with one."
    )
    parts: bool | None = Field(None, description="Search for five parts of the photo too: small things, six searches.")
    turned: bool | None = Field(None, description="Search for the photo turned by 90, 180 and 270 degrees too.")
    correspondences: bool = Field(False, description="Say where the inliers of each answer lie.")

    @field_validator("box")
    @classmethod
    def _four_numbers(cls, box: str | None) -> str | None:
        if box is not None:
            try:
                _, _, _, _ = (float(part) for part in box.split(","))
            except ValueError:
                raise ValueError("give four numbers, x0,y0,x1,y1") from None
        return box

    @property
    def corners(self) -> Box | None:
        """The box as numbers."""
        if self.box is None:
            return None
        x0, y0, x1, y1 = (float(part) for part in self.box.split(","))
        return x0, y0, x1, y1


class AddOptions(BaseModel):
    """Of a photo that is the body of the request; in a form, `id` and `metadata` are fields beside the photos."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field("", max_length=4096, description="The image's id.", examples=["holidays/tower.jpg"])
    metadata: str = Field(
        "", max_length=200_000, description="A JSON object: declared fields, and others for display.",
        examples=['{"year": 2021}'],
    )  # fmt: skip
    replace: bool = Field(True, description="False: an id that is stored already is refused (409).")


class ListOptions(BaseModel):
    """Which page of the stored images."""

    model_config = ConfigDict(extra="forbid")

    prefix: str = Field("", max_length=4096, description="Only ids that start so.")
    filter: str = Field("", max_length=20_000, description="Only images that meet this; as of a search.")
    after: str = Field("", max_length=4096, description="Only ids beyond this one: `next` of the page before.")
    limit: int = Field(50, ge=1, le=1000, description="Images of a page.")


def filter_of(text: str) -> str | dict[str, Any]:
    """A filter as an index takes it: a JSON object as a mapping, all else as an expression. Raises ValueError."""
    if not text.lstrip().startswith("{"):
        return text
    value: dict[str, Any] = json_object(text)
    return value


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; raises ValueError for any other text, and for numbers that JSON does not have."""

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(text, parse_constant=refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value
