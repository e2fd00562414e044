"""Pictures and pages of searches, evaluations and extractions, as a user asks for them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import make_photo, save_photo
from pages import checked
from test_commands import call

HOSTILE = '<script>alert("x")&amp;</script>.png'.replace("/", "\u2215")
HOSTILE_QUERY = '"><img src=x onerror=alert(1)>.png'


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four stored photos, one of a hostile name and one that has left the disk since; three queries, one no photo."""
    folder = tmp_path_factory.mktemp("showing")
    for seed in range(2):
        save_photo(folder / "photos" / f"{seed}.png", make_photo(seed))
    for seed, name in ((2, "hostile"), (3, "gone")):
        save_photo(folder / f"{name}.png", make_photo(seed))
    shutil.move(folder / "hostile.png", folder / "photos" / HOSTILE)
    shutil.move(folder / "gone.png", folder / "photos" / "gone.png")
    for seed, name in ((2, "a"), (3, "b"), (77, "stranger")):
        save_photo(folder / "queries" / f"{name}.png", np.ascontiguousarray(make_photo(seed)[20:220, 30:300]))
    shutil.move(folder / "queries" / "a.png", folder / "queries" / HOSTILE_QUERY)
    (folder / "queries" / "broken.jpg").write_bytes(b"no photo")
    result = call(folder, "ingest", "photos")
    assert result.returncode == 0, result.stderr
    (folder / "photos" / "gone.png").unlink()
    return folder


@pytest.fixture(scope="module")
def searched(workplace: Path) -> dict[str, str]:
    """A folder of queries, searched once with everything that can be written."""
    result = call(workplace, "search", "queries", "--out", "out", "--report", "report.html")
    assert result.returncode == 1  # one has no match, one is no photo
    return {"stdout": result.stdout, "stderr": result.stderr}


def test_each_query_has_its_table(searched: dict[str, str]) -> None:
    lines = searched["stdout"].splitlines()
    assert [line for line in lines if line.startswith("query: ")] == [
        f"query: queries/{name}" for name in (HOSTILE_QUERY, "b.png", "stranger.png")
    ]
    assert lines.count("no match") == 1
    assert searched["stderr"].count("failed: queries/broken.jpg is not a photo") == 1


def test_each_query_has_a_folder_with_pictures_sheet_and_result(workplace: Path, searched: dict[str, str]) -> None:
    folders = sorted(path.name for path in (workplace / "out").iterdir())
    assert [name.partition("_")[0] for name in folders] == ["0001", "0002", "0004"]
    first = workplace / "out" / folders[0]
    result = json.loads((first / "result.json").read_text())
    assert result["query"] == f"queries/{HOSTILE_QUERY}"
    assert result["hits"][0]["image_id"] == HOSTILE
    pictures = sorted(path.name for path in first.glob("*.png"))
    assert len(pictures) == 2
    assert pictures[1] == "contact_sheet.png"
    assert cv2.imread(str(first / "contact_sheet.png")).shape[1] == 2 * 256 + 16
    # The photo of its only answer is gone: the sheet says so, and there is no match picture.
    assert sorted(path.name for path in (workplace / "out" / folders[1]).iterdir()) == [
        "contact_sheet.png",
        "result.json",
    ]


def test_the_page_shows_every_query_whatever_it_is_called(workplace: Path, searched: dict[str, str]) -> None:
    html = (workplace / "report.html").read_text()
    page = checked(html)
    assert len(page.of("section")) == 5  # overview, failures and three queries
    assert page.text.count(HOSTILE) >= 3
    assert "<script" not in html
    assert "<img src=x" not in html
    assert f"The query, queries/{HOSTILE_QUERY}" in [image["alt"] for image in page.of("img")]
    assert re.search(r"No picture: \S*gone\.png does not exist", page.text)
    assert "No stored image is proved to show the same thing." in page.text
    assert "2 of 3 queries show something" in page.text
    assert "broken.jpg is not a photo" in page.text


def test_json_of_several_queries_is_one_object_a_line(workplace: Path, searched: dict[str, str]) -> None:
    result = call(workplace, "--json", "search", "queries/b.png", "queries/stranger.png")
    assert result.returncode == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == ["queries/b.png", "queries/stranger.png"]
    assert [answer["matched"] for answer in answers] == [True, False]
    both = call(workplace, "search", "queries/b.png", "queries/b.png")
    assert both.returncode == 0
    one = call(workplace, "--json", "search", "queries/b.png").stdout
    assert one.startswith("{\n")
    single, several = json.loads(one), answers[0]
    assert {**single, "timings": 0} == {**several, "timings": 0}


def test_a_page_of_one_query_and_of_a_part_of_it(workplace: Path) -> None:
    result = call(workplace, "search", "queries/b.png", "--box", "0,0,200,150", "--report", "new/one.html")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "report: new/one.html\n"
    page = checked((workplace / "new" / "one.html").read_text())
    assert len(page.of("section")) == 1
    assert "0, 0, 200, 150" in page.text


