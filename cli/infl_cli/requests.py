"""From what the user typed to specs: the one place where defaults, presets and data meet."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infl_cli.options import Data, Weights
from infl_cluster.driver import is_done
from infl_configs import preset_names, read_preset
from influence_jobs.datasets.images import ImageFolder
from influence_jobs.datasets.mnist import default_data_dir
from influence_jobs.errors import ModelError, SpecError
from influence_jobs.specs import (
    Checkpoint,
    FileCheckpoint,
    TaskSpec,
    TrainedCheckpoint,
    TrainSpec,
    make_spec,
)
from influence_jobs.store.checkpoints import file_checkpoint, load_checkpoint
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import task_class

Say = Callable[[str], None]


def task_request(
    name: str, given: Mapping[str, Any], *, skip_unreadable: bool, say: Say
) -> tuple[TaskSpec, Task]:
    """The task a user asked for, with its data fetched and checked.

    Args:
        given: Constructor arguments by name; None means not given.

    Raises:
        SpecError: There is no such task, or it does not take one of the options.
        DataError: Its data cannot be had.
    """
    found = task_class(name)
    parameters = inspect.signature(found).parameters
    values = {}
    for key, value in given.items():
        if value is not None and key not in parameters:
            takes = ", ".join(parameters) or "none"
            raise SpecError(f"task {name} has no option {key}; its options: {takes}")
        if value is not None:
            values[key] = _like(parameters[key].default, value, f"option {key} of task {name}")
    if "data_dir" in found.paths & parameters.keys() and parameters["data_dir"].default is None:
        values.setdefault("data_dir", str(default_data_dir()))  # workers have not this environment
    words = {parameters[key].default for key in found.paths & parameters.keys()}
    for key in found.paths & values.keys():
        if values[key] not in words:  # such as `samples`, which names no folder
            values[key] = _absolute(values[key])
    if skip_unreadable:
        if "images" not in values:
            raise SpecError("--skip-unreadable needs --images")
        values["skip"] = tuple(ImageFolder(values["images"]).check(skip_unreadable=True))
        for file in values["skip"]:
            say(f"left out: {file} cannot be decoded")
    # Defaults are written out, so that naming one and leaving it out give the same run.
    complete = {p.name: values.get(p.name, p.default) for p in parameters.values()}
    missing = [key for key, value in complete.items() if value is inspect.Parameter.empty]
    if missing:
        raise SpecError(f"task {name} needs --option {missing[0]}=VALUE")
    options = {key: value for key, value in complete.items() if key not in found.paths}
    for key, value in options.items():
        try:
            TaskSpec(name=name, options={key: value}, data="")
        except ValueError:
            raise SpecError(
                f"option {key} of task {name} is {value!r}: it must be a finite number, a word, "
                "true, false or None"
            ) from None
    task = found(**complete)
    task.prepare(say)
    paths = {key: values[key] for key in found.paths & values.keys()}
    return TaskSpec(name=name, options=options, paths=paths, data=task.fingerprint()), task


def as_trained(trained: TaskSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was not given is as it was in training: the same images, patches and limits."""
    said = {key: value for key, value in given.items() if value is not None}
    kept = {**trained.options, **trained.paths}
    if "images" in said and _absolute(said["images"]) != kept.get("images"):
        kept.pop("skip", None)  # it names files of the training's folder
    return {**kept, **said}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _like(default: Any, value: Any, what: str) -> Any:
    """A value as the type of an argument's default, where there is one."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)  # 1 and 1.0 must give one hash
    if default not in (None, inspect.Parameter.empty) and type(value) is not type(default):
        raise SpecError(f"{what} must be of type {type(default).__name__}, not {value!r}")
    return value


def parse_options(words: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` words as arguments; values are read as JSON or YAML scalars."""
    options = {}
    for word in words or ():
        key, separator, text = word.partition("=")
        if not separator:
            raise SpecError(f"--option {word}: write NAME=VALUE")
        try:
            value = _scalar(text)
        except yaml.YAMLError:
            value = text
        if not isinstance(value, (bool, int, float, str)):
            raise SpecError(f"--option {word}: the value must be one number, word, true or false")
        options[key.replace("-", "_")] = value
    return options


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)  # unlike YAML 1.1, it takes 1e-3 for a number
    except ValueError:
        return yaml.safe_load(text)


