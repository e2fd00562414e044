import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.features import MAX_FEATURES
from delf_milvus.store.keys import IMAGE_KEY_BITS, feature_keys, image_key, split_keys


def test_the_key_of_an_id_never_changes() -> None:
    assert image_key("a.jpg") == 0x6FBE8991D5492
    assert image_key("a.jpg", tenant="t") == 0x64A16FBE1DE83


@given(st.text(), st.text())
def test_image_keys_have_51_bits(image_id: str, tenant: str) -> None:
    assert 0 <= image_key(image_id, tenant) < 1 << 51 == 1 << IMAGE_KEY_BITS


def test_moving_a_character_from_tenant_to_id_gives_another_key() -> None:
    assert len({image_key("bc", "a"), image_key("c", "ab"), image_key("abc"), image_key("", "abc")}) == 4


def test_an_id_of_undecodable_bytes_has_a_key() -> None:
    assert image_key("\udcff") != image_key("\udcfe")


@given(st.integers(0, (1 << IMAGE_KEY_BITS) - 1), st.integers(0, MAX_FEATURES))
def test_feature_keys_split_into_what_they_were_made_of(key: int, count: int) -> None:
    keys = feature_keys(key, count)
    images, ordinals = split_keys(keys)
    assert keys.dtype == np.int64
    assert (keys >= 0).all()
    assert (images == key).all()
    assert ordinals.tolist() == list(range(count))


def test_splitting_keeps_the_shape_and_the_padding() -> None:
    keys = np.array([[feature_keys(7, 3)[2], -1]])
    images, ordinals = split_keys(keys)
    assert images.tolist() == [[7, -1]]
    assert ordinals[0, 0] == 2


def test_keys_of_leftovers_start_where_asked() -> None:
    assert feature_keys(1, 5, first=3).tolist() == [4096 + 3, 4096 + 4]


@pytest.mark.parametrize(
    ("key", "count", "first"), [(-1, 1, 0), (1 << IMAGE_KEY_BITS, 1, 0), (0, MAX_FEATURES + 1, 0), (0, 2, 3)]
)
def test_keys_out_of_range_are_refused(key: int, count: int, first: int) -> None:
    with pytest.raises(ValueError, match=r"bits|ordinals"):
        feature_keys(key, count, first)
