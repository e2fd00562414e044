"""The examples run as they are, on photos that they draw themselves, and find what they say they find."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("beside_your_collection", "landmarks", "near_duplicates", "tenants")

pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """The names that an example defines, with nothing of it run; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_every_answer_is_the_expected_one(
    name: str, example: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    assert example(name)["main"]() == 0
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_landmarks_takes_a_folder_of_ones_own(
    example: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scenes = example("scenes")
    folder = scenes["write"](tmp_path / "places", places=2, views=1)
    photo = scenes["save"](tmp_path / "new.jpg", scenes["view"](scenes["scene"](1), 4))
    assert example("landmarks")["main"](["--photos", str(folder), "--ask", str(photo)]) == 0
    assert "2 photos stored" in (said := capsys.readouterr().out)
    assert f"{photo}: place-1, " in said


def test_fusion_ranks_as_worked_out_by_hand(example: Callable[[str], dict[str, Any]]) -> None:
    names = example("beside_your_collection")
    fused = names["by_rank"]([["a", "b"], ["b", "c"]], [1.0, 0.5])
    assert fused == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 0.5 / 61, "c": 0.5 / 62})
    assert names["by_score"]([{"a": 0.5}, {"a": 1.0, "b": 0.2}], [0.4, 0.6]) == pytest.approx({"a": 0.8, "b": 0.12})


def test_scenes_are_the_same_each_time_and_differ_from_one_another(
    example: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    scenes = example("scenes")
    np.testing.assert_array_equal(scenes["scene"](3), scenes["scene"](3))
    assert (scenes["scene"](3) != scenes["scene"](4)).mean() > 0.9
    scenes["write"](tmp_path, places=2, views=2)
    assert len(list(tmp_path.glob("place-*/view-*.jpg"))) == 4


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    data = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/jpeg" in one for one in data) >= 3


def test_the_committed_notebook_is_small_and_names_no_folder_of_anybodys() -> None:
    text = (EXAMPLES / "tour.ipynb").read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert "/home/" not in text
    assert "/tmp/" not in text
