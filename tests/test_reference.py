"""The reference pages say what the program and the settings really are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from delf_milvus.cli.main import app
from delf_milvus.errors import UsageError
from delf_milvus.reference import REASONS, commands, settings, walk
from delf_milvus.settings import load

TYPER_OWN = {"--help", "-h", "--install-completion", "--show-completion"}


def parsers(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What really parses the command line, by the words that lead to it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from parsers(command, (*words, name))
        else:
            yield (*words, name), command


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_command_and_every_option_of_the_parser_is_on_the_page() -> None:
    page, found = commands(), dict(parsers(typer.main.get_command(app)))
    assert len(found) > 20
    assert [command.words for command in walk()] == list(found)
    for words, parser in found.items():
        text = section(page, " ".join(("delf-milvus", *words)))
        options = {name for one in parser.params for name in (*one.opts, *one.secondary_opts) if name[0] == "-"}
        assert (
            set(re.findall(r"`(-[-a-z]+)`", "\n".join(re.findall(r"^\| (`-.*?) \|", text, re.M))))
            == options - TYPER_OWN
        ), words
        assert text.count("| required |") == sum(one.required for one in parser.params), words


def test_global_options_of_the_parser_are_on_the_page() -> None:
    text = section(commands(), "Global options")
    options = {name for one in typer.main.get_command(app).params for name in one.opts if name.startswith("-")}
    assert set(re.findall(r"`(-[-a-z]+)`", text)) == options - TYPER_OWN


def read_from(name: str) -> str | None:
    """Where the value of a setting came from, whether or not it makes sense."""
    try:
        return load().sources.get(name)
    except UsageError as error:
        found = re.match(r"Setting (\S+) \(from (\w+)\)", str(error))
        return found[2] if found and found[1] == name else None


def test_every_setting_is_on_the_page_and_its_variable_is_the_one_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = dict(re.findall(r"^\| `([a-z_.0-9]+)`<br>`([A-Z_]+)` \|", settings(), re.M))
    assert set(rows) == {name for name, _, _ in load().rows()} | {"store.fields"}
    assert set(rows) >= set(REASONS)
    for name, variable in rows.items():
        with monkeypatch.context() as environment:
            environment.setenv(variable, '{"year": "integer"}' if name == "store.fields" else "7")
            assert "environment" in {read_from(name), read_from(f"{name}.year")}
