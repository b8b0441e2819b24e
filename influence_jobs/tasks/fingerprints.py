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
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from weakref import WeakKeyDictionary

from influence_jobs.errors import SpecError
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.own_code import OURS, is_own

PARSED = 256  # source files of which what was parsed is kept
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
    indirectly. Comments, docstrings and blank lines do not count. Of a class without a file, as in
    a notebook, it covers the bytecode, with the globals that it uses.

    Raises:
        SpecError: A file changed after Python imported the class.
    """
    if kind.__module__.partition(".")[0] in OURS:
        return ""
    files = sorted(own_modules(kind))
    if not files:
        return _digest(_bytecode(kind, set()))
    found = _digest(code_alone(_text(file)) for file in files)
    if _at_first.setdefault(kind, found) != found:
        raise SpecError(
            f"the code of task {kind.__name__} changed after Python imported it ({files[0]}, or a "
            "file of yours that it imports): restart Python, or reload the module of the task"
        )
    return found


# Python goes on with the code that it imported, whatever its file says later.
_at_first: WeakKeyDictionary[type[Task], str] = WeakKeyDictionary()


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _bytecode(value: object, seen: set[int]) -> Iterator[str]:
    """What a function or class is made of, with the user's globals that it uses."""
    value = getattr(value, "__func__", getattr(value, "func", value))  # of a method, a property
    if id(value) in seen:
        return
    if isinstance(value, type | FunctionType | list | dict):  # which may lead back to themselves
        seen.add(id(value))
    match value:
        case property():
            for part in (value.fget, value.fset):
                yield from _bytecode(part, seen)
        case type() if value.__module__ == "__main__":
            yield value.__qualname__
            for base in value.__bases__:
                yield from _bytecode(base, seen)
            for name, member in sorted(vars(value).items()):
                if name not in {"__doc__", "__firstlineno__", "__static_attributes__"}:
                    yield name
                    yield from _bytecode(member, seen)
        case FunctionType() if value.__module__ == "__main__":
            yield repr((value.__defaults__, value.__kwdefaults__))
            yield from _bytecode(value.__code__, seen)
            for name in sorted(_names(value.__code__)):
                yield from _bytecode(value.__globals__.get(name), seen)
        case CodeType():
            yield repr((value.co_code, value.co_names))
            yield from _bytecode(value.co_consts, seen)
        case tuple() | list():
            yield f"{len(value)} of"
            for element in value:
                yield from _bytecode(element, seen)
        case dict():
            yield from _bytecode(list(value.items()), seen)
        case set() | frozenset():  # their order differs by process
            yield repr(sorted(map(repr, value)))
        case None | bool() | int() | float() | complex() | str() | bytes():
            yield repr(value)


def _names(code: CodeType) -> set[str]:
    """The names that code uses, that of functions inside it too."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*map(_names, inner))


def own_modules(kind: type[Task]) -> dict[Path, str]:
    """The user's source files behind a task, each with its name as a module.

    They are the file of the class, and the user's files that it imports, directly or indirectly.
    """
    module = sys.modules.get(kind.__module__)
    return _own_modules(module) if module is not None else {}


def _own_modules(module: ModuleType) -> dict[Path, str]:
    top = module.__name__.partition(".")[0]
    found: dict[Path, str] = {}
    waiting = [module.__name__]
    while waiting:
        name = waiting.pop()
        file, package = _located(name)
        if file is None or file in found:
            continue
        beside = name.partition(".")[0] == top and top not in OURS
        if not (beside or is_own(file, name)):
            continue
        found[file] = name
        waiting += _imported(_text(file), package)
    return found


def _located(name: str) -> tuple[Path | None, str]:
    """The source file of a module, if any, and its package; found without importing it."""
    if (module := sys.modules.get(name)) is not None:
        origin, package = getattr(module, "__file__", None), module.__package__ or ""
    else:
        origin, package, path = None, name.rpartition(".")[0], None
        for end in range(1, name.count(".") + 2):
            if end > 1 and path is None:  # the name of something in a module
                return None, ""
            spec = PathFinder.find_spec(".".join(name.split(".")[:end]), path)
            if spec is None:
                return None, ""
            origin, path = spec.origin, spec.submodule_search_locations
        package = name if path is not None else package
    return (Path(origin).resolve() if origin and origin.endswith(".py") else None), package


def _text(file: Path) -> str:
    with tokenize.open(file) as source:  # in the encoding that it declares
        return source.read()


# A command asks for a task's code several times; a text is parsed once.
@lru_cache(maxsize=PARSED)
def _imported(text: str, package: str) -> tuple[str, ...]:
    """Names of modules that a source file may import, inside functions too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else ()), *filter(None, [node.module])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)


@lru_cache(maxsize=PARSED)
def code_alone(text: str) -> str:
    """A source text without comments, docstrings and blank lines.

    The rest is kept to the letter. Code printed from a syntax tree would depend on the version of
    Python.
    """
    lines = text.split("\n")  # as Python counts lines
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
