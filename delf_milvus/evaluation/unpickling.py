"""Ground truth out of a pickle that strangers wrote, without running what it says.

A pickle is a program for a machine that may call anything. This one knows containers, text, numbers and numpy arrays
of them, which it builds itself from the bytes; whatever else is asked for ends the reading.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

_DTYPE = re.compile(r"[<>|=]?[biufSU]\d{0,4}")


class ForbiddenError(ValueError):
    """A pickle asks for something that is no plain value; the text is its name."""


def plain_pickle(data: bytes) -> Any:
    """The value of a pickle of any protocol: dict, list, tuple, set, str, bytes, int, float, bool and None, with numpy
    arrays as nested lists and numpy numbers as numbers.

    Raises ForbiddenError, with its name, for anything else in it; ValueError for bytes that are no pickle.
    """
    try:
        return _plain(_Plain(io.BytesIO(data), encoding="latin1").load(), {})
    except ForbiddenError:
        raise
    except Exception as error:  # which one, depends on where the bytes stop making sense
        raise ValueError(f"no whole pickle: {type(error).__name__}") from error


# The one in Python: that in C takes memory for any index that a few bytes name.
class _Plain(pickle._Unpickler):
    # What is shared in a pickle is there once, but its hash walks through it as often as it is reached: a few bytes for
    # years. So keys and members of sets are single values.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Dict(zip(map(_hashable, items[::2]), items[1::2], strict=True)))

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_hashable, items)))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(map(_hashable, items))

    def load_bytearray8(self) -> None:
        # The original takes memory for as many bytes as a pickle says, before it looks for them.
        (length,) = struct.unpack("<Q", self.read(8))
        data = self.read(min(length, sys.maxsize))
        if len(data) != length:
            raise ValueError("a bytearray is cut short")
        self.append(bytearray(data))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.DICT[0]: load_dict,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.ADDITEMS[0]: load_additems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def find_class(self, module: str, name: str) -> Any:
        call = _KNOWN.get((module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name))
        if call is None:
            raise ForbiddenError(f"{module}.{name}")
        return _Call(call)

    def get_extension(self, code: int) -> Any:
        raise ForbiddenError(f"extension {code}")

    def persistent_load(self, pid: Any) -> Any:
        raise ForbiddenError("a persistent reference")


class _Dict(dict[Any, Any]):
    """A dict as a pickle fills it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_hashable(key), value)


def _hashable(value: Any) -> Any:
    """A key of a dict or a member of a set, which must be a single value."""
    if not isinstance(value, str | bytes | int | float | None):
        raise ForbiddenError(f"a key of type {type(value).__name__}")
    return value


class _Call:
    """What a pickle may call. Nothing can be set in it: a pickle could otherwise change it for the next one."""

    __slots__ = ("_call",)

    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ForbiddenError("a change of a function")


class _Dtype:
    """The type of an array's elements, as a pickle tells it: by name first, then the order of its bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise ForbiddenError(f"an array of {name!r}")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array, as a pickle tells it: empty first, then all of it."""

    values: Any = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, data = state
        self.values = _values(data, dtype, shape, "F" if columns_first else "C")


def _values(data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, str | bytes | bytearray):
        raise ForbiddenError("an array of objects")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    # As lists even an array of nothing takes memory, for each of its rows.
    if math.prod(max(1, int(side)) for side in shape) > max(1, len(raw)):
        raise ValueError("an array is larger than its values")
    return np.frombuffer(raw, dtype.value).reshape(shape, order="F" if order == "F" else "C").tolist()


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> Any:
    array = _Array()
    array.values = _values(data, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return _values(data, dtype, (1,), "C")[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForbiddenError(f"text in {encoding!r}")
    return text.encode("latin1")


def _no_array(*_: Any) -> Any:
    raise ForbiddenError("an array without its values")


def _no_bytes() -> bytes:
    return b""


def _set(items: Any = ()) -> set[Any]:
    return set(map(_hashable, items))


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(map(_hashable, items))


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _no_array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    # How protocols below 3 write bytes and sets.
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _frozenset,
}


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """The value with its arrays as lists. known: what was made of the values seen so far, by their identity: what is
    shared stays shared, however often it is reached."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, _Call | _Dtype):
        raise ForbiddenError("a function instead of a value")
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in known:
        if isinstance(value, dict):
            known[id(value)] = {name: _plain(one, known) for name, one in value.items()}
        else:
            known[id(value)] = type(value)([_plain(one, known) for one in value])
    return known[id(value)]
