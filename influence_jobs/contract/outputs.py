"""Checks of what scores ask for besides losses: outputs, targets, test samples, what people see."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from influence_jobs.contract.trial import Line, Said, Trial, fail, ok, warn
from influence_jobs.curvature.requirements import require_output_loss
from influence_jobs.errors import SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.jobs.queries import size_of
from influence_jobs.tasks.base import Draw, Task, defines
from influence_jobs.tasks.output_loss import forms_of, require_outputs_of_loss
from influence_jobs.tasks.seen import Text, Wave, content


@torch.no_grad()
def gauss_newton(trial: Trial) -> Said:
    """The losses are what `output_loss` says of outputs and targets."""
    task = trial.task
    if task.output_loss is None:
        yield warn(
            "the task has no output_loss, so there is no Gauss-Newton matrix, EK-FAC or "
            "relabelling: define outputs(), targets() and output_loss, or use --operator hessian"
        )
        return
    require_outputs_of_loss(type(task))
    form = require_output_loss(task, trial.model, trial.batch, forms_of(task))[0]
    outputs, targets = task.outputs(trial.model, trial.batch), task.targets(trial.batch)
    yield ok(
        f"losses are the {form.words} of outputs {tuple(outputs.shape)} and targets "
        f"{tuple(targets.shape)}"
    )


def tests(trial: Trial) -> Said:
    """Test samples can be measured, and their gradient is something."""
    task = trial.task
    count = len(task.test_data())
    if count == 0:
        yield warn("the task has no test_data(), so scores have no output to explain: define it")
        return
    size = size_of(task, 0)
    together = min(count, 2) if size is None else 1  # images may be of any size
    batch = trial.given(task.test_batch(torch.arange(together), Draw(0)))
    for quantity in task.quantities:
        with differentiable_kernels(trial.model):
            values_B = task.measure(trial.model, batch, quantity, None)
        if values_B.shape != (together,) or not values_B.isfinite().all():
            yield fail(
                f"measure() of {quantity} gives {values_B.detach().cpu().tolist()} for "
                f"{together} test samples: one finite number each is needed"
            )
            return
        if not ParameterSpace(trial.model).gradient(values_B[0]).any():
            yield fail(
                f"the gradient of the {quantity} of test sample 0 is exactly zero, so every score "
                "would be zero"
            )
            return
    regions = "no regions (test_size() is None)"
    if size is not None and size[1] > 0:
        regions = f"regions of {size[0]} x {size[1]} pixels"
        corner = (size[0] - 1, size[1] - 1, 1, 1)
        if size[0] == 1:
            regions = f"spans of tokens, of which the first has {size[1]}"
        for quantity in task.quantities:
            try:
                value_B = task.measure(trial.model, batch, quantity, corner)
            except SpecError as error:  # such as a loss that is of no single pixel
                yield warn(str(error))
                break
            if value_B.shape != (1,) or not value_B.isfinite().all():
                yield fail(f"measure() of {quantity} at one pixel gives {value_B.tolist()}")
                return
    measured = ", ".join(task.quantities)
    yield ok(f"{count:,} test samples; measured is {measured}; {regions}")


def people(trial: Trial) -> Said:
    """What a person is shown of samples fits them."""
    task, ids = trial.task, trial.ids.numpy()
    yield _columns("describe()", task.describe(ids), len(ids))
    count = min(2, len(task.test_data()))
    if count:
        yield _columns("describe_test()", task.describe_test(np.arange(count)), count)
    for hook, of in (("show", int(ids[0])), ("show_test", 0))[: 1 + (count > 0)]:
        if defines(type(task), hook):
            yield _seen(task, hook, of)
    try:
        yield _pictures("pictures()", task.pictures(ids), len(ids))
        if count:
            yield _pictures("test_picture()", task.test_picture(0)[None], 1)
    except SpecError as error:
        says = "show() says" if defines(type(task), "show") else "batches and describe() say"
        yield ok(f"{error}: {says} what pages show")


def _seen(task: Task, hook: str, sample: int) -> Line:
    """What a task shows of a sample."""
    try:
        found = content(getattr(task, hook)(sample), f"{hook}()")
    except SpecError as error:
        return fail(str(error))
    match found:
        case None:
            return ok(f"{hook}() leaves sample {sample} as it is seen without it")
        case Text():
            return ok(f"{hook}() gives a text with {len(found.places)} tokens")
        case Wave():
            return ok(f"{hook}() gives a sound of {found.seconds:.3g} s")
        case np.ndarray():
            return ok(f"{hook}() gives {' x '.join(map(str, found.shape))} pixels")
    return ok(f"{hook}() gives the columns {', '.join(found)}")


def _columns(name: str, columns: Mapping[str, Any], size: int) -> Line:
    if not columns:
        return ok(f"no {name}: tables name samples by their ids alone")
    for key, values in columns.items():
        if len(values) != size:
            return fail(f"{name} has {len(values)} values of {key} for {size} samples")
    return ok(f"{name} has {', '.join(columns)}")


def _pictures(name: str, pictures: Any, size: int) -> Line:
    shape, kind = pictures.shape, pictures.dtype
    image = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    if shape[0] != size or not image or kind != np.uint8:
        return fail(
            f"{name} gives {shape} {kind} for {size} samples: (B, H, W) or (B, H, W, 3) of uint8 "
            "is needed"
        )
    return ok(f"{name} gives {' x '.join(map(str, shape[1:]))} pixels")
