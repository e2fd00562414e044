import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.imaging.sheet import Tile, contact_sheet, fitting, outlined

GREY = 128
VERIFIED = (0, 114, 178)


def plain(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def pink(picture: np.ndarray) -> np.ndarray:
    """Mask of the pixels of an outline."""
    red, green, blue = np.moveaxis(picture.astype(int), 2, 0)
    return (red > 200) & (green < 120) & (blue > 130)


def test_tiles_come_in_rows_each_with_its_frame() -> None:
    tiles = [
        Tile(plain(64, 48), "query", ["query"]),
        Tile(plain(64, 48), "verified", ["1. a.jpg", "verified"]),
        Tile(plain(64, 48), "unverified", ["2. b.jpg", "not verified"]),
    ]
    sheet = contact_sheet(tiles)
    # Two columns of 240 pixels, the third tile below the first.
    assert tuple(sheet[18, 16 + 256 + 120]) == VERIFIED
    assert tuple(sheet[18, 16 + 120]) != VERIFIED
    assert sheet.shape[1] == 2 * 256 + 16
    assert sheet.shape[0] > 2 * 240


def test_words_below_a_tile_are_drawn_and_stay_below_it() -> None:
    name = "a/very/long/path/" * 20 + "tower.jpg"
    sheet = contact_sheet([Tile(plain(64, 48), "query", ["query"]), Tile(plain(9, 9), "verified", [name])])
    below = sheet[260:285]
    assert (below[:, 272:512] < 100).any()
    assert (below[:, 512:] == 255).all()


def test_a_missing_photo_leaves_its_place() -> None:
    sheet = contact_sheet([Tile(None, "verified", ["1. a.jpg"]), Tile(plain(9, 9), "verified", ["2. b.jpg"])])
    inside = sheet[30:240, 30:240]
    assert (inside < 120).any()
    assert (inside == 240).all(axis=2).mean() > 0.9


def test_the_outline_lies_where_it_is_in_the_photo() -> None:
    photo = plain(1000, 500)
    outline = np.array([[250, 125], [750, 125], [750, 375], [250, 375]], np.float64)
    small = outlined(photo, 200, outline)
    assert small.shape == (100, 200, 3)
    rows, columns = np.nonzero(pink(small))
    assert (columns.min(), columns.max()) == pytest.approx((50, 150), abs=2)
    assert (rows.min(), rows.max()) == pytest.approx((25, 75), abs=2)
    assert (photo == GREY).all()


def test_a_degenerate_outline_is_left_out() -> None:
    for value in (np.nan, np.inf, 1e30):
        assert not pink(outlined(plain(90, 90), 50, np.full((4, 2), value))).any()


def test_points_shrink_with_their_photo() -> None:
    small, points = fitting(plain(800, 400), 200, np.array([[-0.5, -0.5], [799.5, 399.5]]))
    assert small.shape == (100, 200, 3)
    assert points is not None
    np.testing.assert_allclose(points, [[-0.5, -0.5], [199.5, 99.5]])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([(1, 1), (1, 3000), (3000, 1), (640, 480), (7, 2)]), min_size=1, max_size=23),
    st.text(max_size=80),
)
def test_photos_of_any_shape_make_a_sheet_of_bounded_size(sizes: list[tuple[int, int]], text: str) -> None:
    outline = np.array([[0, 0], [5, 0], [5, 5]], np.float64)
    sheet = contact_sheet([Tile(plain(*size), "unverified", [text, text], outline) for size in sizes])
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] <= 5 * 256 + 16
    assert sheet.shape[0] <= len(sizes) * 340 + 16


def test_a_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs tiles"):
        contact_sheet([])
