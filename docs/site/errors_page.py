"""The errors that a user can cause or cure, with all that they say, as Markdown from the code."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]
CODE = ("influence_jobs", "cluster/infl_cluster", "cli/infl_cli")
BASE = "InflError"


def errors() -> str:
    """A section for each public class: its docstring, and the messages that the code raises."""
    lines = []
    for name, module in public_errors().items():
        said = sorted(_messages(name), key=str.casefold)
        lines += [f"## {name}", "", "```{eval-rst}", f".. autoexception:: {module}.{name}", "```"]
        lines += ["", *(f"- {message}" for message in said), ""]
    return "\n".join(lines)


@cache
def public_errors() -> dict[str, str]:
    """The module of every public class below `InflError`, by name; a base comes first."""
    bases = {
        node.name: ([b.id for b in node.bases if isinstance(b, ast.Name)], module)
        for module, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {BASE: bases[BASE][1]}
    while more := {
        name: module
        for name, (above, module) in bases.items()
        if name not in found and name[0] != "_" and not found.keys().isdisjoint(above)
    }:
        found |= more
    return found


@cache
def _trees() -> tuple[tuple[str, ast.Module], ...]:
    """Every module of ours, by its name."""
    trees = []
    for folder in CODE:
        root = (PROJECT / folder).parent
        for path in sorted((PROJECT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            trees.append((name.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))))
    return tuple(trees)


def _messages(name: str) -> set[str]:
    """What is said where an error of this class is made."""
    calls = (
        node
        for _, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    )
    return {text for call in calls for text in _texts(call)}


def _texts(call: ast.Call) -> Iterator[str]:
    """The text of a message as code; what is filled in stands as its name, or as three dots."""
    match call.args:
        case [ast.Constant(str(text)), *_]:
            yield _code(text)
        case [ast.JoinedStr(parts), *_]:
            yield _code("".join(_part(part) for part in parts))


def _part(part: ast.expr) -> str:
    match part:
        case ast.Constant(value):
            return str(value)
        case ast.FormattedValue(ast.Name(name) | ast.Attribute(attr=name)) if name.islower():
            return f"<{name.strip('_')}>"
    return "..."


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"
