"""Nothing that a file or a request says is ever run, and nothing is fetched that a stranger names: the package's own
source, read as a syntax tree, calls nothing that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "delf_milvus"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Modules that run what they read, or start programs; and who may import one, for what its head says.
RUNS = {
    "pickle": {"evaluation/unpickling.py"},
    "subprocess": {"featurefiles/reading.py"},
    "ray": {"ingestion/distributed.py"},
    **dict.fromkeys(
        ("cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ruamel", "code", "runpy")
    ),
    **dict.fromkeys(("ctypes", "cffi", "pty", "xmlrpc", "xml", "lxml")),
}
# Modules that fetch: clients of the user's own service and database, and nothing else.
FETCHES = {
    "httpx": {"client.py"},
    "fsspec": {"store/bulk.py", "imaging/remote.py"},
    **dict.fromkeys(("requests", "aiohttp", "urllib3", "ftplib", "smtplib", "http")),
}
CALLS = frozenset(
    {
        *("eval", "exec", "compile", "__import__", "input", "breakpoint", "os.system", "os.popen"),
        *("torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    }
)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def problems(text: str, name: str) -> list[str]:
    """What of a source could run or fetch what a stranger says."""
    tree = ast.parse(text)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        *(f"imports {module}" for module in imported(tree) if forbidden(module, name)),
        *(problem for node in calls if (problem := wrong_call(node, "jinja" in text))),
    ]


def forbidden(module: str, name: str) -> bool:
    top = module.partition(".")[0]
    lists = [allowed[top] or () for allowed in (RUNS, FETCHES) if top in allowed]
    return module.startswith("urllib.request") or any(name not in allowed for allowed in lists)


def wrong_call(node: ast.Call, makes_pages: bool) -> str:
    called = ast.unparse(node.func)
    words = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    if called in CALLS or called.startswith(("os.exec", "os.spawn", "torch.hub")) or called.endswith("mktemp"):
        return f"calls {called}"
    if called.endswith(("np.load", "numpy.load")) and words.get("allow_pickle") != "False":
        return "calls np.load without allow_pickle=False"
    if words.get("shell", "False") != "False" or words.get("allow_pickle", "False") != "False":
        return f"calls {called} with a shell, or with pickle"
    if makes_pages and called.endswith("Environment") and words.get("autoescape") != "True":
        return "makes pages without autoescape"
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_source_runs_or_fetches_what_a_stranger_says(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "import subprocess",
        "import requests",
        "from urllib.request import urlopen",
        "eval('1')",
        "import os\nos.system('ls')",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "from jinja2 import Environment\nEnvironment()",
        "run('ls', shell=True)",
        "import tempfile\ntempfile.mktemp()",
    ],
)
def test_what_is_looked_for_would_be_found(text: str) -> None:
    assert problems(text, "store/new.py")
