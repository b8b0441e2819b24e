"""Factors of EK-FAC that are not in memory together: the same numbers, on disk, resumed."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence_jobs.curvature import EkFac, GaussNewton, ek_fac_factors
from influence_jobs.curvature.output_gradients import OutputGradients
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.jobs.saved_state import SavedFactors
from influence_jobs.store.files import LocalFiles

from .test_any_model import MODELS, Given, N, classifier

LAMBDA = 0.05


def operator_of(task: Given) -> GaussNewton:
    torch.manual_seed(0)
    model = task.model().eval()
    return GaussNewton(model, ParameterSpace(model), task, torch.arange(N), batch_size=4)


def vectors_of(operator: GaussNewton) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, operator.size, dtype=torch.float64)


def solver(saved: SavedFactors | None, damping: float | None = None, **options: Any) -> EkFac:
    made = EkFac(damping, **options)
    made.saved = saved
    return made


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is a group of its own."""
    monkeypatch.setattr(ek_fac_factors, "GROUP_BYTES", 1)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The layers or parameters of each fit."""
    begun, plain = list[set[str]](), EkFac._swept

    def swept(self: Any, operators: Any, engines: Any, progress: Any) -> Any:
        begun.append(set(operators[0].space.shapes))
        return plain(self, operators, engines, progress)

    monkeypatch.setattr(EkFac, "_swept", swept)
    return begun


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("damping", [LAMBDA, None])
def test_block_by_block_gives_the_same_solution(
    name: str, damping: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    operator = operator_of(classifier(MODELS[name]))
    v_QP = vectors_of(operator)
    together = EkFac(damping).solve(operator, v_QP)
    monkeypatch.setattr(ek_fac_factors, "GROUP_BYTES", 1)
    for saved in (None, SavedFactors(LocalFiles(tmp_path))):
        apart = solver(saved, damping).solve(operator, v_QP)
        torch.testing.assert_close(apart.x_QP, together.x_QP, rtol=1e-9, atol=1e-12)
        assert apart.damping == pytest.approx(together.damping, rel=1e-9)
        assert apart.record == together.record


def test_a_bias_stays_with_its_weight(alone: None) -> None:
    operator = operator_of(classifier(MODELS["attention"]))
    assert EkFac(LAMBDA)._groups(operator) == [
        ["qkv.weight", "qkv.bias"],
        ["head.weight", "head.bias"],
    ]


def test_factors_are_fitted_once_and_resumed_after_the_last_group(
    alone: None, sweeps: list[set[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = LocalFiles(tmp_path)
    operator = operator_of(classifier(MODELS["encoder"]))
    v_QP = vectors_of(operator)
    expected = EkFac().solve(operator, v_QP).x_QP
    groups = len(EkFac()._groups(operator))
    sweeps.clear()

    class Killed(BaseException):
        pass

    def killed(fraction: float) -> None:
        if fraction > 2.5 / groups:
            raise Killed

    with pytest.raises(Killed):
        solver(SavedFactors(files)).solve(operator, v_QP, killed)
    assert len(sweeps) == 3
    found = solver(SavedFactors(files)).solve(operator, v_QP)
    torch.testing.assert_close(found.x_QP, expected, rtol=0, atol=0)
    assert len(sweeps) == groups + 1  # of the third, the sweep was not over
    sweeps.clear()
    again = solver(SavedFactors(files)).solve(operator, v_QP)  # as another worker
    torch.testing.assert_close(again.x_QP, expected, rtol=0, atol=0)
    assert sweeps == []
    assert again.gradient_equivalents == found.gradient_equivalents
    # A damaged file, and one of other targets, are computed anew.
    first = min(files.names("factors"))
    files.write(f"factors/{first}", b"damaged")
    solver(SavedFactors(files)).solve(operator, v_QP)
    assert len(sweeps) == 1
    solver(SavedFactors(files), targets="sampled").solve(operator, v_QP)
    assert len(sweeps) == 1 + groups
    SavedFactors(files).delete()
    assert files.names("factors") == []


def test_no_more_than_one_group_is_in_memory(
    alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the blocks that were filled, none of an earlier group is alive when the next begins."""
    operator = operator_of(classifier(MODELS["encoder"]))
    alive, plain = weakref.WeakSet[Any](), EkFac._swept
    most = 0

    def swept(self: Any, operators: Any, engines: Any, progress: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, len(alive))
        factors = plain(self, operators, engines, progress)
        alive.update(factors.blocks.values())
        return factors

    monkeypatch.setattr(EkFac, "_swept", swept)
    solver(SavedFactors(LocalFiles(tmp_path)), LAMBDA).solve(operator, vectors_of(operator))
    assert most <= 1


def test_a_sweep_that_runs_out_of_memory_begins_anew_with_half_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the batch had added by then must not count twice."""
    operator = operator_of(classifier(MODELS["encoder"]))
    v_QP = vectors_of(operator)
    expected = EkFac().solve(operator, v_QP)
    plain, begun = OutputGradients.visit, list[int]()

    def visit(self: Any, batch: Any, on_rows: Any, on_gradients: Any) -> None:
        begun.append(len(batch[1]))
        plain(self, batch, on_rows, on_gradients)
        if len(batch[1]) == 4 and len(begun) > 3:  # after it has added its numbers
            raise MemoryError

    monkeypatch.setattr(OutputGradients, "visit", visit)
    other = operator_of(classifier(MODELS["encoder"]))
    found = EkFac().solve(other, v_QP)
    assert 4 in begun
    assert other.batching.size == 2
    torch.testing.assert_close(found.x_QP, expected.x_QP, rtol=1e-9, atol=1e-12)
