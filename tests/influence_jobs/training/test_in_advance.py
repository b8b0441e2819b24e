"""Batches that a second thread fetches: the same numbers to the bit, and each is there in time."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_jobs.curvature import GaussNewton, Lissa, operators
from influence_jobs.curvature.lissa_steps import AnySteps, LissaSteps, lissa_steps
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.perceptrons import lissa as perceptron_lissa
from influence_jobs.perceptrons.lissa import PerceptronLissaSteps
from influence_jobs.training import ensemble_data, unrolled
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_data import Asked, Feed
from influence_jobs.training.ensemble_stacked import StackedSteps
from influence_jobs.training.trajectory import Trajectory
from influence_jobs.training.unrolled import Unrolled
from influence_jobs.transfers import OfSteps, ahead

from .ensembles import ADAM, CPU, SGD, N, Points, recipe
from .test_unrolled import Kept

GPU = torch.device("cuda")  # its name alone: nothing of this goes there


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5))


def fetch_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, on the CPU."""
    for module in (operators, perceptron_lissa, unrolled):
        monkeypatch.setattr(module, "loader_for", lambda device: ahead)
    monkeypatch.setattr(ensemble_data, "OfSteps", lambda device: OfSteps(GPU))


class Watch:
    """Notes what is fetched, by whom, and whether that of the next step is there in time."""

    def __init__(self) -> None:
        self.fetched: list[Any] = []
        self.threads = set[int]()
        self._used, self._more = 0, threading.Condition()

    def fetching(self, fetch: Callable[..., Any], what: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            with self._more:
                self.fetched.append(what(*args))
                self.threads.add(threading.get_ident())
                self._more.notify_all()
            return fetch(*args)

        return noted

    def using(self, use: Callable[..., Any], *, last: Callable[[int], bool]) -> Callable[..., Any]:
        def waited(*args: Any) -> Any:
            self._used += 1
            if not last(self._used):
                with self._more:
                    there = self._more.wait_for(lambda: len(self.fetched) > self._used, 10)
                assert there, f"batch {self._used + 1} is not fetched while the one before is used"
            return use(*args)

        return waited


def curvature(network: Callable[[], nn.Module]) -> tuple[GaussNewton, Tensor]:
    task = Points(network)
    torch.manual_seed(0)
    model = task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(N), batch_size=32)
    operator.look()
    return operator, torch.randn(2, operator.size, dtype=torch.float64)


@pytest.mark.parametrize("network", [perceptron, convolution])
# Of 40 samples a product has two passes.
@pytest.mark.parametrize(("repeats", "batch_size"), [(1, 40), (3, 6)])
def test_lissa_finds_the_same_to_the_bit(network, batch_size, repeats, monkeypatch):
    def solved() -> list[Tensor]:
        operator, v_QP = curvature(network)
        solver = Lissa(0.2, scale=9.0, depth=40, batch_size=batch_size, seed=3)
        found = solver.solve_repeats(operator, v_QP, range(repeats))
        chosen = Lissa(0.2)._settings(operator, 0.2)[0]
        return [*(one.x_QP for one in found), torch.tensor([chosen.scale])]

    expected = solved()
    fetch_in_advance(monkeypatch)
    for ours, theirs in zip(solved(), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("network", "kind"), [(convolution, AnySteps), (perceptron, PerceptronLissaSteps)]
)
def test_lissa_has_the_next_batch_in_time(network, kind, monkeypatch):
    fetch_in_advance(monkeypatch)
    operator, v_QP = curvature(network)
    steps: LissaSteps = lissa_steps(operator, v_QP, 0.02, 9.0, 6)
    assert isinstance(steps, kind)
    blocks = [torch.randint(N, (1, 4, 6)) for _ in range(3)]
    units = 12 if kind is AnySteps else 3
    watch = Watch()
    fetch = watch.fetching(operator.batch, lambda ids: ids.tolist())
    monkeypatch.setattr(operator, "batch", fetch)
    owner, name = (operator, "_multiply") if kind is AnySteps else (steps, "_take")
    using = watch.using(getattr(owner, name), last=lambda used: used == units)
    monkeypatch.setattr(owner, name, using)
    assert [*steps.blocks(blocks)] == [4, 4, 4]
    assert [*chain(*watch.fetched)] == torch.cat(blocks, 1).flatten().tolist()
    assert threading.get_ident() not in watch.threads


