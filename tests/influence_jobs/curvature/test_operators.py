"""Products with the curvature, compared with dense float64 matrices and with curvlinops."""

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn

from influence_jobs.curvature import ConjugateGradient, GaussNewton, Hessian
from influence_jobs.curvature import operators as operators_module
from influence_jobs.curvature.spectrum import (
    largest_eigenvalue,
    smallest_eigenvalue,
    trace,
)
from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Draw

from .conftest import Classes, N, SmallNet, randoms


def test_gauss_newton_is_the_dense_matrix(case):
    operator, dense = case.gauss_newton(), case.dense_gauss_newton()
    v_QP = randoms(4, operator.size)
    torch.testing.assert_close(operator @ v_QP, v_QP @ dense, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(dense).min() > -1e-12


def test_the_hessian_is_the_dense_matrix(case):
    operator, dense = case.hessian(), case.dense_hessian()
    v_QP = randoms(4, operator.size)
    torch.testing.assert_close(operator @ v_QP, v_QP @ dense, rtol=1e-9, atol=1e-12)


def test_finite_differences_come_close(case):
    v_QP = randoms(3, case.hessian().size)
    exact = case.hessian() @ v_QP
    error = (case.hessian(finite_difference=True) @ v_QP - exact).norm() / exact.norm()
    assert 0 < error < 1e-6
    case.model.float()
    error = (case.hessian(finite_difference=True) @ v_QP.float() - exact).norm() / exact.norm()
    assert error < 2e-3


def test_float32_is_within_1e_5_of_the_dense_matrix(case):
    v_QP = randoms(4, case.space.size)
    for dense, make in (
        (case.dense_gauss_newton(), case.gauss_newton),
        (case.dense_hessian(), case.hessian),
    ):
        case.model.float()
        found = make() @ v_QP.float()
        case.model.double()
        expected = v_QP @ dense
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_a_mini_batch_is_the_mean_over_its_samples(case):
    ids = torch.tensor([3, 3, 17, 5])  # as LiSSA draws them: with replacement
    v_QP = randoms(2, case.space.size)
    product = case.gauss_newton().product(v_QP, ids)
    torch.testing.assert_close(product, v_QP @ case.dense_gauss_newton(ids))


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("held", ["all", "a mini-batch", "some samples"])
def test_mini_batches_side_by_side_are_each_alone(case, kind, held, monkeypatch):
    alone, together = (getattr(case, kind)() for _ in range(2))
    v_EQP = randoms(6, case.space.size).view(3, 2, -1)
    ids_EB = torch.randperm(N)[:9].view(3, 3)
    expected = [alone.product(v_QP, ids) for v_QP, ids in zip(v_EQP, ids_EB, strict=True)]
    if held != "all":
        together.look()
        passes = {"a mini-batch": 6, "some samples": 4}[held]
        monkeypatch.setattr(operators_module, "MAX_BYTES", passes * together._sample_bytes)
        monkeypatch.setattr(operators_module, "MIN_ROWS", 1)
    found_EQP = case.space.join(together.products(v_EQP, ids_EB))
    torch.testing.assert_close(found_EQP, torch.stack(expected))
    assert together.work == alone.work
    assert together._batches_together == ({ids_EB.shape: True} if held == "all" else {})


class Looking(SmallNet):
    """Branches on a tensor's value, which vmap over mini-batches does not allow."""

    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 0 else x * 3)


class Sharing(Classes):
    """A batch has a tensor without a sample axis, as long as two mini-batches."""

    def batch(self, ids, draw):
        return *super().batch(ids, draw), torch.arange(2.0, 8.0, dtype=torch.float64)

    def outputs(self, model, batch):
        return model(batch[0]) * batch[2].sum()


@pytest.mark.parametrize("model, task", [(Looking, Classes), (SmallNet, Sharing)])
def test_models_that_cannot_be_mapped_over_mini_batches_take_them_one_by_one(model, task):
    task = task()
    torch.manual_seed(0)
    model = model(3).double().eval()
    space = ParameterSpace(model)
    operator = Hessian(model, space, task, torch.arange(N))
    v_EQP, ids_EB = randoms(4, space.size).view(2, 2, -1), torch.arange(6).view(2, 3)
    expected = [operator.product(v_QP, ids) for v_QP, ids in zip(v_EQP, ids_EB, strict=True)]
    found_EQP = space.join(operator.products(v_EQP, ids_EB))
    torch.testing.assert_close(found_EQP, torch.stack(expected))
    assert operator._batches_together == {ids_EB.shape: False}


def test_finite_differences_are_taken_one_by_one(case):
    operator = case.hessian(finite_difference=True)
    v_EQP, ids_EB = randoms(4, case.space.size).view(2, 2, -1), torch.arange(6).view(2, 3)
    operator.products(v_EQP, ids_EB)
    assert operator._batches_together == {}


class Idle(SmallNet):
    """A model with a layer that it never uses."""

    def __init__(self, outputs):
        super().__init__(outputs)
        self.idle = nn.Linear(2, 2)


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_unused_parameters_have_no_curvature_however_a_mini_batch_is_cut(kind):
    torch.manual_seed(0)
    model = Idle(3).double().eval()
    space = ParameterSpace(model)
    v_QP, ids = randoms(2, space.size), torch.arange(9)
    cut, whole = (kind(model, space, Classes(), torch.arange(N), batch_size=b) for b in (4, 9))
    found_QP = cut.product(v_QP, ids)
    torch.testing.assert_close(found_QP, whole.product(v_QP, ids))
    assert not space.split(found_QP)["idle.weight"].any()


