import binascii

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_samples import random_features

from delf_milvus.features import MAX_FEATURES, Features
from delf_milvus.store.codec import MAX_TEXT, chunks_needed, pack, split, unpack


@st.composite
def any_features(draw: st.DrawFn) -> Features:
    count, dim = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    width, height = draw(st.integers(1, 20_000)), draw(st.integers(1, 20_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    around = draw(st.sampled_from([1.0, 1.2]))
    descriptors = rng.normal(size=(count, dim))
    peak = draw(st.sampled_from([1.0, 2.0**-13, 2.0**20]))
    attention = draw(hnp.arrays(np.float32, count, elements=st.floats(-peak, peak, width=32)))
    scales = hnp.arrays(np.float32, count, elements=st.floats(0.125, 16, width=32))
    return Features(
        (rng.uniform(-0.1, 1.1, (count, 2)) * around * (width, height)).astype(np.float32),
        draw(scales),
        np.sort(attention)[::-1].copy(),
        (descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)).astype(np.float32),
        width,
        height,
    )


@settings(max_examples=200, deadline=None)
@given(any_features())
def test_features_come_back_within_the_promised_rounding(features: Features) -> None:
    back = unpack(pack(features))
    assert (back.width, back.height, len(back), back.dim) == (
        features.width,
        features.height,
        len(features),
        features.dim,
    )
    extent = max(features.width, features.height) * 1.5 + 2
    assert np.abs(back.locations - features.locations).max(initial=0) <= extent / 131070 * 1.1
    assert (back.scales == features.scales).all()
    assert np.allclose(back.attention, features.attention, rtol=1e-3, atol=0)
    assert (np.sum(back.descriptors * features.descriptors, axis=1) > 0.999).all()


def test_more_distinct_scales_than_the_table_has_rows_are_kept_exactly() -> None:
    features = random_features(np.random.default_rng(1), 600)
    varied = Features(
        features.locations,
        np.linspace(0.5, 3, 600, dtype=np.float32),
        features.attention,
        features.descriptors,
        features.width,
        features.height,
    )
    assert (unpack(pack(varied)).scales == varied.scales).all()


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_attention_beyond_float16_is_kept_exactly(factor: float) -> None:
    features = random_features(np.random.default_rng(2), 50)
    attention = features.attention * np.float32(factor)
    extreme = Features(
        features.locations, features.scales, attention, features.descriptors, features.width, features.height
    )
    assert (unpack(pack(extreme)).attention == attention).all()


def test_keypoints_in_the_photo_are_kept_within_a_hundredth_of_a_pixel() -> None:
    features = random_features(np.random.default_rng(3), 500)
    assert np.abs(unpack(pack(features)).locations - features.locations).max() < 0.01


@pytest.mark.parametrize(("count", "dim"), [(0, 40), (1, 1), (500, 40), (1000, 40), (1000, 128), (MAX_FEATURES, 128)])
def test_the_fields_of_a_collection_hold_what_it_was_made_for(count: int, dim: int) -> None:
    features = random_features(np.random.default_rng(4), count, dim)
    worst = Features(
        features.locations,
        np.linspace(1, 2, count, dtype=np.float32),
        np.linspace(1e9, 1, count, dtype=np.float32),
        features.descriptors,
        features.width,
        features.height,
    )
    for case in (features, worst):
        parts = split(pack(case), chunks_needed(count, dim))
        assert all(len(part) <= MAX_TEXT for part in parts)
        assert len(unpack("".join(parts))) == count


def test_what_does_not_fit_the_fields_is_refused() -> None:
    text = pack(random_features(np.random.default_rng(5), 2000, 40))
    with pytest.raises(ValueError, match="do not fit"):
        split(text, 1)


def test_the_usual_presets_need_one_field() -> None:
    assert chunks_needed(300, 40) == chunks_needed(500, 40) == 1


@pytest.mark.parametrize("text", ["", "DM", "not base64 at all!", "é", "A" * 4000])
def test_text_that_is_no_packed_features_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- the message depends on how it is broken
        unpack(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(binascii.a2b_base64(pack(random_features(np.random.default_rng(6), 20))))
    data[position % len(data)] ^= change
    with pytest.raises(ValueError):  # noqa: PT011 -- the message depends on what is hit
        unpack(binascii.b2a_base64(bytes(data)).decode())


@given(st.integers(0, 10**6))
def test_text_cut_short_is_refused(length: int) -> None:
    text = pack(random_features(np.random.default_rng(7), 20))
    with pytest.raises(ValueError):  # noqa: PT011 -- the message depends on where it is cut
        unpack(text[: length % len(text)])
