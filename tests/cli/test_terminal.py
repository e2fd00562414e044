"""What somebody at a terminal sees: tables that fit, progress, pictures; and what scripts do not see of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_photo, save_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from delf_milvus.cli.output import shortened

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are Unix's", allow_module_level=True)

from terminal import on_terminal
from test_commands import call

LONG = "a-folder-with-a-long-name/" * 5
ANSWERS_SIXEL = {b"\x1b[c": b"\x1b[?62;4c"}
ANSWERS_NOTHING = {b"\x1b[c": b"\x1b[?62c"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    for seed in range(3):
        save_photo(folder / "photos" / LONG / f"{seed}.png", make_photo(seed))
    save_photo(folder / "query.png", np.ascontiguousarray(make_photo(2)[20:220, 30:300]))
    (folder / "photos" / "broken.jpg").write_bytes(b"no photo")
    return folder


@pytest.fixture(scope="module")
def ingested(workplace: Path) -> tuple[int, bytes]:
    """The first ingest, watched."""
    return on_terminal(workplace, "ingest", "photos", columns=140)


def seen(printed: bytes) -> str:
    """What is printed, without the codes that move and colour."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode())


def test_an_ingest_shows_how_far_and_how_fast_it_is_and_what_failed(ingested: tuple[int, bytes]) -> None:
    code, printed = ingested
    assert code == 1
    told = seen(printed)
    assert re.search(r"ingest .*4/4 +[0-9.]+ photos/s.*1 failed", told)
    assert "3 added" in told


def test_json_and_quiet_stay_clean_on_a_terminal(workplace: Path, ingested: tuple[int, bytes]) -> None:
    for arguments in (["--json", "ingest", "photos"], ["--json", "search", "query.png"], ["--json", "status"]):
        _, printed = on_terminal(workplace, *arguments, answers=ANSWERS_SIXEL)
        assert b"\x1b" not in printed
        assert json.loads(printed.decode().partition("{")[1] + printed.decode().partition("{")[2])
    code, printed = on_terminal(workplace, "-q", "search", "query.png", answers=ANSWERS_SIXEL)
    assert code == 0
    assert b"\x1b" not in printed


def test_tables_fit_the_terminal_and_are_whole_elsewhere(workplace: Path, ingested: tuple[int, bytes]) -> None:
    whole = call(workplace, "list").stdout.splitlines()
    assert whole[1].startswith(f"{LONG}0.png ")
    code, printed = on_terminal(workplace, "list", columns=60)
    assert code == 0
    lines = seen(printed).replace("\r", "").splitlines()
    assert len(lines) == len(whole)
    assert max(map(cell_len, lines)) <= 60
    assert re.match(r"a-folder\S*…\S*/0\.png +320 +240 +300$", lines[1])


def test_a_last_column_of_words_is_wrapped_in_its_place(tmp_path: Path) -> None:
    words = "what to do about it, told at some length, so that nobody has to ask"
    table = (
        f"from delf_milvus.cli.output import data_table; data_table(('n', 'what'), [(1, '{words}'), (2, 'nothing')])"
    )
    _, printed = on_terminal(tmp_path, columns=40, program=[sys.executable, "-c", table])
    lines = seen(printed).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 40
    assert [line[:3] for line in lines] == ["n  ", "1  ", *["   "] * (len(lines) - 3), "2  "]
    assert " ".join(line[3:] for line in lines[1:-1]) == words


def test_thumbnails_are_sixels_where_the_terminal_says_that_it_knows_them(
    workplace: Path, ingested: tuple[int, bytes]
) -> None:
    pytest.importorskip("textual_image")
    code, printed = on_terminal(workplace, "search", "query.png", answers=ANSWERS_SIXEL)
    assert code == 0
    assert printed.count(b"\x1bP") == 1  # the start of a sixel picture
    assert "1 verified" in seen(printed)
    code, without = on_terminal(workplace, "search", "query.png", "--no-thumbnails", answers=ANSWERS_SIXEL)
    assert b"\x1bP" not in without
    assert b"\x1b[c" not in without  # nobody is asked


def test_thumbnails_are_not_shown_by_a_terminal_that_knows_none(workplace: Path, ingested: tuple[int, bytes]) -> None:
    _, printed = on_terminal(workplace, "search", "query.png", answers=ANSWERS_NOTHING)
    assert "▀" not in printed.decode()
    _, printed = on_terminal(workplace, "search", "query.png", TERM="dumb")
    assert b"\x1b[c" not in printed


def test_thumbnails_on_request_are_half_blocks_anywhere(workplace: Path, ingested: tuple[int, bytes]) -> None:
    pytest.importorskip("textual_image")
    result = call(workplace, "search", "query.png", "--thumbnails")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert sum("▀" in line for line in lines) > 5
    assert lines[-2].split() == ["query", "1", "verified"]
    assert "▀" not in call(workplace, "search", "query.png").stdout


def test_thumbnails_without_their_library_say_what_to_install(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "textual_image.py").write_text("raise ModuleNotFoundError(name='textual_image')")
    result = call(workplace, "search", "query.png", "--thumbnails", PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'delf-milvus[terminal]'" in result.stderr


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc", "Mn", "Me", "Cf")), max_size=60),
    st.integers(1, 40),
)
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shortened(text, width)
    assert cell_len(short) <= width
    if cell_len(text) <= width:
        assert short == text
    elif width >= 3:
        head, ellipsis, tail = short.partition("…") if "…" not in text else (short, "", "")
        assert text.startswith(head)
        assert not ellipsis or text.endswith(tail)


def test_lines_of_a_training_stay_above_its_bar_and_quiet_shows_neither(tmp_path: Path) -> None:
    training = (
        "import sys, time\n"
        "from delf_milvus.cli.progress import Watched\n"
        "with Watched('-q' not in sys.argv, '-q' in sys.argv) as watched:\n"
        "    watched.progress('finetune', 80, 160, 'photos')\n"
        "    watched('epoch 1: [loss] 0.5')\n"
        "    time.sleep(0.2)\n"
        "    watched.progress('finetune', 120, 160, 'photos')\n"
        "print('done')"
    )
    _, printed = on_terminal(tmp_path, columns=100, program=[sys.executable, "-c", training])
    told = seen(printed)
    assert "epoch 1: [loss] 0.5\r\n" in told
    speed = re.search(r"finetune .*120/160 +([0-9.]+) photos/s", told)
    # The 80 photos of an earlier run are not counted.
    assert speed
    assert float(speed[1]) < 210
    _, printed = on_terminal(tmp_path, "-q", columns=100, program=[sys.executable, "-c", training])
    assert printed == b"done\r\n"
