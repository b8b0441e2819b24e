"""The commands of `infl` as Markdown, from the application itself."""

import re
from collections.abc import Iterator
from inspect import cleandoc
from itertools import groupby
from typing import Any

import typer

from infl_cli.main import app

_OPTION = re.compile(r"(?<![`\w-])--[a-z][a-z-]*(?: [A-Z]+\b)?(?: --help)?")
_SPECIAL = re.compile(r"([\\*_<>\[\]|#$])")


def commands() -> str:
    """All commands but those of `infl submit`."""
    return "\n".join(_command("infl", typer.main.get_command(app), leave_out="submit"))


def submit_commands() -> str:
    """The commands of `infl submit`, one for each kind of run."""
    group: Any = typer.main.get_command(app)
    return "\n".join(_command("infl submit", group.commands["submit"]))


def _command(path: str, command: Any, leave_out: str = "") -> Iterator[str]:
    """A command with its options, and the commands below it."""
    context = typer.Context(command, info_name=path)
    yield f"## `{path}`\n"
    usage = command.get_usage(context).removeprefix("Usage: ").replace(" [ARGS]...", " ...")
    yield f"```text\n{usage}\n```\n"
    yield f"{_prose(cleandoc(command.help or ''))}\n"
    for panel, rows in groupby(_in_panels(command, context), key=lambda row: row[0]):
        yield f"| {panel} | |\n|---|---|"
        yield from (f"| {option} | {said} |" for _, option, said in rows)
        yield ""
    below = {name: command.commands[name] for name in _names(command, context)}
    if below:
        yield "| Commands | |\n|---|---|"
        for name, one in below.items():
            page = "submit.md" if name == leave_out else ""
            anchor = f"{path} {name}".replace(" ", "-")
            said = _prose(cleandoc(one.help).partition("\n")[0])
            yield f"| [`{name}`]({page}#{anchor}) | {said} |"
        yield ""
    for name, one in below.items():
        if name != leave_out:
            yield from _command(f"{path} {name}", one)


def _names(command: Any, context: Any) -> list[str]:
    """The commands of a group in the order of its help; none of a command."""
    return command.list_commands(context) if hasattr(command, "commands") else []


def _in_panels(command: Any, context: Any) -> list[tuple[str, str, str]]:
    """Panel, name and help of each parameter: arguments first, then as panels come."""
    rows = []
    for parameter in command.params:
        name, said = parameter.get_help_record(context)
        panel = getattr(parameter, "rich_help_panel", None)
        if parameter.param_type_name == "argument":
            panel = "Arguments"
        option = name.replace("|", r"\|")  # a bar ends a cell, also in code
        rows.append((panel or "Options", f"`{option}`", _prose(said)))
    order = list(dict.fromkeys(row[0] for row in rows))
    return sorted(rows, key=lambda row: order.index(row[0]))


def _prose(text: str) -> str:
    """Help as Markdown: options as code, and nothing that Markdown would take for its own."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        words = re.split(f"({_OPTION.pattern})", parts[i])
        words[::2] = [_SPECIAL.sub(r"\\\1", word) for word in words[::2]]
        words[1::2] = [f"`{option}`" for option in words[1::2]]
        parts[i] = "".join(words)
    return "".join(parts)
