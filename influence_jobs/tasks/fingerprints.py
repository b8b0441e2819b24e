"""Fingerprints of a task's data and of the user's code for it.

They show whether data or code changed since a run was submitted. Results of other data or other
code must never be reused.
"""

import ast
import hashlib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from influence_jobs.errors import SpecError
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.own_code import OURS, is_own

# What the first versions wrote: one text for both, the code being the bytes of one file.
_FIRST_FORM = re.compile(r"(?P<data>\d+ samples), code (?P<code>[0-9a-f]{16}|unknown)")


def fingerprinted(name: str, task: Task, *, like: TaskSpec | None = None) -> tuple[str, str]:
    """The fingerprints (data, code) of a task as it is now.

    Args:
        name: The task's name.
        task: The task, with its data.
        like: A spec of the same task. If nothing has changed since, its fingerprints are returned,
            even if they are in an earlier form.
    """
    if like is not None and like.name == name and not changed(like, task):
        return like.data, like.code
    return task.fingerprint(), code_of(type(task))


def changed(spec: TaskSpec, task: Task) -> str:
    """What has changed since a spec was made: "data", "code", or "" for nothing."""
    if spec.code == "" and (first := _FIRST_FORM.fullmatch(spec.data)):
        if f"{len(task.train_data())} samples" != first["data"]:
            return "data"
        return "" if _code_of_first_form(type(task)) == first["code"] else "code"
    if spec.code != "" and code_of(type(task)) != spec.code:
        return "code"
    return "" if task.fingerprint() == spec.data else "data"


def require_unchanged(run_id: str, spec: TaskSpec, task: Task) -> None:
    """Refuse to continue a run whose data or code changed since it was submitted.

    Raises:
        SpecError: One of them changed; the message says which.
    """
    what = changed(spec, task)
    if what == "code":
        file = inspect.getsourcefile(type(task))
        raise SpecError(
            f"run {run_id}: the code of task {spec.name} changed since it was submitted "
            f"({file}, or a file of yours that it imports): restore it, or submit the run again"
        )
    if what == "data":
        raise SpecError(
            f"run {run_id}: the training data of {spec.name} are not those it was submitted with "
            f"({task.fingerprint()} instead of {spec.data}): restore them, or submit the run again"
        )


def code_of(kind: type[Task]) -> str:
    """SHA-256 of the user's own code behind a task; empty for the tasks of this package.

    It covers the file of the class, and every file of the user that this one imports, directly or
    indirectly. Comments, docstrings and blank lines do not count.
    """
    if kind.__module__.partition(".")[0] in OURS:
        return ""
    module = sys.modules.get(kind.__module__)
    files = sorted(_own_files(module)) if module is not None else []
    if files:
        texts = [code_alone(file.read_text(encoding="utf-8")) for file in files]
    else:  # defined in a notebook or a shell
        texts = _sources(kind)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _sources(kind: type[Task]) -> list[str]:
    functions = [value for _, value in sorted(vars(kind).items()) if inspect.isfunction(value)]
    try:
        return [inspect.getsource(function) for function in functions]
    except OSError:
        return [repr(function.__code__.co_code) for function in functions]


def _own_files(module: ModuleType) -> set[Path]:
    """The source files of a module and of all modules of the user that it imports."""
    top = module.__name__.partition(".")[0]
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        file = _file(waiting[-1])
        module = waiting.pop()
        if file is None or file in found:
            continue
        beside = module.__name__.partition(".")[0] == top and top not in OURS
        if not (beside or is_own(file, module.__name__)):
            continue
        found.add(file)
        package = module.__package__ or ""
        for name in _imported(file.read_text(encoding="utf-8"), package):
            if name in sys.modules:
                waiting.append(sys.modules[name])
    return found


def _file(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and name.endswith(".py") else None


def _imported(text: str, package: str) -> Iterator[str]:
    """Names of modules that a source file may import, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else ()), *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def code_alone(text: str) -> str:
    """A source text without comments, docstrings and blank lines.

    The rest is kept to the letter. Code printed from a syntax tree would depend on the version of
    Python.
    """
    lines = text.splitlines()
    spans = [
        (token.start, token.end)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node) is not None:
                    spans.append(_span(lines, node.body[0]))
    for (row, column), (last, end) in sorted(spans, reverse=True):
        if row == last:
            lines[row - 1] = lines[row - 1][:column] + lines[row - 1][end:]
        else:
            lines[row - 1 : last] = [lines[row - 1][:column] + lines[last - 1][end:]]
    return "\n".join(stripped for line in lines if (stripped := line.rstrip()))


def _span(lines: list[str], node: ast.stmt) -> tuple[tuple[int, int], tuple[int, int]]:
    """Start and end (line, column) of a statement. Columns count characters; `ast` counts bytes."""
    first, last = lines[node.lineno - 1].encode(), lines[(node.end_lineno or 0) - 1].encode()
    start = len(first[: node.col_offset].decode())
    return (node.lineno, start), (node.end_lineno or 0, len(last[: node.end_col_offset].decode()))


def _code_of_first_form(kind: type[Task]) -> str:
    source = inspect.getsourcefile(kind)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else "unknown"
