from hypothesis import given, settings
from hypothesis import strategies as st

from delf_milvus.imaging.lettering import Lettering


def test_a_path_keeps_both_ends_when_it_is_shortened() -> None:
    letters = Lettering()
    path = "holidays/2019/norway/" + "fjord/" * 30 + "tower.jpg"
    short = letters.shortened(path, 240)
    assert letters.width(short) <= 240
    assert short.startswith("holid")
    assert short.endswith("er.jpg")
    assert short.count("…") == 1
    # No more is left out than must be: the gap is less than two of the widest letters.
    assert letters.width(short) > 240 - 2 * letters.width("W")


def test_what_fits_is_left_as_it_is() -> None:
    assert Lettering().shortened("tower.jpg", 240) == "tower.jpg"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(40, 400))
def test_any_text_fits_its_width_in_one_line(text: str, width: int) -> None:
    letters = Lettering(15)
    short = letters.shortened(text, width)
    assert letters.width(short) <= width
    assert "\n" not in short


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab W\n", max_size=200), st.integers(40, 400))
def test_wrapping_loses_no_letter(text: str, width: int) -> None:
    letters = Lettering()
    lines = letters.wrapped(text, width, 500)
    assert all(letters.width(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
