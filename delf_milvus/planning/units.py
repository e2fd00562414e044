"""Numbers as people write them: 10M images, 1.5B rows; and sizes and times as they read them."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from delf_milvus.errors import UsageError, one_line

_SUFFIXES = (("T", 12), ("B", 9), ("M", 6), ("k", 3), ("", 0))
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_LONGEST = 24


def parse_count(text: str) -> int:
    """A whole number of things: "250000", "250k", "10M", "1.5B", "2T"; "_" and "," between digits count nothing.

    Raises UsageError for what is no number, not whole, or negative.
    """
    plain = text.strip().replace("_", "").replace(",", "")
    power = 0
    for suffix, exponent in _SUFFIXES[:-1]:
        if plain[-1:].upper() == suffix.upper():
            plain, power = plain[:-1].rstrip(), exponent
            break
    # Digits alone: Decimal takes "1e9999999", "nan" and "inf" too, and the digits of every script.
    if plain and len(plain) <= _LONGEST and plain.isascii() and set(plain) <= set("0123456789."):
        try:
            value = Decimal(plain).scaleb(power)
        except InvalidOperation:
            value = Decimal("0.5")
        if value == value.to_integral_value():
            return int(value)
    raise UsageError(f"{one_line(text)!r} is no number of things: write 250000, 250k, 10M or 1.5B.")


def count_text(count: int) -> str:
    """The inverse of `parse_count`, as short as it can be without rounding: 1500000000 is "1.5B"."""
    for suffix, exponent in _SUFFIXES:
        if count >= 10**exponent:
            return f"{Decimal(count).scaleb(-exponent).normalize():f}{suffix}"
    return "0"


def rounded_text(count: float) -> str:
    """A number of things to three digits, with a suffix: 5161110 is "5.16M"."""
    for suffix, exponent in _SUFFIXES[:-1]:
        if count >= 10**exponent:
            return f"{_three(count / 10**exponent)}{suffix}"
    return _three(count)


def bytes_text(size: float) -> str:
    """A size to three digits, in powers of a thousand: "44.1 GB"."""
    unit, scale = next(((unit, scale) for unit, scale in _BYTES if size >= scale), _BYTES[-1])
    return f"{_three(size / scale)} {unit}"


def seconds_text(seconds: float) -> str:
    """A time to three digits: "35 ms", "12.5 s", "3.4 min", "41 h", "12 days"."""
    if seconds < 1:
        return f"{_three(1e3 * seconds)} ms"
    for unit, scale, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 345_600)):
        if seconds < limit:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds / 86_400)} days"


def _three(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
