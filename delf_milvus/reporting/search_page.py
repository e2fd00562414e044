"""The page of searches: every query with its photo, its answers, and the keypoints that prove them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version as installed_version
from pathlib import Path

from delf_milvus.errors import InputError
from delf_milvus.features import Box, clipped_box
from delf_milvus.imaging.decode import RgbImage, Source, decode
from delf_milvus.imaging.draw import corners
from delf_milvus.imaging.report import LEFT_OUT, Embedded, PictureSpace, write_page
from delf_milvus.reporting.pictures import Shown, hit_picture, query_outline, shown
from delf_milvus.retrieval.answers import SearchResult
from delf_milvus.settings import DecodeSettings

_QUERY_SIDE = 480  # pixels
_ANSWER_SIDE = 320
_MATCH_SIDE = 1100
_MOST_ANSWERS = 20  # of one query
_MOST_MATCHES = 3  # match pictures of one query

_NO_PHOTO = "The query was features, without a photo."


@dataclass(frozen=True)
class _Answer:
    rank: int
    name: str
    verified: bool
    verdict: str
    inliers: str
    confidence: str
    facts: Sequence[tuple[str, str]]
    picture: Embedded | None
    missing: str


@dataclass(frozen=True)
class _Match:
    name: str
    picture: Embedded | None
    missing: str


@dataclass(frozen=True)
class _Query:
    anchor: str
    name: str
    verified: int
    verdict: str
    facts: Sequence[tuple[str, str]]
    picture: Embedded | None
    missing: str
    answers: Sequence[_Answer]
    matches: Sequence[_Match]
    more: str


@dataclass
class SearchPage:
    """A page that results are added to, one by one; each is drawn at once, so that only the page stays in memory.

    collection: what was searched, in words. limits: of the photos that are read. Of one query the first 20 answers are
    shown, the first 3 verified ones with their keypoints.
    """

    collection: str
    limits: DecodeSettings
    failures: list[str] = field(default_factory=list)
    _queries: list[_Query] = field(default_factory=list)
    _space: PictureSpace = field(default_factory=PictureSpace)

    def add(self, result: SearchResult, photo: Source | None, box: Box | None = None) -> None:
        """Add the answer to a query. photo: None where there is none. box: the part that was searched for.

        Photos that cannot be read any more are left out, and the page says so.
        """
        query, missing = self._read(photo)
        outline = None
        if query is not None and box is not None:
            box = clipped_box(box, query.shape[1], query.shape[0])
            outline = corners(query, box)
        name = result.query or "query"
        embedded = None
        if query is not None:
            embedded = self._space.embed(query, f"The query, {name}", _QUERY_SIDE, outline)
            missing = LEFT_OUT
        answers: list[_Answer] = []
        matches: list[_Match] = []
        for hit in result.hits[:_MOST_ANSWERS]:
            one = shown(hit, self.limits)
            answers.append(self._answer(query, one, box))
            if query is not None and one.photo is not None and hit.verified and len(matches) < _MOST_MATCHES:
                alt = f"{hit.inliers} lines between keypoints of {name} and of {hit.image_id}"
                picture = self._space.embed(hit_picture(query, one, box), alt, _MATCH_SIDE)
                matches.append(_Match(hit.image_id, picture, LEFT_OUT))
        beyond = len(result.hits) - len(answers)
        verified = sum(hit.verified for hit in result.hits)
        self._queries.append(
            _Query(
                anchor=f"query-{len(self._queries) + 1}",
                name=name,
                verified=verified,
                verdict=_verdict(result, verified),
                facts=[
                    ("features", f"{result.query_features}"),
                    ("searched in", f"{result.timings.total:.2f} s"),
                    *([] if box is None else [("part", ", ".join(f"{side:g}" for side in box))]),
                ],
                picture=embedded,
                missing=missing,
                answers=answers,
                matches=matches,
                more=f"{beyond} more answers are not shown here." if beyond > 0 else "",
            )
        )

    def write(self, path: Path, *, calibrated: bool = True) -> None:
        """Write the page. calibrated: whether confidence was measured with the features of this collection.

        Raises InputError where it cannot be written.
        """
        matched = sum(query.verified > 0 for query in self._queries)
        lead = (
            f"{matched} of {len(self._queries)} queries show something that {self.collection} has too. "
            "Confidence is the probability that an answer shows the same thing, if half of all queries have a match; "
            "false alarm, the share of queries without a match that reach as much evidence."
        )
        if not calibrated:
            lead += " Neither was measured with features of this kind: both are a rough guide."
        title = f"Search: {self._queries[0].name}" if len(self._queries) == 1 else f"{len(self._queries)} searches"
        values = {
            "title": title,
            "lead": lead,
            "queries": self._queries,
            "failures": self.failures,
            "made": made_by(),
        }
        write_page(path, "search", values)

    def _read(self, photo: Source | None) -> tuple[RgbImage | None, str]:
        if photo is None:
            return None, _NO_PHOTO
        try:
            return decode(photo, self.limits), ""
        except InputError as error:
            return None, str(error)

    def _answer(self, query: RgbImage | None, one: Shown, box: Box | None) -> _Answer:
        hit = one.hit
        facts = []
        if hit.compared:
            facts = [
                ("confidence", f"{hit.confidence:.4f}"),
                ("inliers", f"{hit.inliers} of {hit.putatives}"),
                ("false alarm", f"{hit.false_alarm:.1e}"),
            ]
        if hit.region > 1:
            facts.append(("region", f"{hit.region}"))
        facts += [(name, f"{value}") for name, value in hit.metadata.items()]
        picture, missing = None, one.missing
        if one.photo is not None:
            outline = query_outline(query, hit, box) if query is not None and hit.verified else None
            picture = self._space.embed(one.photo, f"Answer {hit.rank}, {hit.image_id}", _ANSWER_SIDE, outline)
            missing = LEFT_OUT
        return _Answer(
            rank=hit.rank,
            name=hit.image_id,
            verified=hit.verified,
            verdict=one.verdict,
            inliers=f"{hit.inliers}",
            confidence=f"{hit.confidence:.4f}",
            facts=facts,
            picture=picture,
            missing=f"No picture: {missing}",
        )


def made_by() -> list[str]:
    """What the foot of a page says: the software, and when."""
    now = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes")
    return [f"delf-milvus {installed_version('delf-milvus')}", now.replace("+00:00", " UTC")]


def _verdict(result: SearchResult, verified: int) -> str:
    if not result.query_features:
        return "The photo has no features."
    if not verified:
        return "No stored image is proved to show the same thing."
    return f"{verified} {'image is' if verified == 1 else 'images are'} proved to show the same thing."
