"""Examples of every command, in its `--help` after the options: right above the prompt that they are typed at."""

from __future__ import annotations

import inspect

import typer

MARK = "Example: "


def examples_last(app: typer.Typer) -> None:
    """Move paragraphs of docstrings that start with "Example: " to the end of their commands' help, in groups too."""
    for command in app.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(one for one in paragraphs if not one.startswith(MARK))
        command.epilog = "\n\n".join(one for one in paragraphs if one.startswith(MARK)) or None
    for group in app.registered_groups:
        if group.typer_instance is not None:
            examples_last(group.typer_instance)
