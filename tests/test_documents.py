"""Every fenced block of the README and the guides runs, in the order of its page, in a folder of drawn photos.

- `python` blocks of a page share their names, and all blocks of a page their folder, so that a page ingests once. A
  `toml` block is read as a settings file. `text` is not for running, and holds no commands.
- What cannot run here says why in a comment before it, which the tests print as the reason of a skipped test:
  `<!-- skip: next "needs a Docker engine" -->`.
- `http://localhost:19530` becomes the address of the server that the tests start; where none can, the block is skipped.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest

import pytest
from milvus_server import WheelServer
from pymilvus import MilvusClient
from sybil import Example, Sybil
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from delf_milvus import DelfIndex
from delf_milvus.settings import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deploy/README.md", *sorted((ROOT / "examples/guides").glob("*.md"))]
LANGUAGES = {"python", "bash", "toml", "text"}
SERVER = "http://localhost:19530"
SECONDS = 240

pytestmark = pytest.mark.slow


class Block(NamedTuple):
    """One fenced block, and the comments before it that may skip it."""

    page: str
    comments: tuple[Example, ...]
    example: Example


def text_of(example: Example) -> str:
    text = str(example.parsed)
    return text.replace(SERVER, example.namespace["server"]()) if SERVER in text else text


def run_python(example: Example) -> None:
    # Blank lines before it: a traceback names the page's own line.
    exec(compile("\n" * example.line + text_of(example), example.path, "exec"), example.namespace)


def run_bash(example: Example) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text_of(example)],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert not done.returncode, f"exit code {done.returncode}: {done.stderr[-2000:]}"


def read_toml(example: Example) -> None:
    file = Path("page.toml")
    file.write_text(text_of(example), encoding="utf-8")
    load(config=file)


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are for running."""
    runs = {"python": run_python, "bash": run_bash, "toml": read_toml}
    parsers = [*(CodeBlockParser(language, run) for language, run in runs.items()), SkipParser()]
    comments: list[Example] = []
    for example in Sybil(parsers, path=str(page.parent)).parse(page).examples():
        if isinstance(example.region.evaluator, Skipper):
            comments.append(example)
        else:
            yield Block(page.relative_to(ROOT).as_posix(), tuple(comments), example)
            comments = []


BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages expect it: photos of four places, ingested, photos to ask with, and a listing.

    What the pages ingest is there already, so that their commands only look.
    """
    folder = tmp_path_factory.mktemp("drawn")
    scenes = runpy.run_path(str(ROOT / "examples/scenes.py"))
    save, scene, view = scenes["save"], scenes["scene"], scenes["view"]
    scenes["write"](folder / "photos", places=4, views=2)
    save(folder / "query.jpg", view(scene(1), 5))
    save(folder / "unknown.jpg", scene(60))
    save(folder / "a.jpg", scene(2))
    save(folder / "b.jpg", view(scene(2), 5))
    rows = [f"place-{place}/view-0.jpg,place-{place},{2019 + place}" for place in range(4)]
    (folder / "places.csv").write_text("\n".join(["path,place,year", *rows]) + "\n", encoding="utf-8")
    with DelfIndex.open(folder / "delf_milvus.db") as index:
        assert index.ingest([folder / "photos"]).added == 8
    return folder


@pytest.fixture(scope="module")
def folders(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a page: a copy of the drawn one for each."""
    made: dict[str, Path] = {}

    def folder(page: str) -> Path:
        if page not in made:
            made[page] = tmp_path_factory.mktemp(Path(page).stem)
            shutil.copytree(drawn, made[page], dirs_exist_ok=True)
        return made[page]

    return folder


@pytest.fixture(scope="module")
def clean_server(wheel_server: WheelServer) -> Iterator[WheelServer]:
    """The server; what the pages made on it is dropped afterwards."""
    client = MilvusClient(wheel_server.uri)
    before = set(client.list_collections())
    yield wheel_server
    for name in set(client.list_collections()) - before:
        client.drop_collection(name)
    client.close()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.example.line}")
def test_block_runs(
    block: Block,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(folders(block.page))
    block.example.namespace["server"] = lambda: request.getfixturevalue("clean_server").uri
    for comment in block.comments:
        comment.evaluate()
    try:
        block.example.evaluate()
    except SkipTest as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_has_a_language_and_no_command_hides_in_text(page: Path) -> None:
    fences = re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", page.read_text(encoding="utf-8"), re.M)
    for language, text in fences:
        assert language in LANGUAGES, f"{page.name}: {text}"
        if language == "text":
            assert not re.search(r"^\s*(\$|delf-milvus|pip|make|python|import|from|docker|export) ", text, re.M), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_into_the_repository_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {target}"
