import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.features import Features
from delf_milvus.imaging.attention import attention_picture

GREY = 128


def plain(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def features_of(size: tuple[int, int], places: list[tuple[float, float]], attention: list[float]) -> Features:
    count = len(places)
    return Features(
        np.array(places, np.float32).reshape(-1, 2),
        np.ones(count, np.float32),
        np.array(attention, np.float32),
        np.eye(max(count, 1), 40, dtype=np.float32)[:count],
        *size,
    )


def tinted(picture: np.ndarray) -> np.ndarray:
    return np.ptp(picture.astype(int), axis=2) > 12


def yellow(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0].astype(int) - picture[..., 2] > 80


def test_a_keypoint_is_a_circle_around_its_place_as_wide_as_its_cell() -> None:
    attention = np.full((48, 64), 1e-9, np.float32)
    picture = attention_picture(
        plain(640, 480), features_of((640, 480), [(320, 240)], [1.0]), attention, cell=64, caption=""
    )
    left = picture[12:552, 12:732]
    rows, columns = np.nonzero(yellow(left) | (left < 40).all(axis=2))
    scale = 720 / 640
    assert columns.mean() == pytest.approx(320.5 * scale, abs=1)
    assert rows.mean() == pytest.approx(240.5 * scale, abs=1)
    assert np.ptp(columns) == pytest.approx(64 * scale, abs=5)


def test_the_map_is_bright_where_attention_is_and_grey_where_nothing_is_kept() -> None:
    attention = np.full((30, 40), 0.001, np.float32)
    attention[10, 30] = 5.0
    picture = attention_picture(
        plain(640, 480), features_of((640, 480), [(480, 160)], [1.0]), attention, cell=16, caption=""
    )
    right = picture[12:552, 744:1464]
    rows, columns = np.nonzero(yellow(right))
    assert columns.mean() == pytest.approx(30.5 / 40 * 720, abs=8)
    assert rows.mean() == pytest.approx(10.5 / 30 * 540, abs=8)
    assert not tinted(right[300:]).any()


def test_the_strongest_keypoints_are_the_brightest() -> None:
    attention = np.full((10, 10), 0.1, np.float32)
    features = features_of((400, 400), [(100, 200), (300, 200)], [1.0, 0.1])
    picture = attention_picture(plain(400, 400), features, attention, cell=40, caption="")
    strong, weak = picture[12:732, 12:372], picture[12:732, 372:732]
    assert yellow(strong).sum() > 100
    assert not yellow(weak).any()
    assert tinted(weak).sum() > 100


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 3000), (3000, 1), (7, 2), (2000, 30), (640, 480), (5, 900)]),
    st.integers(0, 30),
    st.sampled_from([0.0, 1e-9, 1.0, 1e6]),
    st.text(max_size=200),
)
def test_any_photo_gives_a_picture_of_readable_size(
    size: tuple[int, int], count: int, strength: float, caption: str
) -> None:
    rng = np.random.default_rng(count)
    places = (rng.random((count, 2)) * size).tolist()
    attention = sorted((rng.random(count) * strength).astype(np.float32).tolist(), reverse=True)
    heat = (rng.random((3, 5)) * strength).astype(np.float32)
    picture = attention_picture(plain(*size), features_of(size, places, attention), heat, cell=16, caption=caption)
    assert picture.dtype == np.uint8
    assert 240 <= picture.shape[0] <= 2 * 720 + 200
    assert 240 <= picture.shape[1] <= 2 * 720 + 40