def going_back(watch: Watch | None = None) -> Tensor:
    task = Points(convolution, noise=0.1)
    how = recipe("adam", 10, lr=3e-3, epochs=1, schedule="cosine")
    path = Trajectory(task, how, seed=2, epochs=1, device=CPU, snapshots=Kept())
    model = path.train(lambda steps: None)
    back = Unrolled(path, torch.float64)
    if watch is not None:
        assert (path.num_steps, path.spacing) == (9, 3)
        back._batch = watch.fetching(back._batch, lambda step: step.ids.tolist())  # type: ignore[method-assign]
        back._back = watch.using(back._back, last=lambda used: used % 3 == 0)  # type: ignore[method-assign]
    given = {n: torch.ones(2, *p.shape) for n, p in model.named_parameters()}
    return back.scores(given, lambda steps: None)


def test_unrolled_goes_back_by_the_same_numbers(monkeypatch):
    expected, watch = going_back(), Watch()
    fetch_in_advance(monkeypatch)
    assert torch.equal(going_back(watch), expected)
    assert len(watch.fetched) == 9
    assert threading.get_ident() not in watch.threads


VARIANTS = [
    Variant(0), Variant(1), Variant(2, Changes(removed=np.arange(20))),
    Variant(2, Changes(removed=np.arange(5, 8))),
]  # fmt: skip


@pytest.mark.parametrize("how", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("stop", [None, 17])
def test_ensembles_of_noisy_data_are_the_same(how, stop, monkeypatch):
    """Also where a training is stopped and goes on in another trainer."""

    def trained(stop: int | None) -> list[dict[str, Tensor]]:
        def trainer() -> EnsembleTrainer:
            return EnsembleTrainer(Points(convolution, noise=0.1), how, VARIANTS, device=CPU)

        found, taken = trainer(), 0
        while found.epoch < 2:
            if taken == stop:
                state, found = found.state_dict(), trainer()
                found.load_state_dict(state)
            found.step()
            taken += 1
        return [dict(found.model(i).state_dict()) for i in range(len(VARIANTS))]

    expected = trained(None)
    fetch_in_advance(monkeypatch)
    for ours, theirs in zip(trained(stop), expected, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_ensemble_has_the_next_batch_in_time(monkeypatch):
    fetch_in_advance(monkeypatch)
    watch = Watch()
    plain, forward = Feed._fetch, StackedSteps._forward
    monkeypatch.setattr(Feed, "_fetch", watch.fetching(plain, lambda _, asked: asked.name))
    steps = -(-N // SGD.batch_size)
    using = watch.using(forward, last=lambda used: used % steps == 0)
    monkeypatch.setattr(StackedSteps, "_forward", using)
    trainer = EnsembleTrainer(Points(convolution, noise=0.1), SGD, VARIANTS[:2], device=CPU)
    for _ in range(2 * steps):
        trainer.step()
    assert watch.fetched == [(epoch, step, 0) for epoch in range(2) for step in range(steps)]
    assert threading.get_ident() not in watch.threads


def test_what_is_fetched_is_freed_with_its_owner(monkeypatch):
    """Without a collection of cycles: a GPU's memory would be full before one."""
    fetch_in_advance(monkeypatch)
    feed = Feed(Points(convolution, noise=0.1), [0, 1], CPU)
    steps = [Asked(slice(0, 2), torch.zeros(2, 1, 8, dtype=torch.int64), 0, i) for i in range(2)]
    gc.collect()
    gc.disable()
    try:
        feed.batch(*steps)
        there = weakref.ref(feed)
        del feed
        ends = time.monotonic() + 10
        while there() is not None and time.monotonic() < ends:
            time.sleep(0.01)  # until the thread has done the second
        assert there() is None
    finally:
        gc.enable()
