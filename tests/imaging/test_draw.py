import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from delf_milvus.errors import InputError, UsageError
from delf_milvus.imaging.decode import decode
from delf_milvus.imaging.draw import match_picture, save_picture
from delf_milvus.settings import DecodeSettings

NO_POINTS = np.zeros((0, 2), np.float32)
GREY = 128


def plain(width: int, height: int, value: int = GREY) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def picture_of(
    query: np.ndarray,
    image: np.ndarray,
    query_points: np.ndarray = NO_POINTS,
    image_points: np.ndarray = NO_POINTS,
    residuals: np.ndarray | None = None,
    transform: np.ndarray | None = None,
    caption: str = "",
) -> np.ndarray:
    return match_picture(
        query, image, query_points, image_points, residuals=residuals, transform=transform, caption=caption
    )


def coloured(picture: np.ndarray) -> np.ndarray:
    """Mask of the pixels that are not grey, black or white: lines, keypoints, outline, legend."""
    return np.ptp(picture.astype(int), axis=2) > 40


def points(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, np.float32)


def test_two_photos_of_different_size_stand_at_one_height() -> None:
    picture = picture_of(plain(600, 400), plain(1500, 1000, 60))
    left = np.flatnonzero((picture == GREY).all(axis=2).any(axis=1))
    right = np.flatnonzero((picture == 60).all(axis=2).any(axis=1))
    assert len(left) == len(right) == 480
    assert (left == right).all()


def test_a_line_joins_the_two_keypoints() -> None:
    ends = points((20, 200)), points((380, 200))
    picture = picture_of(plain(400, 400), plain(400, 400), *ends)
    rows, columns = np.nonzero(coloured(picture))
    # The panels are 720 wide and 12 apart.
    assert columns.min() == pytest.approx(12 + 20.5 * 1.8, abs=6)
    assert columns.max() == pytest.approx(12 + 720 + 12 + 380.5 * 1.8, abs=6)
    assert rows.mean() == pytest.approx(12 + 200.5 * 1.8, abs=2)
    assert len(set(columns)) == columns.max() - columns.min() + 1


