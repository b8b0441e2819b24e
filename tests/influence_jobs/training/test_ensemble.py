"""Every variant of an ensemble against `Trainer` training it alone, in float64."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetGreyTask
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_data import stretches
from influence_jobs.training.ensemble_mlp import MlpSteps
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.ensemble_stacked import StackedSteps
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.train import Recipe, Trainer

CPU = torch.device("cpu")
N = 90


def recipe(optimizer: str, batch_size: int = 8, epochs: int = 3, **settings: float) -> Recipe:
    return Recipe(epochs, batch_size, optimizer, **settings)  # type: ignore[arg-type]


SGD = recipe("sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
ADAM = recipe("adam", lr=3e-3, weight_decay=1e-2)


class Points(Task):
    """Random points of five classes, in float64, and any network."""

    output_loss = "cross-entropy"

    def __init__(self, network: Callable[[], nn.Module], *, noise: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(N, 1, 4, 4, generator=generator, dtype=torch.float64)
        self._y = torch.randint(5, (N,), generator=generator)
        self._network, self._noise = network, noise

    def model(self) -> nn.Module:
        return self._network().double()

    def train_data(self) -> Tensor:
        return self._y

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        x = self._x[ids]
        if self._noise:
            x = (
                x
                + self._noise * torch.sin(ids + 10.0 * draw.seed + draw.index)[:, None, None, None]
            )
        return x, self._y[ids]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits

    def targets(self, batch: Batch) -> Tensor:
        labels: Tensor = batch[1]
        return labels

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")


class SmoothedPoints(Points):
    """Claims a cross-entropy it does not have."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(
            self.outputs(model, batch), batch[1], reduction="none", label_smoothing=0.01
        )


class SmallFFDNetTask(FFDNetGreyTask):
    """Few small patches, in float64."""

    def __init__(self) -> None:
        super().__init__(patch_size=8, stride=40, limit=14)

    def model(self) -> nn.Module:
        return super().model().double()

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        batch = super().train_batch(ids, draw)
        return pytree.tree_map_only(Tensor, lambda t: t.double(), batch)


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(12, 7), nn.ReLU(), nn.Dropout(2 * dropout), nn.Linear(7, 5), nn.LogSoftmax(1),
    )  # fmt: skip


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)
    )


def frozen() -> nn.Module:
    network = mlp()
    network[1].requires_grad_(False)
    return network


VARIANTS = (
    Variant(0, Changes(removed=np.arange(40, 63))),
    Variant(1),
    Variant(2, Changes(relabelled=np.arange(5, 45), labels=np.arange(40) % 5)),
    Variant(3, Changes(np.arange(11), relabelled=np.arange(8, 30), labels=np.full(22, 3))),
    Variant(1, Changes(removed=np.arange(85))),
    Variant(4),
)
ONE_ORDER = (  # of one seed and nothing removed: they meet the same samples in every step
    Variant(2),
    Variant(2, Changes(relabelled=np.arange(5, 45), labels=np.arange(40) % 5)),
    Variant(2, Changes(relabelled=np.arange(50), labels=np.full(50, 3))),
)
REMOVALS = (
    Variant(5, Changes(removed=np.arange(5))),
    Variant(6),
    Variant(7),
    Variant(8, Changes(removed=np.arange(1, 12))),
)


def train(task: Task, how: Recipe, variants: Sequence[Variant], **options: Any) -> EnsembleTrainer:
    trainer = EnsembleTrainer(task, how, variants, device=CPU, **options)
    while not trainer.finished:
        trainer.step()
    return trainer


