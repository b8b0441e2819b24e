"""The subject of a request: a task, with its data fetched and checked, at checkpoints."""

import difflib
import inspect
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from infl_configs import preset_names, read_preset
from influence_jobs.errors import ModelError, SpecError
from influence_jobs.gradients.weights import weight_named
from influence_jobs.kinds.s_test.spec import spread_epochs
from influence_jobs.kinds.train.spec import (
    Checkpoint,
    FileCheckpoint,
    TrainedCheckpoint,
    TrainSpec,
)
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.requests.base import Request, Say
from influence_jobs.requests.options import WeightsRequest
from influence_jobs.specs.base import TaskSpec, first_error, make_spec
from influence_jobs.specs.solvers import SourceSettings
from influence_jobs.store.checkpoints import file_checkpoint, load_checkpoint
from influence_jobs.store.find import find_run
from influence_jobs.store.layout import SPEC
from influence_jobs.store.run import Run
from influence_jobs.store.status import is_done
from influence_jobs.tasks.base import Task, defines
from influence_jobs.tasks.fingerprints import fingerprinted
from influence_jobs.tasks.output_loss import require_outputs_of_loss
from influence_jobs.tasks.placement import built_model
from influence_jobs.tasks.registry import (
    arguments_of,
    folder_of,
    name_of,
    option_words,
    task_class,
)
from influence_jobs.tasks.rows import require_rows
from influence_jobs.training.recorder import read_recording, weights_name

ADAMW_DECAY = 0.01  # torch's own default
LONGEST = 160  # characters of the options that are told
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # how names of weight files end


class Subject(NamedTuple):
    """A task, as a spec and as an object, at checkpoints."""

    task: TaskSpec
    built: Task
    checkpoints: tuple[Checkpoint, ...]


def subject_of(
    request: WeightsRequest,
    root: str,
    say: Say,
    *,
    default_checkpoints: Sequence[Checkpoint] = (),
    default_task: TaskSpec | None = None,
    retrains: bool = False,
) -> Subject:
    """The task and checkpoints of a request.

    Args:
        default_checkpoints: Those without `--checkpoint`; if empty, a training by the preset.
        default_task: That of weights in a file, if the user names none.
        retrains: Models will be trained, so that beside foreign weights the user may say how.

    Raises:
        SpecError, ModelError, StoreError, DataError: See `task_of` and `checkpoints_of`.
    """
    checkpoints = [c for word in request.checkpoint for c in checkpoints_of(word, root)]
    settled = not retrains or any(c.repeatable for c in checkpoints)
    if checkpoints and settled and (request.epochs or request.preset):
        raise SpecError(
            "--epochs and --preset say how to train, but --checkpoint names weights that exist: "
            "leave them out"
        )
    checkpoints = checkpoints or [*default_checkpoints]
    trained = _trained_task(checkpoints, request.task)
    if trained is None and request.task is None:
        trained = default_task
    task, built = task_of(request, say, trained=trained)
    if not checkpoints:
        given: dict[str, Any] = {"epochs": request.epochs}
        spec = training_of(task, preset=request.preset, given=given, say=say)
        if getattr(request, "solver", None) == "source" and spec.follows_gradient:
            segments = getattr(request, "segments", None) or SourceSettings().segments
            given["save_epochs"] = spread_epochs(spec.epochs, segments)
            spec = training_of(task, preset=request.preset, given=given, say=lambda _: None)
        checkpoints = [TrainedCheckpoint(train=spec, epoch=spec.epochs)]
    # Refuse a wrong file here, before workers start.
    model = built_model(built)
    for checkpoint in checkpoints:
        if isinstance(checkpoint, FileCheckpoint) or is_done(Run(root, checkpoint.train)):
            load_checkpoint(model, root, checkpoint)
    return Subject(task, built, tuple(checkpoints))


