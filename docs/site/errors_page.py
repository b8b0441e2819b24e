"""The errors that a user can cause or cure, with all that they say, as Markdown from the code."""

import ast
import re
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


def public_errors() -> dict[str, str]:
    """The module of every public class below `InflError`, by name; a base comes first."""
    classes, _ = _code_of_ours()
    found = {BASE: next(module for module, node in classes if node.name == BASE)}
    while more := {
        node.name: module
        for module, node in classes
        if node.name not in found
        and node.name[0] != "_"
        and any(isinstance(base, ast.Name) and base.id in found for base in node.bases)
    }:
        found |= more
    return found


@cache
def _code_of_ours() -> tuple[list[tuple[str, ast.ClassDef]], list[ast.Call]]:
    """Every class with its module, and every call of a plain name."""
    classes, calls = [], []
    for folder in CODE:
        root = (PROJECT / folder).parent
        for path in sorted((PROJECT / folder).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    classes.append((module.removesuffix(".__init__"), node))
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    calls.append(node)
    return classes, calls


def _messages(name: str) -> set[str]:
    """What is said where an error of this class is made."""
    _, calls = _code_of_ours()
    made = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name)
    return {text for call in made for text in _texts(call)}


def _texts(call: ast.Call) -> Iterator[str]:
    """The text of a message as code; what is filled in stands as its name, or as three dots."""
    match call.args:
        case [ast.Constant(str(text)), *_]:
            yield _code(text)
        case [ast.JoinedStr(parts), *_]:
            yield _code(re.sub(r"\.{4,}", "...", "".join(_part(part) for part in parts)))


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
