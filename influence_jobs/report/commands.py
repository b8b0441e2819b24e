"""The command that would compute what no run here has."""

import inspect
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from influence_jobs.errors import UntrustedCode
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint
from influence_jobs.specs.base import Model, TaskSpec
from influence_jobs.store.folder import for_runs
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import option_words, task_class
from influence_jobs.terms import Region


def influence_of(runs: Sequence[Run], test: int, region: Region) -> str:
    """The command that computes the influence of all samples on a region of a test image.

    Args:
        runs: Whose task and weights it takes.
    """
    y, x, height, width = region
    place = (
        f"--point {y},{x}" if (height, width) == (1, 1) else f"--region {y},{x},{height},{width}"
    )
    return f"infl submit influence {_subject(runs)} --test {test} {place}{for_runs(runs[0].root)}"


def norms_of(runs: Sequence[Run]) -> str:
    """The command that stores the norms by which any point is explained at once."""
    return f"infl submit grad-norms {_subject(runs)} --layer all{for_runs(runs[0].root)}"


def _subject(runs: Sequence[Run]) -> str:
    """The options that name the task and the weights of runs."""
    for weights in (found for run in runs for found in _weights(run.spec)):
        if isinstance(weights, TrainedCheckpoint):  # whose training knows its task
            last = weights.epoch == weights.train.epochs
            return f"--checkpoint {weights.train.run_id}{'' if last else f'@{weights.epoch}'}"
        return f"{_task_words(runs[0].spec.task)} --checkpoint {shlex.quote(weights.path)}"
    return _task_words(runs[0].spec.task)


def _weights(value: object) -> Iterator[FileCheckpoint | TrainedCheckpoint]:
    """The weights that a spec is made of."""
    if isinstance(value, FileCheckpoint | TrainedCheckpoint):
        yield value
    elif isinstance(value, Model):
        for name in type(value).model_fields:
            yield from _weights(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _weights(item)


def _task_words(task: TaskSpec) -> str:
    """The options that name a task, with those of its own that are not at their default."""
    module, _, name = task.name.partition(":")
    file = Path(task.folder, f"{module.replace('.', '/')}.py")
    named = f"{file}:{name}" if task.folder and file.is_file() else task.name
    try:
        parameters = inspect.signature(task_class(task)).parameters
        defaults = {name: of.default for name, of in parameters.items()}
    except UntrustedCode:
        defaults = {}
    words = option_words({**task.options, **task.paths}, defaults)
    return shlex.join(["--task", named, *words])
