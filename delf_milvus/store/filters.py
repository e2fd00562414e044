"""Filter expressions of a search, over the declared fields.

Two ways in. A mapping, `{"tenant": "a", "year": {">=": 2020}}`, is what programs should use: its values are data,
typed and escaped here, whatever they contain. Text is an expression in Milvus's own language, written by the person who
searches: it is not rewritten, but it must be one whole expression (strings and parentheses closed) over declared
fields, so that it can neither end early and escape the condition that it is combined with, nor fail obscurely in the
database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from delf_milvus.errors import UsageError
from delf_milvus.store.fields import DeclaredField

Filter = str | Mapping[str, Any]

MAX_FILTER = 20_000
"""Longest filter, characters."""

MAX_NESTING = 64
"""Levels of parentheses, and signs or `not` in a row: databases read a filter by recursion."""

_PREFIXES = frozenset({"not", "!", "-", "+"})
_WORDS = frozenset({"and", "or", "not", "in", "like", "true", "false"})
_OPERATORS = ("==", "!=", ">=", "<=", ">", "<", "in", "like")
_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
  | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<operator>==|!=|>=|<=|&&|\|\||[<>!+\-*/%,])
  | (?P<open>[(\[])
  | (?P<close>[)\]])
    """,
    re.VERBOSE,
)
_CLOSES = {"(": ")", "[": "]"}


def quoted(text: str) -> str:
    """The text as a string literal of a filter expression, so that it cannot end early or mean anything else.

    Characters beyond ASCII stay as they are: neither Milvus Lite nor Milvus 2.3 knows the escape \\u.
    """
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f'"{text}"'


def expression(given: Filter, fields: Sequence[DeclaredField]) -> str:
    """The filter as an expression of Milvus, "" for an empty one.

    Raises UsageError for text that is no whole expression, a field that is not declared, an operator that does not
    exist, or a value of another type than its field.
    """
    by_name = {field.name: field for field in fields}
    return _checked(given.strip(), by_name) if isinstance(given, str) else _built(given, by_name)


def both(first: str, second: str) -> str:
    """The expression that holds where both hold; an empty one always does."""
    return f"({first}) and ({second})" if first and second else first or second


def _checked(text: str, fields: Mapping[str, DeclaredField]) -> str:
    if len(text) > MAX_FILTER:
        raise UsageError(f"The filter has {len(text)} characters; at most {MAX_FILTER} are taken.")
    awaited: list[str] = []
    prefixes = 0
    place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise UsageError(f"The filter cannot be read from character {place + 1} on: {text[place : place + 20]!r}.")
        kind, content = token.lastgroup, token.group()
        if kind == "open":
            awaited.append(_CLOSES[content])
        elif kind == "close" and (not awaited or awaited.pop() != content):
            raise UsageError(f"The filter closes {content!r} at character {place + 1}, which was not opened.")
        elif kind == "word" and content.lower() not in _WORDS:
            _field(content, fields)
        if kind != "space":
            prefixes = prefixes + 1 if content.lower() in _PREFIXES else 0
        if len(awaited) > MAX_NESTING or prefixes > MAX_NESTING:
            raise UsageError(f"The filter is nested more than {MAX_NESTING} levels deep; write it flatter.")
        place = token.end()
    if awaited:
        raise UsageError(f"The filter ends before {awaited[-1]!r} closes what it opened.")
    return text


def _built(conditions: Mapping[str, Any], fields: Mapping[str, DeclaredField]) -> str:
    parts = []
    for name, wanted in conditions.items():
        field = _field(name, fields)
        for operator, value in (wanted if isinstance(wanted, Mapping) else {"==": wanted}).items():
            parts.append(_condition(field, operator, value))
    return " and ".join(f"({part})" for part in parts)


def _condition(field: DeclaredField, operator: str, value: Any) -> str:
    if operator not in _OPERATORS or (operator == "like" and field.kind != "text"):
        raise UsageError(
            f"{operator!r} is no operator of the field {field.name!r}; use one of {', '.join(_OPERATORS)}."
        )
    if operator == "in":
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UsageError(f"The operator 'in' of the field {field.name!r} takes a list of values, not {value!r}.")
        return f"{field.name} in [{', '.join(_literal(field, one) for one in value)}]"
    return f"{field.name} {operator} {_literal(field, value)}"


def _literal(field: DeclaredField, value: Any) -> str:
    try:
        stored = field.value(value)
    except ValueError as error:
        raise UsageError(f"The filter's {field.name!r} {error}.") from None
    if isinstance(stored, str):
        return quoted(stored)
    return str(stored).lower() if isinstance(stored, bool) else repr(stored)


def _field(name: str, fields: Mapping[str, DeclaredField]) -> DeclaredField:
    if name not in fields:
        known = f"the declared ones are {', '.join(fields)}" if fields else "this collection declares none"
        raise UsageError(f"The filter names the field {name!r}, but {known}.")
    return fields[name]
