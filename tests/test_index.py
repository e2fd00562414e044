"""The whole path through the Python API, with the bundled model and the embedded database."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import RgbImage, make_photo, save_photo, the_same
from PIL import Image

from delf_milvus import DelfIndex, DelfMilvusError, Settings
from delf_milvus.errors import CollectionError, ImageError, InputError, NotFoundError, UsageError

FAST = Settings(extract={"preset": "fast"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def index(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DelfIndex]:
    """All generated photos, ingested once; tests that change it open their own."""
    with DelfIndex.open(tmp_path_factory.mktemp("db") / "photos.db", settings=FAST) as opened:
        report = opened.ingest([photo_folder])
        assert (report.added, report.failed) == (8, 0)
        yield opened


@pytest.fixture
def own(tmp_path: Path) -> Iterator[DelfIndex]:
    with DelfIndex.open(tmp_path / "own.db", settings=FAST) as opened:
        yield opened


def cropped(seed: int) -> RgbImage:
    return np.ascontiguousarray(make_photo(seed)[30:220, 40:290])


def test_a_crop_finds_its_photo_with_the_true_transform(index: DelfIndex) -> None:
    result = index.search(cropped(3))
    assert result.matched
    best = result.hits[0]
    assert (best.rank, best.image_id, best.verified) == (1, "scene3.png", True)
    assert best.inliers <= best.putatives
    assert best.confidence >= 0.99
    transform = np.array(best.transform)
    # Keypoints lie on a grid of 16 pixels: on so small a photo that is how well places are known.
    corners = np.array([[0, 0, 1], [249, 189, 1]]) @ transform.T
    np.testing.assert_allclose(corners, [[40, 30], [289, 219]], atol=24)
    np.testing.assert_allclose(best.box, [40, 30, 290, 220], atol=24)


def test_a_photo_that_is_not_there_is_no_match(index: DelfIndex) -> None:
    for seed in (101, 102, 103, 104):
        result = index.search(make_photo(seed))
        assert not result.matched
        assert result.hits == []


def test_unverified_candidates_come_after_on_request_and_say_so(index: DelfIndex) -> None:
    result = index.search(cropped(2), top_k=5, include_unverified=True)
    assert len(result.hits) == 5
    flags = [hit.verified for hit in result.hits]
    assert flags[0]
    assert flags == sorted(flags, reverse=True)
    assert [hit.rank for hit in result.hits] == [1, 2, 3, 4, 5]
    assert not index.search(make_photo(101), include_unverified=True).matched


def test_a_box_searches_for_that_part_alone(index: DelfIndex) -> None:
    left, right = make_photo(1), make_photo(5)
    both = np.concatenate([left, right], axis=1)
    assert index.search(both, box=(0, 0, 320, 240)).hits[0].image_id == "scene1.png"
    hit = index.search(both, box=(320, 0, 640, 240)).hits[0]
    assert hit.image_id == "scene5.png"
    # The transform starts from pixels of the whole photo.
    np.testing.assert_allclose(np.array(hit.transform) @ [480, 120, 1], [160, 120], atol=16)


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "pillow", "array"])
def test_every_kind_of_image_gives_the_same_answer(index: DelfIndex, tmp_path: Path, kind: str) -> None:
    photo = cropped(4)
    path = save_photo(tmp_path / "query.png", photo)
    source = {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "pillow": Image.fromarray(photo),
        "array": photo,
    }[kind]
    result = index.search(source)  # type: ignore[arg-type]
    assert result.hits[0].image_id == "scene4.png"
    assert result.hits[0].to_dict() == index.search(photo).hits[0].to_dict()


def test_the_same_query_gives_the_same_answer_from_many_threads(index: DelfIndex) -> None:
    queries = [cropped(seed) for seed in (0, 1, 2, 3)] * 3
    expected = [the_same(index.search(q, include_unverified=True).hits) for q in queries[:4]]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda q: index.search(q, include_unverified=True), queries))
    for number, result in enumerate(results):
        assert [h.to_dict() for h in result.hits] == expected[number % 4]


def test_hits_mode_verifies_without_full_matching(tmp_path: Path) -> None:
    settings = FAST.model_copy(update={"search": FAST.search.model_copy(update={"mode": "hits"})})
    with DelfIndex.open(tmp_path / "hits.db", settings=settings) as index:
        for seed in range(4):
            index.add(make_photo(seed), f"scene{seed}")
        assert index.search(cropped(3)).hits[0].image_id == "scene3"


def test_each_thing_of_a_composite_is_found_in_a_region_of_its_own(tmp_path: Path) -> None:
    both = np.concatenate([make_photo(1), make_photo(4)], axis=1)
    for per_region, expected in ((0, {"1", "1 again", "4"}), (1, {"1", "4"})):
        settings = Settings(extract={"preset": "fast"}, search={"per_region": per_region})  # type: ignore[arg-type]
        with DelfIndex.open(tmp_path / "r.db", settings=settings) as opened:
            for image_id in ("1", "1 again", "4", "7"):
                opened.add(make_photo(int(image_id[0])), image_id)
            hits = opened.search(both).hits
        assert {hit.image_id.replace("1 again", "1") if per_region else hit.image_id for hit in hits} == expected
        left, right = ([hit for hit in hits if hit.image_id.startswith(name)] for name in "14")
        assert {hit.region for hit in left} | {hit.region for hit in right} == {1, 2}
        assert len({hit.region for hit in left}) == len(right) == 1
        assert all(hit.query_box is not None and hit.query_box[2] < 350 for hit in left)
        assert all(hit.query_box is not None and hit.query_box[0] > 290 for hit in right)


def test_a_homography_is_given_on_request(tmp_path: Path) -> None:
    corners = np.array([(0, 0), (640, 0), (640, 480), (0, 480)], np.float32)
    tilted = np.array([(60, 20), (580, 130), (580, 390), (60, 460)], np.float32)
    truth = cv2.getPerspectiveTransform(corners, tilted)
    photo = make_photo(2, 640, 480)
    for asked in (False, True):
        settings = Settings(extract={"preset": "fast"}, verify={"homography": asked})  # type: ignore[arg-type]
        with DelfIndex.open(tmp_path / "h.db", settings=settings) as opened:
            opened.add(cv2.warpPerspective(photo, truth, (640, 480)), "tilted")
            hit = opened.search(photo).hits[0]
        assert hit.image_id == "tilted"
        assert (hit.homography is None) != asked
    middle = np.array([[(160, 120), (480, 120), (480, 360), (160, 360)]], np.float32)
    found, true = (cv2.perspectiveTransform(middle, np.array(h)) for h in (hit.homography, truth))
    affine = middle[0] @ np.array(hit.transform)[:, :2].T + np.array(hit.transform)[:, 2]
    error, affine_error = (np.linalg.norm(points - true[0], axis=1).mean() for points in (found[0], affine))
    assert error < affine_error


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_photo_is_found_upright_where_that_is_asked_for(
    photo_folder: Path, tmp_path: Path, turns: int
) -> None:
    settings = Settings(extract={"preset": "fast"}, search={"turned": True})  # type: ignore[arg-type]
    with DelfIndex.open(tmp_path / "turned.db", settings=settings) as opened:
        opened.ingest([photo_folder])
        upright = cropped(3)
        hit = opened.search(np.rot90(upright, turns)).hits[0]
    assert (hit.image_id, hit.rank, hit.region) == ("scene3.png", 1, 1)
    # A corner of the crop, where it is in the turned query and in the stored photo.
    place = {1: (0, 249), 2: (249, 189), 3: (189, 0)}[turns]
    np.testing.assert_allclose(np.array(hit.transform) @ (*place, 1), (40, 30), atol=24)
    assert hit.query_box is not None
    assert max(hit.query_box) < 250


def test_a_small_thing_is_found_in_a_part_where_that_is_asked_for(photo_folder: Path, tmp_path: Path) -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (600, 800, 3)).astype(np.uint8)
    canvas[:] = cv2.GaussianBlur(canvas, (0, 0), 9)
    canvas[380:570, 530:780] = cropped(3)
    settings = Settings(extract={"preset": "fast"}, search={"parts": True})  # type: ignore[arg-type]
    with DelfIndex.open(tmp_path / "parts.db", settings=settings) as opened:
        opened.ingest([photo_folder])
        result = opened.search(canvas, top_k=1, box=(100, 100, 800, 600))
    (hit,) = result.hits
    assert hit.image_id == "scene3.png"
    np.testing.assert_allclose(np.array(hit.transform) @ (530, 380, 1), (40, 30), atol=24)
    x0, y0, x1, y1 = hit.query_box
    assert 500 < x0 < x1 < 800
    assert 350 < y0 < y1 < 600


def test_explain_agrees_with_the_search_and_says_what_decided(index: DelfIndex) -> None:
    photo = cropped(3)
    hit = index.search(photo).hits[0]
    found = index.explain(photo, hit.image_id)
    assert (found.rank, found.verified, found.candidate) == (1, True, True)
    assert (found.inliers, found.putatives, found.transform) == (hit.inliers, hit.putatives, hit.transform)
    assert (found.confidence, found.false_alarm) == (hit.confidence, hit.false_alarm)
    assert found.vote_rank == 1
    assert found.recounted_votes is not None
    assert found.recounted_votes > 0
    assert 0 < found.voting_features <= found.query_features
    assert found.verdict.startswith("Verified: ")
    other = index.explain(photo, "scene0.png")
    assert (other.rank, other.verified) == (None, False)
    assert other.false_alarm > other.max_false_alarm
    with pytest.raises(NotFoundError):
        index.explain(photo, "nothing.png")


def test_explain_compares_an_image_that_was_no_candidate(photo_folder: Path, tmp_path: Path) -> None:
    settings = Settings(extract={"preset": "fast"}, search={"candidates": 1})  # type: ignore[arg-type]
    with DelfIndex.open(tmp_path / "e.db", settings=settings) as opened:
        opened.ingest([photo_folder])
        found = opened.explain(cropped(3), "scene0.png")
        assert not found.candidate
        assert found.recounted_votes is None
        assert not found.verified
        assert "no candidate" in found.verdict or "(--candidates)" in found.verdict
        assert "Compared all the same, " in found.verdict


def test_a_query_without_features_is_no_match(index: DelfIndex) -> None:
    result = index.search(np.zeros((1, 1, 3), np.uint8))
    assert (result.matched, result.hits, result.query_features) == (False, [], 0)


@pytest.mark.parametrize("source", [b"", b"no photo", np.zeros((4, 4), np.uint8), "missing.jpg"])
def test_an_unreadable_query_is_one_of_our_errors(index: DelfIndex, source: object) -> None:
    with pytest.raises(InputError):
        index.search(source)  # type: ignore[arg-type]


def test_senseless_arguments_are_refused(index: DelfIndex) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        index.search(cropped(0), top_k=0)
    with pytest.raises(UsageError, match="box"):
        index.search(cropped(0), box=(500, 500, 600, 600))


def test_match_compares_two_photos_without_the_database(index: DelfIndex) -> None:
    pair = index.match(cropped(6), make_photo(6))
    assert pair.matched
    assert pair.correspondence.query_points.shape == pair.correspondence.image_points.shape
    assert not index.match(cropped(6), make_photo(7)).matched


def test_match_pictures_are_written_and_skipped_where_the_photo_has_gone(
    index: DelfIndex, own: DelfIndex, tmp_path: Path
) -> None:
    query = cropped(3)
    (picture,) = index.draw_hits(query, index.search(query, top_k=1), tmp_path / "out")
    assert picture.name == "001_scene3.png"
    drawn = cv2.imread(str(picture))
    assert drawn.shape[1] > drawn.shape[0]
    own.add(make_photo(3), "array without a file")
    assert own.draw_hits(query, own.search(query), tmp_path / "none") == []


@pytest.mark.parametrize("image_id", [".", "/", "a/../b.png", "😀" * 200, "x" * 900 + ".jpg"])
def test_any_id_gives_a_picture_a_name_that_a_folder_takes(own: DelfIndex, tmp_path: Path, image_id: str) -> None:
    path = save_photo(tmp_path / "stored.png", make_photo(3))
    own.add(path, image_id)
    query = cropped(3)
    (picture,) = own.draw_hits(query, own.search(query), tmp_path / "out")
    assert picture.parent == tmp_path / "out"
    assert picture.is_file()


def test_a_stored_photo_that_was_damaged_since_loses_its_picture_only(own: DelfIndex, tmp_path: Path) -> None:
    path = save_photo(tmp_path / "stored.png", make_photo(3))
    own.add(path, "stored")
    result = own.search(cropped(3))
    path.write_bytes(b"no photo")
    assert own.draw_hits(cropped(3), result, tmp_path / "out") == []


def test_add_replaces_and_keeps_metadata(own: DelfIndex) -> None:
    own.add(make_photo(1), "one", {"place": "Hội An", "year": 2020})
    record = own.show("one")
    assert dict(record.metadata) == {"place": "Hội An", "year": 2020}
    assert (record.width, record.height) == (320, 240)
    own.add(make_photo(2), "one")
    assert own.search(cropped(2)).hits[0].image_id == "one"
    assert not own.search(cropped(1)).matched
    assert len(own.list()) == 1


def test_add_refuses_what_is_no_photo_and_stores_nothing(own: DelfIndex) -> None:
    own.add(make_photo(1), "one")
    with pytest.raises(ImageError):
        own.add(b"no photo", "two")
    with pytest.raises(InputError, match="id"):
        own.add(make_photo(1), "")
    with pytest.raises(InputError, match="reserved"):
        own.add(make_photo(1), "two", {"uri": "elsewhere"})
    assert [record.image_id for record in own.list()] == ["one"]


def test_delete_and_show(own: DelfIndex) -> None:
    own.add(make_photo(1), "a b'c\"\n😀")
    assert own.delete(["nothing", "a b'c\"\n😀"]) == ["a b'c\"\n😀"]
    assert not own.search(cropped(1)).matched
    with pytest.raises(NotFoundError, match="nothing"):
        own.show("nothing")


def test_an_index_survives_closing(tmp_path: Path) -> None:
    with DelfIndex.open(tmp_path / "a.db", settings=FAST) as first:
        first.add(make_photo(1), "one")
        before = first.search(cropped(1)).hits[0].to_dict()
    with DelfIndex.open(tmp_path / "a.db", settings=FAST, create=False) as second:
        assert second.search(cropped(1)).hits[0].to_dict() == before


def test_another_pyramid_is_another_model(tmp_path: Path) -> None:
    with DelfIndex.open(tmp_path / "a.db", settings=FAST) as first:
        first.add(make_photo(1), "one")
    with pytest.raises(CollectionError, match="scales"):
        DelfIndex.open(tmp_path / "a.db")
    with DelfIndex.open(tmp_path / "a.db", any_model=True, create=False) as reader:
        assert [record.image_id for record in reader.list()] == ["one"]


def test_a_client_that_was_handed_in_stays_open_and_its_collections_untouched(tmp_path: Path) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(str(tmp_path / "theirs.db"))
    try:
        client.create_collection("theirs", dimension=4)
        client.insert("theirs", [{"id": 1, "vector": [1.0, 0.0, 0.0, 0.0]}])
        with DelfIndex(client=client, collection="products", settings=FAST) as index:
            index.add(make_photo(1), "one")
            assert index.search(cropped(1)).matched
        assert set(client.list_collections()) == {"theirs", "products_features", "products_images"}
        assert client.query("theirs", ids=[1], output_fields=["id"])[0]["id"] == 1
    finally:
        client.close()


def test_every_error_has_one_line_and_a_documented_exit_code() -> None:
    def subclasses(kind: type[DelfMilvusError]) -> Iterator[type[DelfMilvusError]]:
        for subclass in kind.__subclasses__():
            yield subclass
            yield from subclasses(subclass)

    codes = {kind.exit_code for kind in subclasses(DelfMilvusError)}
    assert codes <= {2, 3, 4, 5}


def test_jpeg_bytes_are_accepted(own: DelfIndex) -> None:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(1)).save(buffer, "JPEG", quality=85)
    assert own.add(buffer.getvalue(), "jpeg") > 0
    assert own.search(cropped(1)).hits[0].image_id == "jpeg"
