from pathlib import Path

import jinja2
import numpy as np
import pytest
from pages import checked

from delf_milvus.errors import InputError
from delf_milvus.imaging.report import PictureSpace, page, write_page

HOSTILE = "<script>alert('x')</script>\" onerror=\"alert(1)&amp;\n\x1b[31m\u202e.jpg"


def values(**changed: object) -> dict[str, object]:
    return {"title": "title", "lead": "lead", "queries": [], "failures": [], "made": ["now"], **changed}


def test_names_of_strangers_are_shown_and_do_nothing() -> None:
    html = page("search", values(title=HOSTILE, failures=[HOSTILE]))
    read = checked(html)
    shown = "<script>alert('x')</script>\" onerror=\"alert(1)&amp;\\n\\x1b[31m\\u202e.jpg"
    assert read.text.count(shown) == 3  # of the title, the heading and the list
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_value_that_a_template_lacks_is_an_error_and_no_gap() -> None:
    with pytest.raises(jinja2.UndefinedError):
        page("search", {"title": "title"})


def test_a_page_is_written_whole_and_in_utf8(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, "search", values(title="Hội An"))
    assert "Hội An" in path.read_text(encoding="utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", "search", values())


def test_pictures_are_shrunk_and_described() -> None:
    one = PictureSpace().embed(np.full((300, 900, 3), 90, np.uint8), "a\nb", 300)
    assert one is not None
    assert (one.width, one.height, one.alt) == (300, 100, "a\\nb")
    assert PictureSpace().embed(np.full((1, 30_000, 3), 90, np.uint8), "wide", 40_000) is not None


def test_a_page_holds_no_more_than_its_space() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    space = PictureSpace(most_bytes=100_000)
    embedded = [space.embed(noise, "noise", 200) for _ in range(40)]
    kept = [one for one in embedded if one is not None]
    assert 0 < len(kept) < 40
    assert sum(len(one.src) for one in kept) <= 100_000 + 40 * len(kept)
    # Once it is full it stays so: no later picture takes the place of an earlier one.
    assert embedded[len(kept) :] == [None] * (40 - len(kept))