def task_of(
    request: Request, say: Say, *, trained: TaskSpec | None = None
) -> tuple[TaskSpec, Task]:
    """The task a user asked for, with its data fetched, checked and fingerprinted.

    Args:
        trained: As for `built_task`.

    Raises:
        SpecError, DataError: As `built_task`, and where its data have no rows by position or are
            others each time.
    """
    spec, task = built_task(request, say, trained=trained)
    require_outputs_of_loss(type(task))
    require_rows(task)
    data, code = fingerprinted(spec.name, task, like=trained)
    if trained is not None and trained.name == spec.name:
        if trained.code not in ("", code):
            say(f"the code of task {spec.name} changed since its checkpoint was trained")
        elif trained.data != data:
            say(f"task {spec.name} has other data or code than its checkpoint was trained with")
        if taken := _taken_over(request, spec, task):
            say(f"task {spec.name} has the options that its checkpoint was trained with: {taken}")
    return spec.model_copy(update={"data": data, "code": code}), task


def _taken_over(request: Request, spec: TaskSpec, task: Task) -> str:
    """The options that differ from the task's defaults and that the user has not given."""
    defaults = {name: of.default for name, of in arguments_of(type(task)).items()}
    given = {*request.task_options, *(task.given if request.task is task else ())}
    taken = {name: value for name, value in spec.options.items() if name not in given}
    return shorten(shlex.join(option_words(taken, defaults)), LONGEST, placeholder=" ...")


def built_task(
    request: Request, say: Say, *, trained: TaskSpec | None = None
) -> tuple[TaskSpec, Task]:
    """The task a user asked for, with its data fetched and checked; its spec lacks fingerprints.

    Args:
        trained: The task of the training in use; it gives the options that the user leaves out.

    Raises:
        SpecError: There is no such task, or it does not take one of the options.
        DataError: Its data cannot be fetched or read.
    """
    wanted, given = request.task, dict(request.task_options)
    if isinstance(wanted, Task):
        given = {**wanted.given, **given}
    name = name_of(wanted) if wanted is not None else trained.name if trained else ""
    name = name or request.default_task
    kind = task_class(wanted if isinstance(wanted, str) else trained or name)
    given = {key: value for key, value in given.items() if value is not None}
    if trained is not None:
        given = kind.inherit({**trained.options, **trained.paths}, given)
    values = _converted(name, kind, given, others=type(request).model_fields)
    parameters = arguments_of(kind)
    words = {parameters[key].default for key in kind.paths & parameters.keys()}
    for key in sorted(kind.paths & parameters.keys()):
        value = values.get(key, parameters[key].default)
        if not isinstance(value, str):
            continue
        # A preset's default such as `samples` is not a folder; that of one's own task may be.
        if value not in words or (":" in name and Path(value).expanduser().exists()):
            values[key] = str(Path(value).expanduser().absolute())
    values = kind.settle(values, say)
    # Defaults are written out: whether the user gives a default or not, the run is the same.
    complete = {p.name: values.get(p.name, p.default) for p in parameters.values()}
    missing = [key for key, value in complete.items() if value is inspect.Parameter.empty]
    if missing:
        raise SpecError(f"task {name} needs {_flag(missing[0])} VALUE")
    options = {key: value for key, value in complete.items() if key not in kind.paths}
    for key, value in options.items():
        try:
            TaskSpec(name=name, options={key: value}, data="")
        except ValueError:
            raise SpecError(
                f"option {key} of task {name} is {value!r}: it must be a finite number, a word, "
                "true, false or None"
            ) from None
    task = kind(**complete)
    task.prepare(say)
    paths = {key: values[key] for key in sorted(kind.paths & values.keys())}
    spec = TaskSpec(name=name, options=options, paths=paths, data="", folder=folder_of(kind))
    return spec, task


