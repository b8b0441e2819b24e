"""Training with samples removed or relabelled, compared with a loop written out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import SpecError
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetGreyTask
from influence_jobs.training.changes import Changes, require_classes
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer, epoch_order

from .ensembles import Points, SmoothedPoints, mlp

RECIPE = Recipe(epochs=2, batch_size=64, optimizer="sgd", lr=0.05, momentum=0.9)
CPU = torch.device("cpu")


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_removed_samples_are_left_out_and_relabelled_ones_have_new_labels(
    digits_task: Task,
) -> None:
    removed = np.arange(100, 237)
    changes = Changes(removed, relabelled=np.arange(300, 500), labels=np.arange(200) % 10)
    trainer = Trainer(digits_task, RECIPE, seed=3, device=CPU, changes=changes)
    losses = []
    while not trainer.finished:
        losses.append(trainer.step())
    assert trainer.samples_seen == 2 * (1500 - 137)

    torch.manual_seed(3)
    model = digits_task.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = digits_task.batch(torch.arange(1500), Draw(0))
    labels[300:500] = torch.arange(200) % 10
    for epoch in range(2):
        total = 0.0
        order = [i for i in epoch_order(1500, 3, epoch).tolist() if not 100 <= i < 237]
        for chunk in torch.tensor(order).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chunk]), labels[chunk])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(chunk)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], expected, rtol=1e-4, atol=1e-5)
    assert losses[-1] == pytest.approx(total / 1363, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Changes(removed=ids(0, 1500)), "from 0 to 1499"),
        (Changes(removed=ids(-1)), "from 0 to 1499"),
        (Changes(removed=ids(3, 3)), "removed twice"),
        (Changes(removed=np.arange(1500)), "all 1500"),
        (Changes(relabelled=ids(1500), labels=ids(0)), "from 0 to 1499"),
        (Changes(relabelled=ids(1, 2), labels=ids(0)), "2 ids are relabelled with 1 labels"),
        (Changes(relabelled=ids(1), labels=ids(-1)), "from 0 to 9"),
        (Changes(relabelled=ids(1), labels=ids(10)), "from 0 to 9"),
    ],
)
def test_changes_that_cannot_be_are_refused(
    digits_task: Task, changes: Changes, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Trainer(digits_task, RECIPE, seed=0, device=CPU, changes=changes)


def test_a_regression_has_nothing_to_relabel() -> None:
    task = FFDNetGreyTask(patch_size=16, stride=16, limit=4)
    with pytest.raises(SpecError, match="no classes"):
        Changes(relabelled=ids(1), labels=ids(0)).check(task)
    Changes(removed=ids(1)).check(task)


def headless() -> nn.Module:
    """A last layer of zeros, from which cross-entropies are alike, smoothed or not."""
    network = mlp()
    nn.init.zeros_(network[7].weight)
    nn.init.zeros_(network[7].bias)
    return network


@pytest.mark.parametrize("network", [mlp, headless])
def test_relabelled_samples_are_trained_with_the_loss_of_the_others(network: Any) -> None:
    task = SmoothedPoints(network)
    changes = Changes(
        relabelled=ids(1), labels=task.targets(task.batch(torch.tensor([1]), Draw(0))).numpy()
    )
    with pytest.raises(SpecError, match="not the plain cross-entropy"):
        Trainer(task, RECIPE, seed=0, device=CPU, changes=changes)
    require_classes(task, by_task=True)  # whose train() is given the labels
    require_classes(Points(network), by_task=False)


def test_a_model_in_half_precision_whose_losses_are_not_can_be_relabelled() -> None:
    class Half(Points):
        def model(self) -> nn.Module:
            return mlp().bfloat16()

        def batch(self, ids: Tensor, draw: Draw) -> Any:
            x, y = super().batch(ids, draw)
            return x.bfloat16(), y

        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(self.outputs(model, batch).float(), batch[1], reduction="none")

    require_classes(Half(mlp), by_task=False)


def test_classes_that_only_the_tasks_own_loss_knows_are_not_relabelled() -> None:
    class Unlabelled(Points):
        def targets(self, batch: Any) -> Tensor:
            labels: Tensor = batch[1]
            return labels.where(labels != self._y[0], -1)

        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(
                self.outputs(model, batch), self.targets(batch), ignore_index=-1, reduction="none"
            )

    with pytest.raises(SpecError, match="not the plain cross-entropy"):
        require_classes(Unlabelled(mlp), by_task=False)


def test_masked_samples_stay_in_their_batches_with_a_loss_of_weight_zero() -> None:
    """Their bytes cannot matter, and the mean over the batch keeps its divisor."""
    task, masked = Points(lambda: mlp(0.2)), ids(3, 40, 41)
    trainer = Trainer(task, RECIPE, seed=3, device=CPU, changes=Changes(masked=masked))

    class Zeroed(Points):
        def losses(self, model: nn.Module, batch: Any) -> Tensor:
            weights_N = torch.ones(len(self._y), dtype=torch.float64)
            weights_N[torch.from_numpy(masked)] = 0
            return super().losses(model, batch[:2]) * weights_N[batch[2]]

        def batch(self, ids: Tensor, draw: Draw) -> Any:
            return *super().batch(ids, draw), ids

    alone = Trainer(Zeroed(lambda: mlp(0.2)), RECIPE, seed=3, device=CPU)
    assert trainer.steps_per_epoch == alone.steps_per_epoch
    while not alone.finished:
        assert trainer.step() == alone.step()
    for name, expected in alone.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], expected)


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        (ids(90), "masked ids must be from 0 to 89"),
        (ids(3, 3), "masked twice"),
        (np.arange(90), "all 90 samples are masked"),
    ],
)
def test_masks_that_cannot_be_are_refused(masked: np.ndarray, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Changes(masked=masked).check(Points(mlp))


def test_a_training_of_the_tasks_own_takes_no_masks() -> None:
    with pytest.raises(SpecError, match=r"train\(\) of Points cannot mask samples"):
        Changes(masked=ids(1)).check(Points(mlp), by_task=True)
