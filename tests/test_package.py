"""What a stranger installs: the wheel's contents and metadata, and a whole search with it outside of the repository."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"check", "test"}

CONSUMER = """
from typing_extensions import assert_type

from delf_milvus import DelfIndex, Hit, SearchResult, Settings
from delf_milvus.settings import SearchSettings

settings = Settings(search=SearchSettings(top=5))
with DelfIndex.open("photos.db", settings=settings) as index:
    assert_type(index.ingest(["photos"]).added, int)
    result = index.search("query.jpg", top_k=3, filter={"year": {">=": 2020}})
    assert_type(result, SearchResult)
    for hit in result.hits:
        assert_type(hit, Hit)
        assert_type(hit.confidence, float)
        assert_type(hit.transform, list[list[float]] | None)
    assert_type(index.match("a.jpg", "b.jpg").matched, bool)
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """What a command prints, with nothing of this repository on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel, and with this one's packages in place of a download."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    ours = [path for path in sys.path if path and Path(path).is_dir() and not (Path(path) / "delf_milvus").exists()]
    packages = [path for path in ours if re.search(r"packages$", path)]
    assert packages
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Paths in such a file come after the environment's own, and the `.pth` files inside them, one of which is that of
    # the editable installation, are not read.
    (site / "packages_of_the_tests.pth").write_text("\n".join(packages) + "\n")
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "delf_milvus").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    own = {name for name in names if ".dist-info/" not in name}
    assert own == tracked
    assert {
        "delf_milvus/py.typed",
        "delf_milvus/model/bundled/delf_resnet50v2.safetensors",
        "delf_milvus/model/bundled/delf_resnet50v2.calibration.json",
        "delf_milvus/model/bundled/MODEL_CARD.md",
        "delf_milvus/model/bundled/delf_small.safetensors",
        "delf_milvus/model/bundled/delf_small.calibration.json",
        "delf_milvus/model/bundled/SMALL_MODEL_CARD.md",
    } <= own
    licences = {name.split("/licenses/", 1)[1] for name in names if "/licenses/" in name}
    assert licences == set(PROJECT["license-files"])


def test_the_source_distribution_can_be_tested_and_documented(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in ("pyproject.toml", "Makefile", "README.md", "LICENSE", "NOTICE", "tests/conftest.py"):
        assert name in names
    for folder in ("tests/benchmarks", "examples/guides", "schemas", "deploy"):
        assert any(name.startswith(f"{folder}/") for name in names), folder


def test_the_metadata_is_that_of_the_project(metadata: Message) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra", ())) == set(PROJECT["optional-dependencies"])
    wanted = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    names = {Requirement(text).name for text in wanted} - {PROJECT["name"]}
    assert names == {Requirement(text).name for text in metadata.get_all("Requires-Dist", ())} - {PROJECT["name"]}


def test_whoever_installs_it_can_search(installed: Path, tmp_path: Path) -> None:
    program = installed.parent / "delf-milvus"
    scenes = runpy.run_path(str(ROOT / "examples/scenes.py"))
    scenes["write"](tmp_path / "photos", places=2, views=1)
    scenes["save"](tmp_path / "query.jpg", scenes["view"](scenes["scene"](1), 3))
    scenes["save"](tmp_path / "unknown.jpg", scenes["scene"](60))

    assert run(program, "--version", cwd=tmp_path) == f"delf-milvus {PROJECT['version']}\n"
    assert "ingest" in run(program, "--help", cwd=tmp_path)
    where = run(installed, "-c", "import delf_milvus; print(delf_milvus.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert run(program, "ingest", "photos", cwd=tmp_path).startswith("2 added")
    assert "place-1/view-0.jpg" in run(program, "search", "query.jpg", cwd=tmp_path)
    assert run(program, "search", "unknown.jpg", cwd=tmp_path, code=1) == "no match\n"


def test_its_types_are_those_that_a_strict_reader_sees(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    python = [f"--python-executable={installed}", f"--python-version={sys.version_info[0]}.{sys.version_info[1]}"]
    checked = run(sys.executable, "-m", "mypy", "--strict", *python, "consumer.py", cwd=tmp_path)
    assert "Success" in checked
    # And what is wrong is found, so types are really read.
    (tmp_path / "wrong.py").write_text(CONSUMER.replace("hit.confidence, float", "hit.confidence, str"))
    assert "assert-type" in run(sys.executable, "-m", "mypy", "--strict", *python, "wrong.py", cwd=tmp_path, code=1)


def test_every_dependency_of_users_is_in_the_table_of_licences() -> None:
    """None of them asks that what uses it be published: a library's own licence (LGPL, MPL) or an exception may."""
    rows = re.findall(
        r"^\| (\S+) \| ([^|]+?) \|", (ROOT / "schemas/licences.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    table = {name.lower().replace("_", "-"): licence for name, licence in rows[1:]}
    extras = {name: extra for name, extra in PROJECT["optional-dependencies"].items() if name not in FOR_DEVELOPERS}
    here = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"}
    for text in [*PROJECT["dependencies"], *(text for extra in extras.values() for text in extra)]:
        wanted = Requirement(text)
        if wanted.name != PROJECT["name"] and (wanted.marker is None or wanted.marker.evaluate(here)):
            assert wanted.name.lower().replace("_", "-") in table, f"run `make licences`: {wanted.name} is missing"
    for name, licence in table.items():
        assert not re.search(r"\bA?GPL(?!\S* WITH)|(Affero|GNU) General Public", licence), f"{name}: {licence}"
