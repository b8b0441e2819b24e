"""Blocked steps of perceptrons compared with the recursion with dense float64 matrices."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from influence_jobs.curvature import GaussNewton, Hessian, Lissa
from influence_jobs.curvature.lissa_steps import AnySteps, lissa_steps
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.perceptrons import lissa, pending
from influence_jobs.perceptrons.lissa import PerceptronLissaSteps
from influence_jobs.perceptrons.network import find_perceptron
from influence_jobs.tasks.base import Task

N, DAMPING, SCALE = 40, 0.02, 7.0


class Points(Task):
    """Random points of three classes and a perceptron with two hidden layers."""

    output_loss = "cross-entropy"

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(N, 2, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (N,), generator=generator)

    def model(self):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
        )

    def train_data(self):
        return self.y

    def batch(self, ids, draw):
        return self.x[ids], self.y[ids]

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


@pytest.fixture
def task():
    return Points()


@pytest.fixture
def model(task):
    torch.manual_seed(1)
    return task.model().double().eval()


def dense(task, model, space, ids, kind):
    """The matrix (P, P) of a mini-batch, by torch.func alone."""
    batch = task.batch(ids, None)
    theta_P = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(theta_P):
        return functional_call(model, space.split(theta_P), (batch[0],))

    if kind is Hessian:
        return torch.func.hessian(lambda theta_P: F.cross_entropy(outputs(theta_P), batch[1]))(
            theta_P
        )
    jacobian_BCP = torch.func.jacrev(outputs)(theta_P)
    p_BC = outputs(theta_P).softmax(1)
    output_hessian_BCC = torch.diag_embed(p_BC) - p_BC[:, :, None] * p_BC[:, None]
    return (jacobian_BCP.mT @ output_hessian_BCC @ jacobian_BCP).mean(0)


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("queries", ["vectors", "samples"])
def test_steps_are_the_recursion(task, model, kind, batch_size, repeats, queries, monkeypatch):
    monkeypatch.setattr(pending, "PART_SAMPLES", 2)
    space = ParameterSpace(model)
    operator = kind(model, space, task, torch.arange(N))
    v_QP = torch.randn(3, space.size, dtype=torch.float64)
    if queries == "samples":  # outer products in each layer; and one of nothing
        losses = [task.losses(model, task.batch(torch.tensor([i]), None)).sum() for i in (3, 8)]
        v_QP = torch.stack([*map(space.gradient, losses), torch.zeros(space.size)]).double()
    ids_ESB = torch.randint(N, (repeats, 11, batch_size))
    h_EQP = v_QP.repeat(repeats, 1, 1)
    sum_EQP = torch.zeros_like(h_EQP)
    for repeat, ids_SB in enumerate(ids_ESB):
        for ids in ids_SB:
            product_QP = h_EQP[repeat] @ dense(task, model, space, ids, kind)
            h_EQP[repeat] = v_QP + (1 - DAMPING) * h_EQP[repeat] - product_QP / SCALE
            sum_EQP[repeat] += h_EQP[repeat]
    blocked = lissa_steps(operator, v_QP, DAMPING, SCALE, batch_size, repeats)
    assert isinstance(blocked, PerceptronLissaSteps)
    for steps in (blocked, AnySteps(operator, v_QP, DAMPING, SCALE, repeats)):
        total_EQP = torch.zeros_like(sum_EQP)
        for piece in ids_ESB.split(min(4, steps.longest), dim=1):
            steps.take(piece, total_EQP)
        torch.testing.assert_close(steps.h_EQP(), h_EQP)
        torch.testing.assert_close(total_EQP, sum_EQP)
        torch.testing.assert_close(steps.lengths(), h_EQP.norm(dim=2))


def test_one_layer_alone(task):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double().eval()
    space = ParameterSpace(model)
    operator = GaussNewton(model, space, task, torch.arange(N))
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    steps = lissa_steps(operator, v_QP, DAMPING, SCALE, 2)
    assert isinstance(steps, PerceptronLissaSteps)
    plain = AnySteps(operator, v_QP, DAMPING, SCALE)
    ids_ESB = torch.randint(N, (1, 3, 2))
    for each in (steps, plain):
        each.take(ids_ESB)
    torch.testing.assert_close(steps.h_EQP(), plain.h_EQP())


def test_a_block_is_its_steps_one_by_one(task, model):
    space = ParameterSpace(model)
    operator = GaussNewton(model, space, task, torch.arange(N))
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    ids_ESB = torch.randint(N, (1, 6, 1))
    together, apart = (PerceptronLissaSteps(operator, *given(operator, v_QP)) for _ in range(2))
    together.take(ids_ESB)
    for ids_ES1 in ids_ESB.split(1, dim=1):
        apart.take(ids_ES1)
    torch.testing.assert_close(together.h_EQP(), apart.h_EQP())


def given(operator, v_QP):
    perceptron = find_perceptron(operator.model)
    return perceptron, v_QP, DAMPING, SCALE, 1, 1


def test_a_solution_is_that_of_any_model(task, model, monkeypatch):
    space = ParameterSpace(model)
    operator = GaussNewton(model, space, task, torch.arange(N))
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    solver = Lissa(0.5, scale=20.0, batch_size=4)
    blocked = solver.solve(operator, v_QP)
    cost = operator.work
    operator.work = 0.0
    monkeypatch.setattr(lissa, "perceptron_lissa_steps", lambda *_: None)
    plain = solver.solve(operator, v_QP)
    torch.testing.assert_close(blocked.x_QP, plain.x_QP)
    assert blocked.record["depth"] == plain.record["depth"]
    assert cost == pytest.approx(operator.work, rel=0.01)


class Widened(nn.Linear):
    """Computes something else than its base class."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("why", ["tanh", "subclass", "hook", "some layers", "difference"])
def test_what_is_no_plain_perceptron_takes_one_product_a_step(task, model, why):
    kind: Any
    modules, kind, options = None, GaussNewton, {}
    if why == "tanh":
        model[2] = nn.Tanh()
    elif why == "subclass":
        model[3] = Widened(5, 4).double()
    elif why == "hook":  # invisible in a trace
        model[3].register_forward_hook(lambda module, args, output: output * 1.5)
    elif why == "some layers":
        modules = ["5"]
    else:
        kind, options = Hessian, {"finite_difference": True}
    space = ParameterSpace(model.eval(), modules)
    operator = kind(model, space, task, torch.arange(N), **options)
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    assert isinstance(lissa_steps(operator, v_QP, DAMPING, SCALE, 2), AnySteps)
