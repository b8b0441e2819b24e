"""Find a task by name: one of ours, one of an installed plug-in, or `module:Class`."""

import importlib
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from influence_jobs.errors import SpecError
from influence_jobs.specs.base import TaskSpec
from influence_jobs.tasks.base import Task

ENTRY_POINTS = "influence_jobs.tasks"  # the group in which packages announce their tasks
BUILT_IN = {
    "mnist": "influence_jobs.tasks.mnist:MnistTask",
    "mnist-dropout": "influence_jobs.tasks.mnist:MnistDropoutTask",
    "ffdnet": "influence_jobs.tasks.ffdnet:FFDNetTask",
    "ffdnet-grey": "influence_jobs.tasks.ffdnet:FFDNetGreyTask",
}


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        SpecError: There is no such task, or the object of that name is not a task.
    """
    announced = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    known = {**announced, **BUILT_IN}
    target = known.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not class_name:
        raise SpecError(
            f"unknown task {name!r}: choose {', '.join(sorted(known))}, "
            "or name your own as module:Class"
        )
    if name not in known and str(Path.cwd()) not in sys.path:
        # A user's task may lie in the working directory; at the end it shadows no other module.
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"task {name!r} cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise SpecError(f"task {name!r} is not a subclass of influence_jobs.Task")
    return found


def name_of(task: str | type[Task] | Task) -> str:
    """A task's name, from its name, its class, or an object of it."""
    if isinstance(task, str):
        return task
    kind = task if inspect.isclass(task) else type(task)
    target = f"{kind.__module__}:{kind.__qualname__}"
    built_in = {other: name for name, other in BUILT_IN.items()}
    return built_in.get(target, target)


def make_task(spec: TaskSpec) -> Task:
    """Build the task that a spec describes.

    Raises:
        SpecError: The task is unknown, or it does not have one of the options.
    """
    found = task_class(spec.name)
    arguments = {**spec.options, **spec.paths}
    takes = arguments_of(found)
    for name in arguments:
        if name not in takes:
            raise SpecError(f"task {spec.name!r} has no option {name}")
    return found(**arguments)


def arguments_of(kind: type[Task]) -> dict[str, inspect.Parameter]:
    """The arguments of a task's constructor, which are its options, with evaluated annotations."""
    constructor: Any = kind.__init__
    if constructor is object.__init__:
        return {}
    hints = get_type_hints(constructor, include_extras=True)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return {p.name: p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters}
