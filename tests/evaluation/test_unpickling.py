"""A pickle is read as data, or not at all."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.evaluation.unpickling import ForbiddenError, plain_pickle

GROUND_TRUTH = {
    "imlist": ["a", "b", "c"],
    "qimlist": ["q"],
    "gnd": [
        {
            "bbx": np.array([1.5, 2, 30, 40]),
            "easy": np.array([0, 2], np.int64),
            "hard": np.array([], ">i4"),
            "junk": [np.int64(1)],
        }
    ],
}
PLAIN = {**GROUND_TRUTH, "gnd": [{"bbx": [1.5, 2.0, 30.0, 40.0], "easy": [0, 2], "hard": [], "junk": [1]}]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ground_truth_with_arrays_is_read_in_every_protocol(protocol: int) -> None:
    assert plain_pickle(pickle.dumps(GROUND_TRUTH, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_any_shape_and_order(protocol: int) -> None:
    values = {
        "columns": np.asfortranarray(np.arange(6, dtype="<f4").reshape(2, 3)),
        "text": np.array(["one", "three"]),
        "sets": [{1, 2}, frozenset({"a"}), (True, None)],
        "bytes": [b"", b"\xff\0"],
    }
    assert plain_pickle(pickle.dumps(values, protocol)) == {
        **values, "columns": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "text": ["one", "three"]
    }  # fmt: skip


def test_a_pickle_of_python_2_is_read() -> None:
    assert plain_pickle(b"(dp0\nS'imlist'\np1\n(lp2\nS'caf\\xe9'\np3\nas.") == {"imlist": ["café"]}


class Attack:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        Attack(os.system, ("touch harmed",)),
        Attack(eval, ("1",)),
        Attack(getattr, (1, "real")),
        Attack(np.load, ("x",)),
        Attack(np.ndarray, ((10**9,),)),
        np.array([Attack(os.system, ("touch harmed",))], object),
        np.zeros(2, "i4,f8"),
        collections.OrderedDict(a=1),
        Path("x"),
        complex(1, 2),
        os.system,
        np.dtype("i4"),
        set,
    ],
)
def test_whatever_else_is_asked_for_ends_the_reading(
    value: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForbiddenError):
        plain_pickle(pickle.dumps({"imlist": [value]}, protocol))
    assert list(tmp_path.iterdir()) == []


def test_what_a_pickle_may_call_cannot_be_changed_by_it() -> None:
    # set, then BUILD with an attribute of it.
    program = b"\x80\x02cbuiltins\nset\nN}U\x05_callU\x01xs\x86b."
    with pytest.raises((ForbiddenError, ValueError)):
        plain_pickle(program)
    assert plain_pickle(pickle.dumps({1}, 2)) == {1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps(GROUND_TRUTH)[:-20],
        b"\x80\x04r\xff\xff\xff\xff.",  # an index of the memo that the unpickler in C makes 64 GB for
        b"\x8c\xff" + b"a" * 10,
        b"Pnumber\n.",
    ],
)
def test_what_is_no_pickle_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of either kind
        plain_pickle(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_data_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        plain_pickle(b"\x80\x04" + data)


def test_what_is_shared_is_walked_through_once() -> None:
    deep: Any = [1]
    for _ in range(200):
        deep = [deep, deep]
    found = plain_pickle(pickle.dumps(deep))
    assert found[0] is found[1]


@pytest.mark.parametrize("container", [lambda key: {key: 1}, lambda key: {key}, lambda key: frozenset({key})])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_keys_whose_hash_could_take_for_ever_are_refused(container: Any, protocol: int) -> None:
    with pytest.raises(ForbiddenError, match="a key of type tuple"):
        plain_pickle(pickle.dumps(container((1, 2)), protocol))


def test_a_key_that_doubles_itself_is_refused_before_it_is_hashed() -> None:
    # A tuple of the one before, twice, two hundred times over, as a key of a dict: its hash has no end.
    program = b"\x80\x04}K\x01" + b"2\x86" * 200 + b"K\x01s."
    with pytest.raises(ForbiddenError, match="a key of type tuple"):
        plain_pickle(program)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("shape", [(10**9, 0), (0, 10**9), (10**6, 10**6, 0)])
def test_an_array_of_nothing_takes_no_memory(shape: tuple[int, ...], protocol: int) -> None:
    with pytest.raises(ValueError, match="no whole pickle"):
        plain_pickle(pickle.dumps(np.empty(shape), protocol))


@pytest.mark.parametrize("length", [1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_length_without_its_bytes_takes_no_memory(length: int) -> None:
    with pytest.raises(ValueError, match=r"no whole pickle: (ValueError|UnpicklingError)"):
        plain_pickle(b"\x80\x05\x96" + length.to_bytes(8, "little") + b"short.")
