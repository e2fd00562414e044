"""Every command's help: an example of each, that can be typed as it stands; and what a shell completes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from test_commands import call

from delf_milvus.cli.main import app


def commands(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every group and command with the words that call it."""
    command = command or typer.main.get_command(app)
    found = [(path, command)]
    for name, inner in getattr(command, "commands", {}).items():
        found += commands(inner, (*path, name))
    return found


def examples_of(command: Any) -> list[str]:
    paragraphs = (command.epilog or "").split("\n\n")
    return [one.removeprefix("Example: ") for one in paragraphs if one.startswith("Example: ")]


def parsed(words: list[str]) -> list[str]:
    """The names of the commands that these words call; raises click's error for words that cannot be parsed."""
    command: Any = typer.main.get_command(app)
    names: list[str] = []
    context = command.make_context("delf-milvus", list(words))
    while hasattr(command, "commands"):
        # A group keeps its command's name apart from the words after it.
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)
        context = command.make_context(name, rest, parent=context)
    return names


@pytest.mark.parametrize(
    ("path", "command"), [pytest.param(*one, id=" ".join(("delf-milvus", *one[0]))) for one in commands()]
)
def test_every_command_has_examples_whose_options_exist(path: tuple[str, ...], command: Any) -> None:
    examples = examples_of(command)
    assert examples
    for example in examples:
        words = shlex.split(example)
        while "=" in words[0]:
            assert words.pop(0).startswith("DELF_MILVUS_")
        assert words.pop(0) == "delf-milvus"
        assert tuple(parsed(words))[: len(path)] == path


def test_an_example_with_an_unknown_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["search", "query.jpg", "--colour"])


def test_examples_come_last_in_the_help_that_is_printed(tmp_path: Path) -> None:
    told = call(tmp_path, "search", "--help", COLUMNS="120").stdout
    assert told.index("--preset") < told.index("Example: delf-milvus search queries/ --report matches.html")


def completed(shell: str, line: str) -> list[str]:
    words = line.split(" ")
    result = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['delf-milvus']; from delf_milvus.cli.main import run; run()"],
        env={
            **os.environ,
            "_DELF_MILVUS_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": line,
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("delf-milvus sea", "search"),
        ("delf-milvus search --rep", "--report"),
        ("delf-milvus search --preset fa", "fast"),
        ("delf-milvus extract --format h", "hloc"),
        ("delf-milvus eval fol", "folders"),
    ],
)
def test_a_shell_completes_commands_options_and_values(line: str, offered: str) -> None:
    assert offered in completed("bash", line)


def test_completion_is_installed_for_the_shell_that_is_named(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; sys.argv[0] = 'delf-milvus'; from delf_milvus.cli.main import run; run()",
            *("--install-completion", "bash"),
        ],
        env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_DELF_MILVUS_COMPLETE" in path.read_text() for path in written)