@pytest.mark.parametrize("batch_size", [1, 7, N])
def test_batches_and_chunks_do_not_matter(case, batch_size, monkeypatch):
    v_QP = randoms(5, case.space.size)
    for make in (case.gauss_newton, case.hessian):
        expected = make() @ v_QP
        torch.testing.assert_close(make(batch_size=batch_size) @ v_QP, expected)
    monkeypatch.setattr(operators_module, "MAX_BYTES", 1)  # one vector at a time
    torch.testing.assert_close(case.hessian() @ v_QP, expected)


def test_a_subset_is_the_curvature_of_its_samples(case):
    ids = torch.tensor([0, 5, 9])
    v_QP = randoms(2, case.space.size)
    found = case.gauss_newton(ids=ids) @ v_QP
    torch.testing.assert_close(found, v_QP @ case.dense_gauss_newton(ids))
    torch.testing.assert_close(case.gauss_newton().over(ids) @ v_QP, found)


def test_a_space_of_some_modules_is_a_block_of_the_matrix(case):
    space = ParameterSpace(case.model, ["conv"])
    operator = GaussNewton(case.model, space, case.task, torch.arange(N))
    v_QP = randoms(2, space.size)
    block = case.dense_gauss_newton()[: space.size, : space.size]  # conv comes first
    torch.testing.assert_close(operator @ v_QP, v_QP @ block)


@pytest.mark.parametrize("kind", [GGNLinearOperator, HessianLinearOperator])
def test_curvlinops_agrees(case, kind):
    loss = nn.MSELoss() if case.task.output_loss == "mse" else nn.CrossEntropyLoss()
    data = [case._batch(ids) for ids in torch.arange(N).split(10)]
    theirs = kind(case.model, loss, list(case.model.parameters()), data)
    ours = case.gauss_newton() if kind is GGNLinearOperator else case.hessian()
    v_QP = randoms(2, ours.size)
    torch.testing.assert_close(ours @ v_QP, (theirs @ v_QP.T).T)


def test_the_model_is_left_as_it_was(case):
    before = {name: p.clone() for name, p in case.model.state_dict().items()}
    case.hessian(finite_difference=True) @ randoms(1, case.space.size)
    case.gauss_newton() @ randoms(1, case.space.size)
    assert all(torch.equal(before[name], p) for name, p in case.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())


def test_the_spectrum_is_the_dense_matrix(case):
    values = torch.linalg.eigvalsh(case.dense_hessian())
    assert smallest_eigenvalue(case.hessian()) == pytest.approx(float(values[0]), rel=0.02)
    values = torch.linalg.eigvalsh(case.dense_gauss_newton())
    assert largest_eigenvalue(case.gauss_newton()) == pytest.approx(float(values[-1]), rel=0.05)
    estimate = trace(case.gauss_newton(), probes=2000)
    assert estimate == pytest.approx(float(values.sum()), rel=0.1)


def test_train_mode_is_refused(case):
    case.model.train()
    with pytest.raises(ModelError, match="train mode"):
        case.gauss_newton() @ randoms(1, case.space.size)


class Mistaken(Classes):
    def losses(self, model, batch):
        return 2 * super().losses(model, batch)


class Noisy(Classes):
    def batch(self, ids, draw):
        return self.x[ids] + torch.randn(len(ids), 1, 4, 4), self.y[ids]


class Undeclared(Classes):
    output_loss = None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Mistaken, r"losses\(\) of Mistaken does not give the cross-entropy of outputs"),
        (Noisy, "two passes over the same samples of Noisy give different losses"),
        (Undeclared, "Undeclared declares no output_loss"),
    ],
)
def test_tasks_that_would_give_wrong_products(task, message):
    built = task()
    model = built.model().eval()
    space = ParameterSpace(model)
    with pytest.raises(ModelError, match=message):
        GaussNewton(model, space, built, torch.arange(N)) @ randoms(1, space.size, torch.float32)


def test_samples_that_are_not_finite_are_named():
    task = Classes()
    task.x[20] = float("nan")
    model = task.model().eval()
    operator = Hessian(model, ParameterSpace(model), task, torch.arange(N), Draw(0), 8)
    with pytest.raises(DataError, match="samples 16 to 23 is not finite"):
        operator @ randoms(1, operator.size, torch.float32)
    with pytest.raises(DataError, match="the training loss of sample 20 is not finite"):
        ConjugateGradient(1.0).solve(operator, randoms(1, operator.size, torch.float32))
    with pytest.raises(SpecError, match="at least one sample"):
        operator.__class__(model, ParameterSpace(model), task, torch.arange(0))


def test_samples_whose_products_alone_are_not_finite_are_named(monkeypatch):
    """Conjugate gradients look at an iteration's end, when its directions are overwritten."""
    task = Classes()
    task.x[20] = float("nan")
    model = task.model().eval()
    operator = Hessian(model, ParameterSpace(model), task, torch.arange(N), Draw(0), 8)
    monkeypatch.setattr(operator, "require_finite", lambda: None)
    with pytest.raises(DataError, match="samples 16 to 23 is not finite"):
        ConjugateGradient(1.0).solve(operator, randoms(2, operator.size, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(case, dtype):
    case.model.to(dtype)
    with pytest.raises(ModelError, match=r"is of \w*float16, .*: convert the model with model"):
        case.gauss_newton()
