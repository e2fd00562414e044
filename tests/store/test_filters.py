"""Declared fields and filter expressions: types, escapes, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import InputError, UsageError
from delf_milvus.store.fields import DeclaredField, declared, typed_values
from delf_milvus.store.filters import both, expression, quoted

FIELDS = declared({"tenant": "text", "year": "integer=0", "price": "number", "sold": "boolean=false"})


def test_a_declaration_is_read_as_it_was_written() -> None:
    for field in FIELDS:
        assert DeclaredField.parse(field.name, field.declaration) == field
    assert {field.name: field.default for field in FIELDS} == {
        "price": None,
        "sold": False,
        "tenant": None,
        "year": 0,
    }


@pytest.mark.parametrize(
    ("name", "declaration", "problem"),
    [
        ("9lives", "text", "cannot name"),
        ("", "text", "cannot name"),
        ("a-b", "text", "cannot name"),
        ("x" * 65, "text", "cannot name"),
        ("year", "date", "the types are text, integer, number, boolean"),
        ("year", "integer=soon", "'soon', not a 64-bit integer"),
        ("year", "integer=9223372036854775808", "64-bit"),
        ("price", "number=nan", "finite"),
        ("sold", "boolean=perhaps", "true or false"),
    ],
)
def test_declarations_that_make_no_sense_are_refused(name: str, declaration: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        DeclaredField.parse(name, declaration)


def test_values_of_tables_become_typed() -> None:
    metadata = {"tenant": "a", "year": "1999", "price": "2.5", "sold": "TRUE", "colour": "red"}
    values = typed_values(FIELDS, metadata, "'x'")
    assert values == {"tenant": "a", "year": 1999, "price": 2.5, "sold": True}
    assert typed_values(FIELDS, {"tenant": "", "price": 1}, "'x'")["year"] == 0


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"price": 1}, "'x' has no 'tenant', which this collection requires"),
        ({"tenant": 5, "price": 1}, "'tenant' of image 'x' is 5, not text"),
        ({"tenant": "a\0", "price": 1}, "valid text"),
        ({"tenant": "\udcff", "price": 1}, "valid text"),
        ({"tenant": "ü" * 513, "price": 1}, "at most 1024 bytes"),
        ({"tenant": "a", "price": float("inf")}, "finite"),
        ({"tenant": "a", "price": True}, "not a number"),
        ({"tenant": "a", "price": 1, "year": 1.5}, "64-bit integer"),
        ({"tenant": "a", "price": 1, "year": [1]}, "64-bit integer"),
        ({"tenant": "a", "price": 1, "sold": "yes"}, "true or false"),
    ],
)
def test_values_that_do_not_fit_are_input_errors(metadata: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        typed_values(FIELDS, metadata, "'x'")


def test_a_mapping_becomes_an_expression_of_its_escaped_values() -> None:
    wanted = {"tenant": 'a" or "1"=="1', "year": {">=": 2020, "in": [2020, 2021]}, "sold": True, "price": {"<": 1}}
    assert expression(wanted, FIELDS) == (
        r'(tenant == "a\" or \"1\"==\"1") and (year >= 2020) and (year in [2020, 2021]) and (sold == true)'
        " and (price < 1.0)"
    )
    assert expression({}, FIELDS) == ""


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"colour": "red"}, "'colour', but the declared ones are price, sold, tenant, year"),
        ({"year": "soon"}, "not a 64-bit integer"),
        ({"year": {"like": "1%"}}, "no operator"),
        ({"year": {"; drop": 1}}, "no operator"),
        ({"tenant": {"in": "ab"}}, "takes a list"),
    ],
)
def test_mappings_that_do_not_fit_are_usage_errors(wanted: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        expression(wanted, FIELDS)


@pytest.mark.parametrize(
    "text",
    [
        'tenant == "a" and year >= 2020',
        "tenant in ['a', 'b'] or not (sold == true)",
        'tenant like "a)(%"',
        "year % 2 == 0 && price < -1.5e3",
        r'tenant == "a\"b"',
        "(" * 64 + "year > 1" + ")" * 64,
        " or ".join(["not (year == -1)"] * 500),
    ],
)
def test_whole_expressions_over_declared_fields_are_taken_as_they_are(text: str) -> None:
    assert expression(f" {text} ", FIELDS) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1 == 1) or (1 == 1", "which was not opened"),
        ("(year > 1", "ends before"),
        ("(year in [1)]", "not opened"),
        ('tenant == "a', "cannot be read from character 11"),
        ('tenant == "a\n"', "cannot be read"),
        ("colour == 1", "'colour'"),
        ("json_contains(tenant, 1)", "'json_contains'"),
        ("year == 1; drop", "cannot be read"),
        ("year > 1 # tenant", "cannot be read"),
        ("year > " + "1" * 30_000, "20000"),
        ("(" * 65 + "year > 1" + ")" * 65, "nested more than 64"),
        ("not " * 65 + "sold", "nested more than 64"),
        ("year > " + "- + " * 33 + "1", "nested more than 64"),
    ],
)
def test_text_that_is_no_whole_expression_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        expression(text, FIELDS)


def test_without_declared_fields_every_name_is_refused() -> None:
    with pytest.raises(UsageError, match="this collection declares none"):
        expression("year > 1", ())


def test_both_conditions_hold_and_an_empty_one_always_does() -> None:
    assert both("a", "b or c") == "(a) and (b or c)"
    assert both("", "b") == both("b", "") == "b"


def closed(text: str) -> bool:
    """Whether quotes and parentheses close, by a plain walk."""
    depth: list[str] = []
    quote = ""
    characters = iter(text)
    for c in characters:
        if quote:
            if c == "\\":
                next(characters, "")
            elif c == quote:
                quote = ""
        elif c in "\"'":
            quote = c
        elif c in "([":
            depth.append(c)
        elif c in ")]" and (not depth or depth.pop() + c not in ("()", "[]")):
            return False
    return not quote and not depth


@given(st.text(alphabet="()[]\"'\\ =1a\n", max_size=30))
def test_whatever_is_accepted_cannot_end_the_condition_around_it(text: str) -> None:
    try:
        accepted = expression(text, declared({"a": "integer"}))
    except UsageError:
        return
    assert closed(accepted)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_a_quoted_text_is_one_closed_string(text: str) -> None:
    literal = quoted(text)
    assert closed(literal)
    assert not closed(literal[:-1])
    assert expression(f"tenant == {literal}", FIELDS) == f"tenant == {literal}"