def test_the_keypoint_of_a_single_pixel_is_in_its_middle() -> None:
    picture = picture_of(plain(1, 1), plain(1, 1), points((0, 0)), points((0, 0)))
    rows, columns = np.nonzero(coloured(picture))
    assert rows.mean() == pytest.approx(12 + 359.5, abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((12 + 359.5, 744 + 359.5), abs=5)


def test_lines_of_small_and_large_residuals_differ_in_colour() -> None:
    query_points, image_points = points((50, 100), (50, 300)), points((350, 100), (350, 300))
    residuals = np.array([0.5, 20.0], np.float32)
    picture = picture_of(plain(400, 400), plain(400, 400), query_points, image_points, residuals)
    small, large = (picture[12 + round((y + 0.5) * 1.8), 12 + round(50.5 * 1.8)].astype(int) for y in (100, 300))
    assert small[0] > small[2] + 100  # yellow
    assert large[2] > large[0] + 40  # blue


def test_the_legend_appears_with_residuals_only() -> None:
    ends = points((50, 100)), points((350, 100))
    without = picture_of(plain(400, 400), plain(400, 400), *ends)
    with_legend = picture_of(plain(400, 400), plain(400, 400), *ends, np.array([3], np.float32))
    assert with_legend.shape[0] > without.shape[0]
    assert coloured(with_legend[744:]).sum() > 1000
    assert not coloured(without[744:]).any()


def test_photos_stay_visible_below_hundreds_of_lines() -> None:
    rng = np.random.default_rng(0)
    query_points, image_points = (rng.uniform(0, 400, (600, 2)).astype(np.float32) for _ in range(2))
    picture = picture_of(plain(400, 400), plain(400, 400), query_points, image_points)
    panel = picture[12:732, 12:732].astype(int)
    assert np.abs(panel - GREY).max(axis=2).mean() < 70


def test_the_outline_of_the_query_is_drawn_where_the_transform_puts_it() -> None:
    transform = np.array([[0.5, 0, 100], [0, 0.5, 50]])
    picture = picture_of(plain(400, 400), plain(400, 400), transform=transform)
    rows, columns = np.nonzero(coloured(picture))
    scale, right = 720 / 400, 12 + 720 + 12
    assert (columns.min(), columns.max()) == pytest.approx((right + 100 * scale, right + 300 * scale), abs=4)
    assert (rows.min(), rows.max()) == pytest.approx((12 + 50 * scale, 12 + 250 * scale), abs=4)


def test_the_outline_of_an_identical_photo_is_visible_on_all_sides() -> None:
    picture = picture_of(plain(400, 400), plain(400, 400), transform=np.eye(2, 3))
    rows, columns = np.nonzero(coloured(picture))
    assert columns.min() + columns.max() == pytest.approx(2 * 744 + 719, abs=1)
    assert rows.min() + rows.max() == pytest.approx(2 * 12 + 719, abs=1)
    assert rows.min() < 12
    assert columns.min() < 744


def test_the_outline_never_reaches_the_query() -> None:
    picture = picture_of(plain(400, 400), plain(400, 400), transform=np.array([[1, 0.2, -900], [0, 3, -500]]))
    assert not coloured(picture[:, :738]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_degenerate_transform_draws_no_outline(value: float) -> None:
    transform = np.array([[value, 0, 0], [0, value, 0]])
    assert not coloured(picture_of(plain(9, 9), plain(9, 9), transform=transform)).any()


def test_a_caption_is_wrapped_into_the_width() -> None:
    short = picture_of(plain(300, 400), plain(300, 400), caption="one line")
    long = picture_of(plain(300, 400), plain(300, 400), caption="some words " * 30)
    word = picture_of(plain(300, 400), plain(300, 400), caption="W" * 200)
    assert long.shape[0] > short.shape[0]
    assert word.shape[0] > short.shape[0]
    for picture in (long, word):
        assert picture.shape[1] == short.shape[1]
        strip = picture[744:]
        assert (strip < 100).any()
        assert (strip[:, -8:] == 255).all()


def test_a_caption_without_end_is_cut() -> None:
    endless = picture_of(plain(30, 40), plain(30, 40), caption="word " * 100_000)
    many_lines = picture_of(plain(30, 40), plain(30, 40), caption="\n".join("abcdefghijklmnop"))
    assert endless.shape[0] == many_lines.shape[0] < 1000


def test_line_breaks_of_a_caption_are_kept() -> None:
    one = picture_of(plain(40, 40), plain(40, 40), caption="a b c")
    three = picture_of(plain(40, 40), plain(40, 40), caption="a\nb\nc")
    assert three.shape[0] == one.shape[0] + 2 * 25


def test_accents_and_other_scripts_are_drawn_and_not_replaced() -> None:
    drawn = {text: picture_of(plain(9, 9), plain(9, 9), caption=text).tobytes() for text in "éeЖЩ塔寺?□"}
    assert len(set(drawn.values())) == len(drawn)


def test_what_the_font_lacks_becomes_a_box_and_not_a_question_mark() -> None:
    box = picture_of(plain(9, 9), plain(9, 9), caption="□")
    for text in ("\ue000", "\U0001f5fc", "\udcff"):
        np.testing.assert_array_equal(picture_of(plain(9, 9), plain(9, 9), caption=text), box)


def test_decomposed_accents_look_like_composed_ones() -> None:
    np.testing.assert_array_equal(
        picture_of(plain(9, 9), plain(9, 9), caption="e\u0301"), picture_of(plain(9, 9), plain(9, 9), caption="é")
    )


def test_the_photos_given_are_not_drawn_on() -> None:
    query, image = plain(720, 720), plain(720, 720)
    picture_of(query, image, points((3, 3)), points((5, 5)), transform=np.eye(2, 3))
    assert (query == GREY).all()
    assert (image == GREY).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 3000), (3000, 1), (7, 2), (2000, 30), (640, 480), (5, 900)]),
    st.sampled_from([(1, 1), (1, 3000), (3000, 1), (640, 480), (33, 1999)]),
    st.integers(0, 40),
    st.text(max_size=300),
    st.floats(-1e9, 1e9),
)
def test_photos_of_any_shape_give_a_picture_of_readable_size(
    first: tuple[int, int], second: tuple[int, int], count: int, caption: str, slope: float
) -> None:
    rng = np.random.default_rng(count)
    ends = [(rng.random((count, 2)) * size).astype(np.float32) for size in (first, second)]
    transform = np.array([[slope, 0, 1], [1, 1, slope]])
    residuals = rng.random(count).astype(np.float32)
    picture = picture_of(plain(*first), plain(*second), *ends, residuals, transform, caption)
    assert picture.dtype == np.uint8
    assert 360 <= picture.shape[0] <= 720 + 300
    assert 480 <= picture.shape[1] <= 1440 + 100


