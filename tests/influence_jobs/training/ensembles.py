"""Tasks, recipes and variants for the tests of ensembles, and the check that they share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetGreyTask
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.recorded_norms import RecordedNorms
from influence_jobs.training.train import Trainer

CPU = torch.device("cpu")
N = 90


def recipe(optimizer: str, batch_size: int = 8, epochs: int = 3, **settings: Any) -> Recipe:
    return Recipe(epochs, batch_size, optimizer, **settings)  # type: ignore[arg-type]


SGD = recipe("sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
ADAM = recipe("adam", lr=3e-3, weight_decay=1e-2)
NESTEROV = recipe("sgd", lr=0.05, momentum=0.9, nesterov=True, schedule="linear", warmup=5)
ADAMW = recipe(
    "adamw", lr=1e-2, weight_decay=0.3, no_bias_decay=True, schedule="cosine", warmup=3, clip_norm=1
)
STEPPED = recipe(
    "sgd", lr=0.1, weight_decay=0.1, no_bias_decay=True, schedule="step", step_every=2,
    step_factor=0.3,
)  # fmt: skip
CLIPPED = recipe("sgd", lr=0.1, momentum=0.5, clip_norm=0.5)


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
    """A task that declares a cross-entropy but has another loss."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(
            self.outputs(model, batch), batch[1], reduction="none", label_smoothing=0.01
        )


class SmallFFDNetTask(FFDNetGreyTask):
    """A few small patches, in float64."""

    def __init__(self) -> None:
        super().__init__(patch_size=8, stride=40, limit=14)

    def model(self) -> nn.Module:
        return super().model().double()

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        batch = super().train_batch(ids, draw)
        return pytree.tree_map_only(Tensor, lambda t: t.double(), batch)


def mlp(dropout: float = 0.0) -> nn.Module:
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
ONE_ORDER = (  # same seed, nothing removed: the same samples in every step
    Variant(2),
    Variant(2, Changes(relabelled=np.arange(5, 45), labels=np.arange(40) % 5)),
    Variant(2, Changes(relabelled=np.arange(50), labels=np.full(50, 3))),
)
MASKED = (  # same seed and order, as REMOVALS but masked; one of another size too
    Variant(2, Changes(masked=np.arange(9))),
    Variant(2),
    Variant(2, Changes(masked=np.arange(30, 39))),
    Variant(3, Changes(masked=np.arange(9), removed=np.arange(5, 12))),
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


def check_against_trainer(
    task: Task,
    how: Recipe,
    variants: Sequence[Variant],
    layers: tuple[str, ...],
    reduction: Any,
) -> EnsembleTrainer:
    """Train an ensemble; losses, weights, norms and outputs must be what `Trainer` gives alone."""
    wanted = NormsWanted(layers, reduction, skip_epochs=1)
    trainer = EnsembleTrainer(task, how, variants, device=CPU, norms=wanted)
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
    return trainer