def test_a_page_of_features_has_no_photo_of_the_query(workplace: Path) -> None:
    assert call(workplace, "extract", "queries/b.png", "--out", "features").returncode == 0
    result = call(workplace, "search", "--features", "features/b.png.npz", "--report", "features.html")
    assert result.returncode == 0, result.stderr
    assert "The query was features" in checked((workplace / "features.html").read_text()).text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "queries", "--box", "0,0,9,9"], 2, "--box"),
        (["search", "queries", "--explain", "0.png"], 2, "--explain"),
        (["search", "queries", "--report", "page.pdf"], 2, ".html"),
        (["search", "queries/b.png", "--report", "folder.html"], 2, "is a folder"),
        (["search", "queries/b.png", "--report", "photos/0.png/page.html"], 5, "cannot be written"),
        (["search", "empty"], 5, "has no photos"),
        (["eval", "folders", "photos", "--group", "2", "--report", "page"], 2, ".html"),
        (["extract", "photos"], 2, "--out DIR"),
        (["extract", "photos/0.png", "--show", "queries/broken.jpg"], 5, "cannot be written"),
        (["show", "o.png"], 5, "did you mean 1.png or 0.png"),
        (["show", "elsewhere/GONE.png"], 5, "did you mean gone.png?"),
        (["show", "nothing-like-it"], 5, "delf-milvus list"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(
    workplace: Path, arguments: list[str], code: int, words: str
) -> None:
    (workplace / "folder.html").mkdir(exist_ok=True)
    (workplace / "empty").mkdir(exist_ok=True)
    result = call(workplace, *arguments)
    assert result.returncode == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("failed: ")] or [result.stderr]
    assert words in result.stderr
    assert "Traceback" not in line


def test_delete_says_what_may_have_been_meant(workplace: Path) -> None:
    result = call(workplace, "delete", "11.png")
    assert result.returncode == 5
    assert result.stderr.startswith("not stored: 11.png: did you mean 1.png")


def test_extract_draws_what_is_not_drawn_yet(workplace: Path) -> None:
    command = ["--json", "extract", "photos/0.png", "photos/1.png", "--show", "attention"]
    assert json.loads(call(workplace, *command).stdout)["extracted"] == 2
    picture = cv2.imread(str(workplace / "attention" / "0.png.jpg"))
    assert picture.shape[1] == 2 * 720 + 3 * 12
    assert json.loads(call(workplace, *command).stdout)["skipped"] == 2
    # Features beside the pictures that are there: the photos are read again for them.
    both = json.loads(call(workplace, *command, "--out", "beside").stdout)
    assert (both["extracted"], both["features"]) == (2, 600)
    assert (workplace / "beside" / "1.png.npz").is_file()


def test_an_evaluation_leaves_a_page_of_figures_plots_and_queries(tmp_path: Path) -> None:
    for seed in range(3):
        photo = make_photo(seed)
        save_photo(tmp_path / "data" / f"{2 * seed}.png", photo)
        save_photo(tmp_path / "data" / f"{2 * seed + 1}.png", np.ascontiguousarray(photo[20:230, 20:300]))
    save_photo(tmp_path / "strangers" / "5.png", make_photo(50))
    (tmp_path / "data" / "0.png").rename(tmp_path / "0.png")
    shutil.move(tmp_path / "0.png", tmp_path / "data" / "0<b>&.png")
    command = ["eval", "folders", "data", "--group", 2, "--no-match", "strangers", "--report", "page.html"]
    result = call(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "written: page.html"
    page = checked((tmp_path / "page.html").read_text())
    told = [image["alt"] for image in page.of("img")]
    assert sum(alt.startswith("Plot: ") for alt in told) == 3
    assert told.count("The query, 0<b>&.png") == 1  # it is among the worst or the best, and not both
    assert {"Worst queries", "Best queries", "Figures", "Plots", "Conditions"} <= {
        line.strip() for line in page.text.splitlines()
    }
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    for name, (value, low, high, _) in report["figures"].items():
        assert name in page.text
        assert f"{value:.4f}" in page.text
        assert f"{low:.4f} to {high:.4f}" in page.text


def test_an_evaluation_of_pairs_draws_their_matches(tmp_path: Path) -> None:
    photo = make_photo(1)
    save_photo(tmp_path / "a.png", photo)
    save_photo(tmp_path / "b.png", np.ascontiguousarray(photo[20:230, 20:300]))
    (tmp_path / "pairs.csv").write_text("a,b,homography\na.png,b.png,1 0 -20 0 1 -20 0 0 1\n")
    result = call(tmp_path, "eval", "pairs", "pairs.csv", "--report", "page.html")
    assert result.returncode == 0, result.stderr
    page = checked((tmp_path / "page.html").read_text())
    assert any(image["alt"].endswith("between matching keypoints of the two photos") for image in page.of("img"))
