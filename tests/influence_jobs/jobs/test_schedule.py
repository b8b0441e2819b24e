"""Lambda from the schedule of a training, compared with torch's schedules and with unrolled SGD."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from influence_jobs.jobs.recipe import flow_time, scheduled_damping
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.solvers import ConjugateGradientSettings, IdentitySettings

N, BATCH, EPOCHS = 50, 8, 6
STEPS = math.ceil(N / BATCH)


def training(task: Any, **fields: Any) -> TrainSpec:
    chosen = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.02, "save_epochs": range(1, EPOCHS)}
    return make_spec(TrainSpec, task=task, **(chosen | fields))


@pytest.fixture
def task(grad_norms_spec: Any) -> Any:
    return grad_norms_spec.task


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ({}, None),
        ({"schedule": "cosine"}, lambda o: CosineAnnealingLR(o, EPOCHS * STEPS)),
        (
            {"schedule": "step", "step_every": 2, "step_factor": 0.5},
            lambda o: StepLR(o, 2 * STEPS, 0.5),
        ),
    ],
    ids=["constant", "cosine", "step"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lambda_is_one_over_the_learning_rates_of_all_steps(
    task: Any, fields: dict[str, Any], schedule: Any, momentum: float
) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], 0.02, momentum)
    scheduler: LRScheduler | None = schedule and schedule(optimizer)
    rates = []
    for _ in range(EPOCHS * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    train = training(task, momentum=momentum, **fields)
    for epoch in (1, 4, EPOCHS):
        checkpoint = TrainedCheckpoint(train=train, epoch=epoch)
        expected = (1 - momentum) / sum(rates[: epoch * STEPS])
        found = scheduled_damping(checkpoint, N)
        assert found is not None
        assert found.value == pytest.approx(expected, rel=5e-3)
        assert f"{epoch * STEPS} steps" in found.how
    first, rest = (flow_time(train, N, epochs) for epochs in (range(2), range(2, EPOCHS)))
    assert first + rest == pytest.approx(sum(rates) / (1 - momentum))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lambda_stands_for_unrolled_steps_on_a_quadratic(
    task: Any, momentum: float, decay: float
) -> None:
    """SGD on s x^2 / 2 with a constant push: what it becomes, against 1 / (s + lambda)."""
    train = training(task, momentum=momentum, weight_decay=decay, lr=0.002)
    damping = scheduled_damping(TrainedCheckpoint(train=train, epoch=EPOCHS), N)
    assert damping is not None
    time = flow_time(train, N, range(EPOCHS))
    for s in np.geomspace(1e-3, 1e3, 13) / time:
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        # 40 finer steps each, since gradient flow is what the formula is of.
        optimizer = SGD([x], 0.002 / 40, momentum, weight_decay=decay)
        for _ in range(40 * EPOCHS * STEPS if s * time < 30 else 0):
            x.grad = s * x.detach() - 1
            optimizer.step()
        exact = float(x.detach()) or 1 / (s + decay)  # where it has long converged
        assert 0.76 < (1 / (s + damping.value)) / exact < 1.02


def test_only_plain_sgd_says_a_lambda(task: Any) -> None:
    def found(train: TrainSpec) -> Any:
        return scheduled_damping(TrainedCheckpoint(train=train, epoch=EPOCHS), N)

    assert found(training(task, nesterov=True)) is not None
    for other in ({"optimizer": "adam"}, {"clip_norm": 1.0}, {"schedule": "task"}):
        assert not training(task, **other).follows_gradient
        assert found(training(task, **other)) is None
    assert found(training(task, optimizer="task", lr=None)) is None
    assert scheduled_damping(FileCheckpoint(path="/w.pt", sha256="ab"), N) is None


def test_the_page_says_where_lambda_comes_from(carry_out: Any, s_test_of: Any) -> None:
    from influence_jobs.kinds import view_of

    checkpoint = s_test_of().checkpoint
    scheduled = scheduled_damping(checkpoint, 1500)
    assert scheduled is not None
    assert scheduled.value == pytest.approx(0.1 / (0.05 * 2 * math.ceil(1500 / 32)), rel=5e-3)
    loose = {"tolerance": 0.1}
    given = ConjugateGradientSettings(damping=scheduled.value, **loose)
    said = "\n".join(view_of(carry_out(s_test_of(solver=given))).certainty())
    assert "(1 - momentum 0.9) / (learning rate 0.05 x 94 steps) of the training" in said
    other = ConjugateGradientSettings(damping=1.0, **loose)
    assert "steps)" not in "\n".join(view_of(carry_out(s_test_of(solver=other))).certainty())
    measured = ConjugateGradientSettings(**loose)
    said = "\n".join(view_of(carry_out(s_test_of(solver=measured))).certainty())
    assert "lambda is 0.04 of the largest eigenvalue" in said
    said = "\n".join(view_of(carry_out(s_test_of(solver=IdentitySettings()))).certainty())
    assert "lambda" not in said