def test_many_threads_draw_alike() -> None:
    ends = points((20, 200), (100, 30)), points((380, 200), (100, 90))

    def draw(_: int) -> bytes:
        return picture_of(plain(60, 40), plain(40, 40), *ends, transform=np.eye(2, 3), caption="Щ塔é " * 9).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(draw, range(24)))) == 1


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")])
def test_pictures_are_saved_in_the_format_of_the_suffix(suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / f"pair{suffix}"
    save_picture(path, plain(30, 20))
    with Image.open(path) as image:
        assert image.format == kind
    assert np.abs(decode(path, DecodeSettings()).astype(int) - GREY).max() <= 2
    assert os.listdir(path.parent) == [path.name]


def test_a_picture_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "pair.png"
    for value in (10, 20):
        save_picture(path, plain(3, 3, value))
    assert (decode(path, DecodeSettings()) == 20).all()
    assert os.listdir(tmp_path) == ["pair.png"]


@pytest.mark.parametrize("name", ["pair", "pair.gif", "pair.png.txt"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end with one of \.png"):
        save_picture(tmp_path / name, plain(3, 3))
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_picture(tmp_path / "file" / "pair.png", plain(3, 3))


def test_a_target_that_is_a_folder_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "pair.png").mkdir()
    with pytest.raises(InputError, match=r"pair\.png cannot be written"):
        save_picture(tmp_path / "pair.png", plain(3, 3))
    assert os.listdir(tmp_path) == ["pair.png"]


def test_a_picture_too_large_for_its_format_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no WEBP; use \.png"):
        save_picture(tmp_path / "wide.webp", plain(20_000, 2))


def test_the_part_that_was_searched_for_is_outlined_on_both_photos() -> None:
    transform = np.array([[0.5, 0, 100], [0, 0.5, 50]])
    picture = match_picture(
        plain(400, 400),
        plain(400, 400),
        NO_POINTS,
        NO_POINTS,
        residuals=None,
        transform=transform,
        caption="",
        box=(100, 0, 300, 200),
    )
    scale, right = 720 / 400, 12 + 720 + 12
    for side, (x0, y0, x1, y1) in (
        (picture[:, :738], (12 + 100 * scale, 12, 12 + 300 * scale, 12 + 200 * scale)),
        (picture[:, 738:], (right - 738 + 150 * scale, 12 + 50 * scale, right - 738 + 250 * scale, 12 + 150 * scale)),
    ):
        rows, columns = np.nonzero(coloured(side))
        assert (columns.min(), columns.max()) == pytest.approx((x0, x1), abs=4)
        assert (rows.min(), rows.max()) == pytest.approx((y0, y1), abs=4)
