"""Declared metadata fields: typed columns of an image that a search can be filtered by.

A declared field is a real field of both collections, copied from the image to each of its features, so that Milvus
filters inside the vector search. Everything else that an image carries is free metadata, for display.

A declaration is text: `integer`, or `integer=0` with a value for images that do not have the field. Without a default
an image that lacks the field is refused: a filter would neither find it nor say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from delf_milvus.errors import InputError, UsageError

FieldKind = Literal["text", "integer", "number", "boolean"]
Value = str | int | float | bool

MAX_TEXT_BYTES = 1024
"""Longest value of a text field, UTF-8 bytes."""

MAX_FIELDS = 32
"""Most declared fields of a collection: Milvus takes 64 fields, and ours need about half of them at most."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class DeclaredField:
    """One declared field. default: the value of images without it, or None where it is required."""

    name: str
    kind: FieldKind
    default: Value | None = None

    @staticmethod
    def parse(name: str, declaration: str) -> DeclaredField:
        """A field by its declaration, "integer" or "integer=0"; raises UsageError."""
        kind, has_default, default = declaration.partition("=")
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot name a field: use at most 64 letters, digits and underscores.")
        if kind not in get_args(FieldKind):
            kinds = ", ".join(get_args(FieldKind))
            raise UsageError(f"The field {name!r} has the type {kind!r}; the types are {kinds}.")
        field = DeclaredField(name, kind)  # type: ignore[arg-type] # checked above
        if not has_default:
            return field
        try:
            return DeclaredField(name, field.kind, field.value(default))
        except ValueError as error:
            raise UsageError(f"The default of the field {name!r} {error}.") from None

    @property
    def declaration(self) -> str:
        """The text that `parse` makes this field of."""
        if self.default is None:
            return self.kind
        return f"{self.kind}={str(self.default).lower() if self.kind == 'boolean' else self.default}"

    def value(self, given: Any) -> Value:
        """A value as it is stored; texts that state a number or a truth are taken. Raises ValueError with a reason."""
        if self.kind == "text":
            if not isinstance(given, str):
                raise ValueError(f"is {given!r}, not text")
            if not _storable(given):
                raise ValueError(f"is not valid text of at most {MAX_TEXT_BYTES} bytes")
            return given
        if self.kind == "boolean":
            if isinstance(given, str):
                given = _TRUTH.get(given.strip().lower(), given)
            if not isinstance(given, bool):
                raise ValueError(f"is {given!r}, not true or false")
            return given
        if isinstance(given, bool):
            raise ValueError(f"is {given!r}, not a number")
        try:
            return self._integer(given) if self.kind == "integer" else self._number(given)
        except (ValueError, TypeError, OverflowError):
            wanted = "a 64-bit integer" if self.kind == "integer" else "a finite number"
            raise ValueError(f"is {given!r}, not {wanted}") from None

    @staticmethod
    def _integer(given: Any) -> int:
        number = int(given) if isinstance(given, str) else given
        if not isinstance(number, int | float) or number != int(number) or not -(2**63) <= number < 2**63:
            raise ValueError(given)
        return int(number)

    @staticmethod
    def _number(given: Any) -> float:
        number = float(given)
        if not math.isfinite(number):
            raise ValueError(given)
        return number


def declared(declarations: Mapping[str, str]) -> tuple[DeclaredField, ...]:
    """The fields of {name: declaration}, in order of their names; raises UsageError."""
    if len(declarations) > MAX_FIELDS:
        raise UsageError(f"At most {MAX_FIELDS} fields can be declared, not {len(declarations)}.")
    return tuple(DeclaredField.parse(name, declarations[name]) for name in sorted(declarations))


def typed_values(fields: Sequence[DeclaredField], metadata: Mapping[str, Any], shown: str) -> dict[str, Value]:
    """The declared values of an image, {name: value}.

    metadata: all that it carries; `shown` names the image in messages. None counts as absent.
    Raises InputError for a value of another type, or a missing one without a default.
    """
    values: dict[str, Value] = {}
    for field in fields:
        given = metadata.get(field.name)
        if given is None and field.default is None:
            raise InputError(f"Image {shown} has no {field.name!r}, which this collection requires ({field.kind}).")
        try:
            values[field.name] = field.default if given is None and field.default is not None else field.value(given)
        except ValueError as error:
            raise InputError(f"The {field.name!r} of image {shown} {error}.") from None
    return values


def _storable(text: str) -> bool:
    try:
        return len(text.encode()) <= MAX_TEXT_BYTES and "\0" not in text
    except UnicodeEncodeError:
        return False