def train_request(task: TaskSpec, *, preset: str | None, given: Mapping[str, Any]) -> TrainSpec:
    """A training of a task: the preset's values, overridden by those given (None means not given).

    Raises:
        SpecError: No such preset, or a value out of range.
    """
    name = preset or (task.name if task.name in preset_names() else None)
    values: dict[str, Any] = {}
    if name:
        try:
            values = dict(read_preset(name)["train"])
        except ValueError as error:
            raise SpecError(str(error)) from None
        known = TrainSpec.model_fields.keys() - {"kind", "task"}
        if unknown := sorted(map(str, values.keys() - known)):
            raise SpecError(
                f"preset {name}: there is no training option {unknown[0]}; "
                f"there are {', '.join(sorted(known))}"
            )
    values |= {key: value for key, value in given.items() if value is not None}
    unlooked = task_class(task.name).attribution_options
    options = {key: value for key, value in task.options.items() if key not in unlooked}
    return make_spec(TrainSpec, task=task.model_copy(update={"options": options}), **values)


class Subject(NamedTuple):
    """What is looked at: a task, as a spec and as an object, at checkpoints."""

    task: TaskSpec
    built: Task
    checkpoints: tuple[Checkpoint, ...]


def subject_request(
    weights: Weights,
    data: Data,
    root: str,
    *,
    default_task: str,
    say: Say,
    default_checkpoints: Sequence[Checkpoint] = (),
) -> Subject:
    """The task and checkpoints a user means.

    Args:
        default_checkpoints: Those without `--checkpoint`; if empty, a training by the preset.

    Raises:
        SpecError, ModelError, StoreError, DataError: As `task_request` and `checkpoint_request`.
    """
    if weights.checkpoint and (weights.epochs or weights.preset):
        raise SpecError(
            "--epochs and --preset say how to train, but --checkpoint names weights that exist"
        )
    checkpoints = [c for word in weights.checkpoint or () for c in checkpoint_request(word, root)]
    checkpoints = checkpoints or [*default_checkpoints]
    name, given = weights.task, task_arguments(data)
    trained = task_trained(checkpoints, name)
    if trained is not None:
        name, given = trained.name, as_trained(trained, given)
    task, built = task_request(
        name or default_task, given, skip_unreadable=data.skip_unreadable, say=say
    )
    if not checkpoints:
        spec = train_request(task, preset=weights.preset, given={"epochs": weights.epochs})
        checkpoints = [TrainedCheckpoint(train=spec, epoch=spec.epochs)]
    # A wrong file must be refused now, not by every worker.
    model = built.model()
    for checkpoint in checkpoints:
        if isinstance(checkpoint, FileCheckpoint) or is_done(Run(root, checkpoint.train)):
            load_checkpoint(model, root, checkpoint)
    return Subject(task, built, tuple(checkpoints))


def task_arguments(data: Data) -> dict[str, Any]:
    """Constructor arguments of a task as the command line has them; None means not given."""
    return {
        "images": data.images,
        "test_images": data.test_images,
        "patch_size": data.patch_size,
        "stride": data.stride,
        "sigma": data.sigma,
        "limit": data.limit,
        "data_dir": data.data_dir,
        **parse_options(data.option),
    }


def checkpoint_request(word: str, runs: str) -> list[Checkpoint]:
    """What `--checkpoint` names: a file, a train run's last epoch, `RUN@EPOCH`, or `RUN@all`.

    Raises:
        SpecError, ModelError, StoreError: There is nothing of that name, or it is no training.
    """
    if Path(word).is_file():
        return [file_checkpoint(word)]
    run_word, _, epoch_word = word.partition("@")
    if "/" in run_word or run_word.endswith((".pt", ".pth")):
        raise ModelError(f"there is no checkpoint file {word}")
    spec = find_run(runs, run_word).spec
    if not isinstance(spec, TrainSpec):
        raise SpecError(f"{spec.run_id} is no train run, so it has no weights")
    if epoch_word == "all":
        epochs: Sequence[int] = spec.save_epochs
    elif epoch_word == "":
        epochs = spec.save_epochs[-1:]
    elif re.fullmatch(r"\d+", epoch_word):
        epochs = [int(epoch_word)]
    else:
        raise SpecError(f"--checkpoint {word}: after @ comes an epoch or all")
    for epoch in epochs:
        if epoch not in spec.save_epochs:
            saved = ", ".join(map(str, spec.save_epochs))
            raise SpecError(f"{spec.run_id} keeps no weights of epoch {epoch}; it keeps {saved}")
    return [TrainedCheckpoint(train=spec, epoch=epoch) for epoch in epochs]


def task_trained(checkpoints: Sequence[Checkpoint], wanted: str | None) -> TaskSpec | None:
    """The task that checkpoints were trained on; None if they are files.

    Args:
        wanted: The task's name, if the user gave one.

    Raises:
        ModelError: One is of another task.
    """
    trained = [c.train for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    if not trained:
        return None
    name = wanted or trained[0].task.name
    for train in trained:
        if train.task.name != name:
            raise ModelError(
                f"{train.run_id} is a training of {train.task.name}, not of {name}: "
                "name a checkpoint of this task"
            )
    return trained[0].task
