"""Finding a task by name: ours, an installed plug-in's, `module:Class`, or `file.py:Class`."""

import importlib
import inspect
import socket
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

from influence_jobs.errors import DataError, SpecError, UntrustedCode
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.own_code import described, is_own
from influence_jobs.tasks.published import Published
from influence_jobs.tasks.trust import let_import, make_trusted

ENTRY_POINTS = "influence_jobs.tasks"  # the group in which packages announce their tasks
BUILT_IN = {
    "mnist": "influence_jobs.tasks.mnist:MnistTask",
    "mnist-dropout": "influence_jobs.tasks.mnist:MnistDropoutTask",
    "mnist-lds": "influence_jobs.tasks.mnist:MnistLdsTask",
    "ffdnet": "influence_jobs.tasks.ffdnet:FFDNetTask",
    "ffdnet-grey": "influence_jobs.tasks.ffdnet:FFDNetGreyTask",
    "ffdnet-small": "influence_jobs.tasks.ffdnet:FFDNetSmallTask",
}


def task_class(task: str | TaskSpec) -> type[Task]:
    """The class behind a task's name.

    Args:
        task: Its name, or a spec, which knows in which folder the task's module was found.

    Raises:
        SpecError: There is no such task, it cannot be imported, or what is there is no task.
        UntrustedCode: A spec names code that the user has not named on this machine, or that is
            not here.
    """
    name = task if isinstance(task, str) else task.name
    known = _known()
    found = _located(known.get(name, name))
    if not found.class_name:
        raise SpecError(
            f"unknown task {name!r}: choose {', '.join(sorted(known))}, or name your own as "
            "module:Class or file.py:Class"
        )
    if name not in known:
        # One's own task lies where one works, or beside the file named; it shadows nothing.
        if isinstance(task, str):
            for path in filter(None, (found.folder, str(Path.cwd()))):
                if path not in sys.path:
                    sys.path.append(path)
            make_trusted(found.module)
        else:
            let_import(found.module, name, task.folder)
    module = _imported(name, found)
    kind = getattr(module, found.class_name, None)
    if kind is None and found.module == "__main__" and not isinstance(task, str):
        raise UntrustedCode(
            f"task {name!r} of this run was defined in a script or notebook, and is known only "
            "there: look at the run there, or put the task into a file of its own"
        )
    if kind is None:
        tasks = ", ".join(other.__name__ for other in _tasks_in(module)) or "none"
        raise SpecError(
            f"task {name!r} cannot be imported: {module.__file__} has no {found.class_name}; tasks "
            f"in it: {tasks}"
        )
    if not (inspect.isclass(kind) and issubclass(kind, Task)):
        raise SpecError(f"task {name!r} is not a subclass of influence_jobs.Task")
    return kind


def published_of(task: TaskSpec) -> Published | None:
    """Published results for a task; None if it has none, or its code is not trusted."""
    try:
        return task_class(task).published
    except UntrustedCode:
        return None


def name_of(task: str | type[Task] | Task) -> str:
    """A task's name, from its name, its class, or an object of it.

    `file.py:Class` is `file:Class`, wherever the file lies and one works.

    Raises:
        SpecError: There is no such file.
    """
    if isinstance(task, str):
        found = _located(task)
        return f"{found.module}:{found.class_name}" if found.file else task
    kind = task if inspect.isclass(task) else type(task)
    target = f"{kind.__module__}:{kind.__qualname__}"
    built_in = {other: name for name, other in BUILT_IN.items()}
    return built_in.get(target, target)


def folder_of(kind: type[Task]) -> str:
    """The folder from which a user's own task is imported; empty for what is installed."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not is_own(Path(file).resolve(), kind.__module__):
        return ""
    path = Path(file).absolute()
    levels = kind.__module__.count(".") + (path.name == "__init__.py")
    return str(path.parents[levels])


class _Located(NamedTuple):
    """Where a task is to be imported from.

    Attributes:
        file, folder: If the name has a file, that file, and the folder to import it from.
    """

    module: str
    class_name: str
    file: Path | None = None
    folder: str = ""


def _known() -> dict[str, str]:
    return {**_announced(tuple(sys.path)), **BUILT_IN}


@cache
def _announced(_path: tuple[str, ...]) -> dict[str, str]:
    """Tasks that packages announce; to look through all that is installed takes tens of ms."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _located(target: str) -> _Located:
    """The module and class of `module:Class` or `path/to/file.py:Class`.

    Raises:
        SpecError: There is no such file, or no class is named.
    """
    place, _, class_name = target.rpartition(":")
    if not place:
        place, class_name = class_name, ""
    if not place.endswith(".py"):
        return _Located(place, class_name)
    file = Path(place).expanduser().absolute()
    if not file.is_file():
        raise SpecError(f"task {target!r}: there is no file {place}")
    if not class_name:
        raise SpecError(f"task {target!r}: name its class too, as {place}:Class")
    parts, folder = [file.stem], file.parent
    # A module of a package is imported as that; where one works, `file` is enough.
    while folder != Path.cwd() and (folder / "__init__.py").is_file():
        parts, folder = [folder.name, *parts], folder.parent
    return _Located(".".join(parts), class_name, file, str(folder))


def _imported(name: str, found: _Located) -> ModuleType:
    """The module of a task.

    Raises:
        SpecError: It cannot be imported, or is another one than the file that was named.
    """
    try:
        module = importlib.import_module(found.module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == found.module
        said = str(error) if missing else described(error)
        raise SpecError(f"task {name!r} cannot be imported: {said}") from error
    loaded = getattr(module, "__file__", None)
    if found.file and (loaded is None or not found.file.samefile(loaded)):
        raise SpecError(
            f"task {name!r} cannot be imported: there is another module {found.module} "
            f"({loaded or 'of Python itself'}); rename the file"
        )
    return module


def _tasks_in(module: ModuleType) -> list[type[Task]]:
    """The tasks that a module defines itself."""
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]


def make_task(spec: TaskSpec) -> Task:
    """Build the task that a spec describes.

    Raises:
        DataError: A file that it reads is not on this machine.
        SpecError: The task is unknown, or it does not have one of the options.
    """
    found = task_class(spec)
    arguments = {**spec.options, **spec.paths}
    takes = arguments_of(found)
    for name in arguments:
        if name not in takes:
            raise SpecError(f"task {spec.name!r} has no option {name}")
    try:
        return found(**arguments)
    except FileNotFoundError as error:
        raise DataError(
            f"task {spec.name!r} finds no {error.filename or error} on {socket.gethostname()}"
        ) from error


def with_place_of(spec: TaskSpec, other: TaskSpec) -> TaskSpec:
    """A spec of a task with the places of the data and the code of another spec of the same."""
    return spec.model_copy(update={"paths": other.paths, "folder": other.folder})


def arguments_of(kind: type[Task]) -> dict[str, inspect.Parameter]:
    """The arguments of a task's constructor, which are its options, with evaluated annotations."""
    constructor: Any = kind.__init__
    if constructor is object.__init__:
        return {}
    hints = get_type_hints(constructor, include_extras=True)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return {p.name: p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters}


def option_words(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Options of a task as the words of a command, without those that are at their default."""
    words = []
    for option, value in values.items():
        flag = option.replace("_", "-")
        if value is None or value == () or value == defaults.get(option):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            each = value if isinstance(value, tuple | list) else (value,)
            words += [word for one in each for word in (f"--{flag}", str(one))]
    return words
