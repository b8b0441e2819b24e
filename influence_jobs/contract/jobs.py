"""What the runs of a task would take: each kind of job, planned and probed."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from influence_jobs.contract.trial import Said, Trial, fail, ok, warn
from influence_jobs.errors import InflError
from influence_jobs.jobs.estimate import samples_per_second, worker_bytes
from influence_jobs.kinds import find_kind, open_job
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.memory import Peak
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.own_code import described
from influence_jobs.tasks.placement import to_device
from influence_jobs.terms import duration, size, speed
from influence_jobs.training.train import initial_model

PROBE_S = 0.5

# What is asked of each kind; a query is added where it takes one.
ASKED: Mapping[str, Mapping[str, Any]] = {
    "train": {},
    "grad-norms": {"layer": "all"},
    "s-test": {},
    "influence": {},
    "unrolled": {},
    "attribution": {"layer": "all"},
    "baseline": {"method": "loss"},
    "gradients": {},
    "ablation": {"by": "random", "mode": "remove", "k": 1},
}


def times(trial: Trial) -> Said:
    """Time and memory of each kind of run over all samples, or why it is refused."""
    refused: dict[str, list[str]] = {}
    errors: dict[str, InflError] = {}  # by run
    for name, asked in ASKED.items():
        words = dict(asked)
        request = find_kind(name).request_type
        if "test" in request.model_fields:
            if len(trial.task.test_data()) == 0:
                continue
            words["test"] = 0
        if name in ("s-test", "influence") and trial.task.output_loss is None:
            words["operator"] = "hessian"
        shown = " ".join([name, *(f"--{key} {value}" for key, value in words.items())])
        try:
            yield ok(f"{shown}: {_estimate(name, words, trial, errors)}")
        except InflError as error:
            refused.setdefault(str(error), []).append(shown)
        except Exception as error:  # noqa: BLE001  (the other kinds may well work)
            yield fail(f"{shown}: {described(error)}")
    for why, commands in refused.items():
        yield warn(f"refused: {', '.join(commands)}: {why}")


def _estimate(
    name: str, words: Mapping[str, Any], trial: Trial, errors: dict[str, InflError]
) -> str:
    """What a run would take; refused if a run that it needs is, which `errors` has."""
    # An empty folder: what is there already must not make a difference.
    with tempfile.TemporaryDirectory() as root:
        request = find_kind(name).request_type.of({**words, "task": trial.task})
        (spec,) = request.specs(root, lambda line: None)
        for needed in find_kind(name).job_type.inputs(spec):
            if needed.run_id in errors:
                raise errors[needed.run_id]
        try:
            job = open_job(Run(root, spec), device=trial.device.type)
            plan, peak = job.plan(), Peak(torch.device("cpu"))
            rate = samples_per_second(job.probe(), PROBE_S)
        except InflError as error:
            errors[spec.run_id] = error
            raise
    if rate is None:
        return "as long as its own train() takes"
    memory = size(worker_bytes(job, plan, peak))
    if trial.device.type == "cuda":
        memory += f", {size(torch.cuda.max_memory_allocated())} of the GPU"
    return (
        f"about {duration(plan.units / rate)} at {speed(rate)} on one {trial.device.type}, {memory}"
    )


def batch_of_one(trial: Trial) -> Said:
    """No epoch ends in a batch that BatchNorm refuses."""
    n, step = len(trial.task.train_data()), _default_batch_size(trial.task)
    if n % step != 1 or not any(isinstance(m, _BatchNorm) for m in trial.model.modules()):
        return
    model = initial_model(trial.task, 0, trial.device)
    last = to_device(trial.task.train_batch(torch.tensor([n - 1]), Draw(0)), trial.device)
    try:
        trial.task.losses(model, last)
    except ValueError as error:
        yield fail(
            f"an epoch of {n:,} samples in batches of {step} ends in a batch of one, which cannot "
            f"be trained on ({error}): train with --batch-size {step + 1}"
        )


def _default_batch_size(task: Task) -> int:
    with tempfile.TemporaryDirectory() as root:
        request = find_kind("train").request_type.of({"task": task})
        (spec,) = request.specs(root, lambda line: None)
    assert isinstance(spec, TrainSpec)
    return spec.batch_size