def _converted(
    name: str, kind: type[Task], given: Mapping[str, Any], *, others: Iterable[str]
) -> dict[str, Any]:
    """Convert options to the types in the task's constructor, or to the types of its defaults.

    Args:
        others: Names of the request's own options; an unknown name may be a misspelt one.

    Raises:
        SpecError: The task has no such option, or a value does not fit.
    """
    parameters = arguments_of(kind)
    types = {
        **{key: p.annotation for key, p in parameters.items()},
        **kind.request_options,
    }
    values = {}
    for key, value in given.items():
        if key not in types:
            takes = ", ".join(map(_flag, types)) or "no options"
            near = difflib.get_close_matches(key, [*types, *others], 1)
            meant = f"; did you mean {_flag(near[0])}?" if near else ""
            raise SpecError(
                f"there is no option {_flag(key)} here, and task {name} has {takes}{meant}"
            )
        default = parameters[key].default if key in parameters else None
        wanted = types[key]
        if wanted is inspect.Parameter.empty:
            if default in (None, inspect.Parameter.empty):
                values[key] = _scalar(value)
                continue
            wanted = type(default)
        try:
            values[key] = TypeAdapter(wanted).validate_python(value)
        except ValidationError as error:
            said = first_error(error)
            raise SpecError(
                f"{_flag(key)} {value} of task {name}: {said[:1].lower()}{said[1:]}"
            ) from None
    return values


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _scalar(value: Any) -> Any:
    """A word of the command line, as a number or truth value if it is one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)  # YAML 1.1 takes 1e-3 for text
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(value)
    except Exception:  # noqa: BLE001  (the constructors of YAML's types raise almost anything)
        return value


# What a task decides that has a method of its own, as fields of a training.
_OWN: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("optimizer", "lr", "momentum", "nesterov", "weight_decay", "no_bias_decay"),
    "scheduler": ("schedule", "warmup", "step_every", "step_factor"),
}
_OPTIONS = {"save_epochs": "save-epoch", "norm_layers": "norms-layer"}


def training_of(
    task: TaskSpec, *, preset: str | None, given: Mapping[str, Any], say: Say
) -> TrainSpec:
    """The spec of a training: the preset's values, overridden by given values that are not None.

    Raises:
        SpecError: There is no such preset, a value is out of range, or it has no meaning: because
            the task decides it, or beside the others.
    """
    kind, task = task_class(task), _as_trained(task)
    given = {key: value for key, value in given.items() if value is not None}
    if defines(kind, "train"):
        for name in (*(["preset"] if preset else []), *given):
            if name != "seed":
                raise _decided_by_task(task.name, name, "train")
        return make_spec(TrainSpec, task=task, trainer="task", **given)
    values = _preset_values(preset or (task.name if task.name in preset_names() else None))
    own = {}
    for method, names in _OWN.items():
        if not defines(kind, method):
            continue
        for name in names:
            if name in given:
                raise _decided_by_task(task.name, name, method)
        if dropped := [name for name in names if values.pop(name, None) is not None]:
            say(
                f"task {task.name} has its own {method}(), so it ignores these options of the "
                f"preset: {', '.join(dropped)}"
            )
        own["schedule" if method == "scheduler" else method] = "task"
    values |= given
    if values.get("optimizer") == "adamw":
        values.setdefault("weight_decay", ADAMW_DECAY)
    spec = make_spec(TrainSpec, task=task, **{**values, **own})
    for name in sorted({*_OWN["optimizer"], *_OWN["scheduler"]} & given.keys()):
        if getattr(spec, name) != given[name]:
            raise SpecError(f"{_option(name)} has no meaning for {spec.how()}: leave it out")
    return spec


def recorded_training(task: TaskSpec, built: Task, folder: str) -> TrainSpec:
    """The spec of a training elsewhere, from what a recorder kept of it.

    Raises:
        ModelError: The folder has no recording, or not of this task's model and data.
    """
    path = Path(folder).expanduser().absolute()
    found, digest = read_recording(path)
    n = len(built.train_data())
    if found.num_samples != n:
        raise ModelError(
            f"recording {folder} is of {found.num_samples:,} samples, and task {task.name} has "
            f"{n:,}: name a task with the training data that were recorded"
        )
    if found.epochs not in found.saved:
        raise ModelError(
            f"recording {folder} lacks the weights after its last epoch ({found.epochs}): let the "
            "recorder keep them (save_epochs)"
        )
    model = built_model(built)
    load_weights(model, path / weights_name(found.epochs))
    for layer in found.layers:
        weight_named(model, layer)
    counted = found.layers if found.epochs > found.skip_epochs else ()
    return make_spec(
        TrainSpec,
        task=_as_trained(task),
        trainer="recorded",
        recorded=FileCheckpoint(path=str(path), sha256=digest),
        epochs=found.epochs,
        save_epochs=found.saved,
        norm_layers=counted,
        norm_reduction=found.reduction,
        norm_skip_epochs=found.skip_epochs,
    )


def _as_trained(task: TaskSpec) -> TaskSpec:
    """A task without the options that training does not look at."""
    unlooked = task_class(task).attribution_options
    options = {key: value for key, value in task.options.items() if key not in unlooked}
    return task.model_copy(update={"options": options})


def _option(field: str) -> str:
    return _flag(_OPTIONS.get(field, field))


def _decided_by_task(task: str, field: str, method: str) -> SpecError:
    return SpecError(
        f"{_option(field)} has no meaning here: task {task} has its own {method}(); change it "
        "there, and leave the option out"
    )


def _preset_values(name: str | None) -> dict[str, Any]:
    """The values of a preset, or none.

    Raises:
        SpecError: There is no such preset, or it has an unknown field.
    """
    if name is None:
        return {}
    try:
        values = dict(read_preset(name)["train"])
    except ValueError as error:
        raise SpecError(str(error)) from None
    known = TrainSpec.model_fields.keys() - {"kind", "task", "trainer", "recorded"}
    if unknown := sorted(map(str, values.keys() - known)):
        raise SpecError(
            f"preset {name}: there is no training option {unknown[0]}; "
            f"there are {', '.join(sorted(known))}"
        )
    for field, method in (("optimizer", "optimizer"), ("schedule", "scheduler")):
        if values.get(field) == "task":
            raise SpecError(
                f"preset {name}: {field} cannot be 'task': leave the line out, a task's own "
                f"{method}() is used anyway"
            )
    return values


def checkpoints_of(word: str, root: str) -> list[Checkpoint]:
    """What `--checkpoint` names: a file, a folder, a run's last epoch, `RUN@EPOCH` or `RUN@all`.

    Raises:
        SpecError, ModelError, StoreError: The name is unknown, or the run is not a training.
    """
    path = Path(word).expanduser()
    run_word, _, epoch_word = word.partition("@")
    # In the folder of all runs, a run's folder has the name of the run.
    if path.is_file() or (path.is_dir() and not (path / SPEC).is_file()):
        return [file_checkpoint(str(path))]
    if "/" in run_word or run_word.endswith(_WEIGHTS):
        raise ModelError(f"there is no checkpoint file {word}")
    spec = find_run(root, run_word).spec
    if not isinstance(spec, TrainSpec):
        raise SpecError(f"{spec.run_id} is not a train run, so it has no weights")
    if epoch_word == "all":
        epochs: Sequence[int] = spec.save_epochs
    elif epoch_word == "":
        epochs = spec.save_epochs[-1:]
    elif re.fullmatch(r"\d+", epoch_word):
        epochs = [int(epoch_word)]
    else:
        raise SpecError(f"--checkpoint {word}: write an epoch or all after @")
    for epoch in epochs:
        if epoch not in spec.save_epochs:
            saved = ", ".join(map(str, spec.save_epochs))
            cure = "--epochs" if epoch > spec.epochs else "--save-epoch"
            raise SpecError(
                f"{spec.run_id} keeps no weights of epoch {epoch}; it keeps {saved}: train with "
                f"{cure} {epoch}"
            )
    return [TrainedCheckpoint(train=spec, epoch=epoch) for epoch in epochs]


def _trained_task(checkpoints: Sequence[Checkpoint], wanted: Any) -> TaskSpec | None:
    """The task that checkpoints were trained on; None if they are files.

    Args:
        wanted: The task that the user named, if any.

    Raises:
        ModelError: A checkpoint belongs to another task.
    """
    trained = [c.train for c in checkpoints if isinstance(c, TrainedCheckpoint)]
    if not trained:
        return None
    name = trained[0].task.name if wanted is None else name_of(wanted)
    for train in trained:
        if train.task.name != name:
            raise ModelError(
                f"{train.run_id} is a training of {train.task.name}, not of {name}: "
                "name a checkpoint of this task"
            )
    return trained[0].task
