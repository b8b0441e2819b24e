"""Every variant of an ensemble compared with `Trainer` on it alone, in float64."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.tasks.base import Task
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant, why_alone
from influence_jobs.training.ensemble_data import stretches
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.ensemble_stacked import StackedSteps
from influence_jobs.training.recipe import Recipe

from .ensembles import (
    ADAM,
    ADAMW,
    CLIPPED,
    CPU,
    MASKED,
    NESTEROV,
    REMOVALS,
    SGD,
    STEPPED,
    VARIANTS,
    Points,
    SmallFFDNetTask,
    SmoothedPoints,
    check_against_trainer,
    convnet,
    frozen,
    mlp,
    recipe,
    train,
)


@pytest.mark.parametrize(
    ("task", "how", "variants", "layers"),
    [
        (Points(mlp), ADAM, VARIANTS, ("1", "4", "7")),
        (Points(mlp, noise=0.3), SGD, VARIANTS, ("1", "4")),
        (Points(frozen), SGD, VARIANTS, ("4",)),
        (SmoothedPoints(mlp), SGD, REMOVALS, ("1",)),
        (Points(convnet), SGD, VARIANTS[:4], ("0", "4")),
        (Points(convnet), ADAM, VARIANTS[:4], ("0", "4")),
        (Points(mlp), NESTEROV, VARIANTS, ("1",)),
        (Points(convnet), ADAMW, VARIANTS, ("0", "4")),
        (Points(frozen), STEPPED, VARIANTS, ("4",)),
        (Points(mlp, noise=0.3), CLIPPED, VARIANTS, ("1", "7")),
        (Points(mlp, noise=0.3), SGD, MASKED, ("1", "7")),
        (Points(convnet), ADAMW, MASKED, ("0", "4")),
        (SmallFFDNetTask(), recipe("adam", 4, 2, lr=1e-3), REMOVALS, ("main.29",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "reduction",
    [
        pytest.param("kernel", marks=pytest.mark.slow),
        "channel",
        pytest.param("layer", marks=pytest.mark.slow),
    ],
)
def test_each_variant_is_what_it_is_alone(
    task: Task, how: Recipe, variants: Sequence[Variant], layers: tuple[str, ...], reduction: Any
) -> None:
    if isinstance(task, SmallFFDNetTask) and reduction != "channel":
        pytest.skip("slow, and the convnet has them")
    trainer = check_against_trainer(task, how, variants, layers, reduction)
    assert isinstance(trainer.steps, StackedSteps)


@pytest.mark.parametrize(("network", "how"), [(mlp, SGD), (convnet, SGD), (convnet, ADAMW)])
def test_training_resumed_from_its_state_gives_the_same_bits(
    network: Callable[[], nn.Module], how: Recipe
) -> None:
    options = {"norms": NormsWanted(("1",) if network is mlp else ("0",), "channel", 0)}
    variants = VARIANTS[:4]
    whole = train(Points(network), how, variants, **options)
    first = EnsembleTrainer(Points(network), how, variants, device=CPU, **options)
    for _ in range(5):
        first.step()
    states = []
    while not first.finished:
        states.append(pytree.tree_map_only(Tensor, torch.clone, first.state_dict()))
        first.step()
    for state in (states[0], states[len(states) // 2], states[-1]):
        torch.manual_seed(1234)  # another process has another global state
        second = EnsembleTrainer(Points(network), how, variants, device=CPU, **options)
        second.load_state_dict(state)
        while not second.finished:
            second.step()
        for i in range(4):
            resumed = second.model(i).state_dict()
            for name, expected in whole.model(i).state_dict().items():
                assert torch.equal(resumed[name], expected), name
            for layer, sums in whole.norms(i).items():
                assert torch.equal(second.norms(i)[layer], sums)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 12),
    longest=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_stretches_give_every_variant_the_steps_it_takes_alone(
    sizes: list[int], batch_size: int, longest: int
) -> None:
    sizes = sorted(sizes, reverse=True)
    taken: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for stretch in stretches(sizes, batch_size, longest):
        assert 1 <= stretch.steps <= longest
        for row in range(stretch.rows.start, stretch.rows.stop):
            for step in range(stretch.steps):
                taken[row].append((stretch.first_step + step, stretch.batch_size))
    for size, steps in zip(sizes, taken, strict=True):
        alone = torch.arange(size).split(batch_size)
        assert steps == [(i, len(ids)) for i, ids in enumerate(alone)]


def test_equal_variants_take_all_steps_together() -> None:
    rows = {(s.rows.start, s.rows.stop) for s in stretches([33, 33, 33], 8, 2)}
    assert rows == {(0, 3)}


class Looped(nn.Module):
    """A model that branches on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out if float(out.sum()) > 1e9 else 2 * out


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.1), mlp()), "dropout '0'"),
        (lambda: nn.Sequential(*mlp()[:3], nn.Tanh(), nn.AlphaDropout(0.1), nn.Linear(12, 5)),
         "alone"),
        (Looped, "so train its variants one at a time"),
    ],
)  # fmt: skip
def test_models_that_cannot_step_together_are_refused(
    network: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        train(Points(network), SGD, VARIANTS)


class Held(nn.Module):
    """Keeps handles of weights in a list, and uses some of them by it alone."""

    def __init__(self, held: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 6), nn.Linear(6, 5)])
        self.held = {i: self.layers[i].weight for i in held}

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = torch.tanh(x) @ self.held.get(i, layer.weight).t() + layer.bias
        return x


class Averaged(nn.Module):
    """Its running mean is assigned anew in each step, not written in place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 5)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("mask", torch.tensor([-torch.inf, 0, torch.nan]))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        out: Tensor = self.layer(x - self.mean)
        return out


class Counting(nn.Module):
    """Its scale grows with its steps; the width that it notes stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 5)
        self.steps = self.width = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps, self.width = self.steps + 1, x.shape[-1]
        out: Tensor = self.layer(x.flatten(1)) * (1 + 0.01 * self.steps)
        return out


def normed() -> nn.Module:
    """Its layer keeps the weight that it computed, which is no leaf of autograd."""
    first: nn.Module = nn.utils.weight_norm(nn.Linear(16, 6))
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(6, 5))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("how", [SGD, ADAM])
def test_models_that_an_ensemble_would_train_otherwise_are_seen(how: Recipe) -> None:
    assert why_alone(Points(mlp), how, CPU) == ""
    assert why_alone(Points(convnet), how, CPU) == ""
    assert why_alone(Points(partial(Held, ())), how, CPU) == ""
    assert why_alone(Points(normed), how, CPU) == ""
    for held in ((0, 1), (0,), (1,)):
        assert "differs from a training alone" in why_alone(Points(partial(Held, held)), how, CPU)
    assert "counts in 'steps'" in why_alone(Points(Counting), how, CPU)
    assert "buffer 'mean' differs from a training alone" in why_alone(Points(Averaged), how, CPU)
    assert "cannot be trained as an ensemble" in why_alone(Points(Looped), how, CPU)


def test_bad_ensembles_are_refused() -> None:
    with pytest.raises(SpecError, match="at least one"):
        EnsembleTrainer(Points(mlp), SGD, [], device=CPU)
    with pytest.raises(SpecError, match="from 0 to 89"):
        variants = [Variant(0), Variant(1, Changes(removed=np.array([90])))]
        EnsembleTrainer(Points(mlp), SGD, variants, device=CPU)