@pytest.mark.parametrize(
    ("task", "how", "variants", "path", "layers"),
    [
        (Points(mlp), SGD, VARIANTS, MlpSteps, ("1", "4", "7")),
        (Points(mlp), recipe("sgd", lr=0.1), VARIANTS, MlpSteps, ("1", "7")),
        (Points(mlp), recipe("sgd", 40, lr=0.1, momentum=0.5), VARIANTS, MlpSteps, ("4",)),
        (Points(mlp), recipe("sgd", 200, lr=0.1), VARIANTS, MlpSteps, ("1",)),
        (Points(mlp), SGD, ONE_ORDER, MlpSteps, ("1", "7")),
        (Points(lambda: mlp(0.2)), SGD, VARIANTS, MlpSteps, ("1", "4", "7")),
        (Points(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5))), SGD, VARIANTS, MlpSteps, ("1",)),
        (Points(mlp), recipe("sgd", lr=0.5, momentum=0.9, weight_decay=0.1), VARIANTS, StackedSteps, ("1",)),
        (Points(mlp), ADAM, VARIANTS, StackedSteps, ("1", "4", "7")),
        (Points(mlp, noise=0.3), SGD, VARIANTS, StackedSteps, ("1", "4")),
        (Points(frozen), SGD, VARIANTS, StackedSteps, ("4",)),
        (SmoothedPoints(mlp), SGD, REMOVALS, StackedSteps, ("1",)),
        (Points(convnet), SGD, VARIANTS[:4], StackedSteps, ("0", "4")),
        (Points(convnet), ADAM, VARIANTS[:4], StackedSteps, ("0", "4")),
        (SmallFFDNetTask(), recipe("adam", 4, 2, lr=1e-3), REMOVALS, StackedSteps, ("main.29",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reduction", ["kernel", "channel", "layer"])
def test_each_variant_is_what_it_is_alone(
    task: Task,
    how: Recipe,
    variants: Sequence[Variant],
    path: type,
    layers: tuple[str, ...],
    reduction: Any,
) -> None:
    if isinstance(task, SmallFFDNetTask) and reduction != "channel":
        pytest.skip("slow, and the convnet has them")
    wanted = NormsWanted(layers, reduction, skip_epochs=1)
    trainer = EnsembleTrainer(task, how, variants, device=CPU, norms=wanted)
    assert isinstance(trainer.steps, path)
    losses = []
    while not trainer.finished:
        losses.append(trainer.step())
    losses_EM = torch.stack([at_end for at_end in losses if at_end is not None])
    n = len(task.train_data())
    assert trainer.samples_seen == how.epochs * sum(n - len(v.changes.removed) for v in variants)
    for i, variant in enumerate(variants):
        norms = RecordedNorms(task.model(), layers, n, reduction=reduction, skip_epochs=1)
        alone = Trainer(
            task, how, seed=variant.seed, device=CPU, norms=norms, changes=variant.changes
        )
        expected_losses = []
        while not alone.finished:
            if (loss := alone.step()) is not None:
                expected_losses.append(loss)
        state = trainer.model(i).state_dict()
        for name, expected in alone.model.state_dict().items():
            torch.testing.assert_close(
                state[name], expected, rtol=1e-7, atol=1e-9, msg=f"{i} {name}"
            )
        for layer, sums in norms.sums.items():  # float32
            torch.testing.assert_close(trainer.norms(i)[layer], sums, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses_EM[:, i], torch.tensor(expected_losses).double())
        batch = task.batch(torch.arange(6), Draw(0))
        if not isinstance(task, FFDNetGreyTask):
            outputs_MBC = trainer.evaluate(task.outputs, batch)
            torch.testing.assert_close(
                outputs_MBC[i], task.outputs(alone.model.eval(), batch).detach()
            )


def test_the_mnist_network_in_float32(mnist_dir: Path) -> None:
    task = MnistTask(data_dir=str(mnist_dir), limit=500)
    how = recipe("sgd", lr=0.003, momentum=0.9, weight_decay=0.001, epochs=2)
    changes = Changes(np.arange(100), np.arange(200, 300), np.zeros(100, np.int64))
    trainer = train(task, how, [Variant(0), Variant(1, changes)])
    assert isinstance(trainer.steps, MlpSteps)
    for i, (seed, change) in enumerate([(0, Changes()), (1, changes)]):
        alone = Trainer(task, how, seed=seed, device=CPU, changes=change)
        while not alone.finished:
            alone.step()
        state = trainer.model(i).state_dict()
        for name, expected in alone.model.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", [mlp, convnet])
def test_training_resumed_from_its_state_gives_the_same_bits(
    network: Callable[[], nn.Module],
) -> None:
    options = {"norms": NormsWanted(("1",) if network is mlp else ("0",), "channel", 0)}
    variants = VARIANTS[:4]
    whole = train(Points(network), SGD, variants, **options)
    first = EnsembleTrainer(Points(network), SGD, variants, device=CPU, **options)
    for _ in range(5):
        first.step()
    states = []
    while not first.finished:
        states.append(pytree.tree_map_only(Tensor, torch.clone, first.state_dict()))
        first.step()
    for state in (states[0], states[len(states) // 2], states[-1]):
        torch.manual_seed(1234)  # another process has another global state
        second = EnsembleTrainer(Points(network), SGD, variants, device=CPU, **options)
        second.load_state_dict(state)
        while not second.finished:
            second.step()
        for i in range(4):
            resumed = second.model(i).state_dict()
            for name, expected in whole.model(i).state_dict().items():
                assert torch.equal(resumed[name], expected), name
            for layer, sums in whole.norms(i).items():
                assert torch.equal(second.norms(i)[layer], sums)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    train(Points(lambda: mlp(0.3)), SGD, VARIANTS)
    assert torch.equal(before, torch.get_rng_state())


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
    """One that looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out if float(out.sum()) > 1e9 else 2 * out


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.1), *mlp()), "dropout '0'"),
        (lambda: nn.Sequential(*mlp()[:3], nn.Tanh(), nn.AlphaDropout(0.1), nn.Linear(12, 5)), "alone"),
        (Looped, "one at a time it can"),
    ],
)  # fmt: skip
def test_models_that_cannot_step_together_are_refused(
    network: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        train(Points(network), SGD, VARIANTS)


def test_bad_ensembles_are_refused() -> None:
    with pytest.raises(SpecError, match="at least one"):
        EnsembleTrainer(Points(mlp), SGD, [], device=CPU)
    with pytest.raises(SpecError, match="from 0 to 89"):
        variants = [Variant(0), Variant(1, Changes(removed=np.array([90])))]
        EnsembleTrainer(Points(mlp), SGD, variants, device=CPU)
