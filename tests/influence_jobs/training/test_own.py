"""Trainings that a task does itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.tasks.base import Draw
from influence_jobs.training.changes import Changes
from influence_jobs.training.own import trained_by_task

from .ensembles import CPU, N, Points, mlp


class Scripted(Points):
    """A script as a function: full-batch descent from weights and noise of the global generator."""

    def __init__(self) -> None:
        super().__init__(mlp)
        self.train = "a data set under this name is not the method"  # type: ignore[assignment]

    def train(self, ids: Tensor, seed: int, labels: Tensor | None = None) -> Any:
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, y = self.batch(ids, Draw(0))
        for _ in range(3):
            optimizer.zero_grad()
            noisy = x + 0.01 * torch.randn_like(x)
            F.cross_entropy(model(noisy), y if labels is None else labels).backward()
            optimizer.step()
        return model.state_dict()


def by_hand(ids: Tensor, labels: Tensor | None, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return type(task := Scripted()).train(task, ids, seed, labels)


LABELS = Points(mlp).batch(torch.arange(N), Draw(0))[1]


@pytest.mark.parametrize(
    ("changes", "ids", "labels"),
    [
        (Changes(), torch.arange(N), None),
        (Changes(removed=np.array([3, 0])), torch.tensor([1, 2, *range(4, N)]), None),
        (
            Changes(relabelled=np.array([2, 0]), labels=np.array([4, 3])),
            torch.arange(N),
            torch.cat([torch.tensor([3, LABELS[1], 4]), LABELS[3:]]),
        ),
        (
            Changes(np.array([1]), np.array([1, 89]), np.array([0, 2])),
            torch.tensor([0, *range(2, N)]),
            torch.cat([LABELS[:1], LABELS[2:89], torch.tensor([2])]),
        ),
    ],
)
def test_it_is_given_samples_seed_and_labels(
    changes: Changes, ids: Tensor, labels: Tensor | None
) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    model = trained_by_task(Scripted(), 5, CPU, changes)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    for key, value in by_hand(ids, labels, 5).items():
        assert torch.equal(model.state_dict()[key], value), key


class Returns(Points):
    def __init__(self, give: Callable[[nn.Module], Any]):
        super().__init__(mlp)
        self._give = give

    def train(self, ids: Tensor, seed: int) -> Any:  # type: ignore[override]
        torch.manual_seed(77)
        return self._give(self.model())


def without(model: nn.Module, *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key not in names}


@pytest.mark.parametrize(
    ("give", "kind", "told"),
    [
        (
            lambda m: m,
            ModelError,
            r"train\(\) of Returns returns Sequential, not a state dict: return",
        ),
        (lambda m: {"model": m.state_dict()}, ModelError, "not a state dict"),
        (lambda m: {}, ModelError, "it lacks 1.weight, 1.bias, 4.weight and 3 more: return"),
        (lambda m: without(m, "1.bias"), ModelError, "it lacks 1.bias: return model.state_dict()"),
        (lambda m: m.state_dict() | {"x": LABELS}, ModelError, "it has besides x: return"),
        (lambda m: m.state_dict() | {"1.bias": LABELS}, ModelError, r"shape \(90,\), not \(12,\)"),
        (
            lambda m: m.state_dict() | {"7.bias": torch.full((5,), torch.inf)},
            SpecError,
            r"weights that are not finite \(7.bias; seed 4, 90 samples\): its training diverged",
        ),
    ],
)
def test_what_is_no_state_dict_of_the_model_is_refused(
    give: Any, kind: type[Exception], told: str
) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with pytest.raises(kind, match=told):
        trained_by_task(Returns(give), 4, CPU, Changes())
    assert torch.equal(before, torch.get_rng_state())


class Other(Points):
    """A method of another meaning."""

    def train(self) -> Any:  # type: ignore[override]
        return self.batch(torch.arange(3), Draw(0))


def test_a_method_of_that_name_with_another_meaning_is_told() -> None:
    told = (
        r"train\(\) of Other is called as train\(self, ids: .*\): too many positional arguments; "
    )
    with pytest.raises(SpecError, match=told + "let it take these, or give it another name"):
        trained_by_task(Other(mlp), 0, CPU, Changes())


def test_a_method_that_is_gone_is_told() -> None:
    with pytest.raises(SpecError, match=r"Points no longer has the train\(\) that models were"):
        trained_by_task(Points(mlp), 0, CPU, Changes())


def test_prefixes_of_wrappers_are_dropped() -> None:
    wrapped = Returns(lambda m: {f"module.{k}": v for k, v in m.state_dict().items()})
    plain = Returns(lambda m: m.state_dict())
    one, other = (trained_by_task(task, 0, CPU, Changes()) for task in (wrapped, plain))
    assert torch.equal(one.get_parameter("1.weight"), other.get_parameter("1.weight"))


def test_samples_cannot_be_relabelled_without_labels() -> None:
    changes = Changes(relabelled=np.array([0]), labels=np.array([1]))
    with pytest.raises(SpecError, match=r"train\(\) of Returns takes no labels.* --mode remove"):
        trained_by_task(Returns(nn.Module.state_dict), 0, CPU, changes)
