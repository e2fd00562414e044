"""Numbers as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delf_milvus.errors import UsageError
from delf_milvus.planning.units import bytes_text, count_text, parse_count, rounded_text, seconds_text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("250000", 250_000),
        ("250k", 250_000),
        ("250K", 250_000),
        ("10M", 10**7),
        ("10 m", 10**7),
        ("1.5B", 1_500_000_000),
        ("1_000,000", 10**6),
        (".5k", 500),
        ("2T", 2 * 10**12),
    ],
)
def test_numbers_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "M", "ten", "-1", "1.5", "1e9", "nan", "inf", "1.2.3", "0.0001k", "10MM", "10G", "١٠", "9" * 99, "1\x1b"],
)
def test_what_is_no_number_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"write 250000, 250k, 10M or 1\.5B") as refused:
        parse_count(text)
    assert str(refused.value).isprintable()


@given(st.integers(0, 10**18))
def test_every_number_survives_the_round_trip(count: int) -> None:
    assert parse_count(count_text(count)) == count


@given(st.integers(0, 10**15), st.sampled_from("kMBT"))
def test_a_suffix_is_its_power_of_ten(count: int, suffix: str) -> None:
    assert parse_count(f"{count}{suffix}") == count * 10 ** {"k": 3, "M": 6, "B": 9, "T": 12}[suffix]


def test_values_are_written_with_three_digits_and_a_unit() -> None:
    assert [bytes_text(size) for size in (0, 999, 44.1e9, 1.5e15)] == ["0 B", "999 B", "44.1 GB", "1500 TB"]
    assert [seconds_text(s) for s in (0.0354, 1, 90, 180, 7200, 86_400 * 12)] == [
        *("35.4 ms", "1 s", "90 s", "3 min", "2 h", "12 days")
    ]  # fmt: skip
    assert [rounded_text(count) for count in (0.0104, 7, 969, 5_162_220)] == ["0.0104", "7", "969", "5.16M"]
