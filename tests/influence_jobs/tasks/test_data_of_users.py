"""What a user's dataset may give: served, or refused in one line that names the cure."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from influence_jobs import Draw, Task
from influence_jobs.curvature.ek_fac import EkFac
from influence_jobs.curvature.matrices import GaussNewton
from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import digest
from influence_jobs.tasks.rows import require_rows
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import EnsembleTrainer, Variant
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

N = 20
IDS = torch.arange(N)


class Points(Task):
    """Rows (x, class); others change one thing each."""

    output_loss = "cross-entropy"
    outputs_of_model = 3

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, self.outputs_of_model))

    def row(self, x: Tensor, y: int) -> Any:
        return x, y

    def train_data(self) -> Any:
        x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
        return [self.row(x[i], i % 3) for i in range(N)]

    def test_data(self) -> Any:
        return self.train_data()[:4]

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Any) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")


class Texts(Points):
    """Dicts with texts that go along."""

    def row(self, x: Tensor, y: int) -> Any:
        return {"x": x, "y": y, "text": f"a {y}", "meta": {"file": f"{y}.png", "tags": ("u", "v")}}

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])

    def targets(self, batch: Any) -> Tensor:
        return batch["y"]


class ReadTexts(Texts):
    """The loss looks at the texts."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        lengths = torch.tensor([len(text) for text in batch["text"]])
        return model(batch["x"]) + lengths[:, None]


class ReadByRow(Texts):
    """The same, row by row: with the texts of other samples it would go on without a word."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"]
        lengths = torch.tensor([len(batch["text"][i]) for i in range(len(x))])
        return model(x) + lengths[:, None]


class Padded(Points):
    """Texts of several lengths, put together by the task, with a word drawn anew each epoch."""

    def model(self) -> nn.Module:
        return nn.EmbeddingBag(9, 3, padding_idx=8)

    def row(self, x: Tensor, y: int) -> Any:
        return torch.arange(1 + y), y

    def collate(self, rows: list[Any]) -> Any:
        texts = pad_sequence([text for text, _ in rows], batch_first=True, padding_value=8)
        return texts, torch.tensor([label for _, label in rows])

    def train_batch(self, ids: Tensor, draw: Draw) -> Any:
        texts, labels = self.batch(ids, draw)
        return texts.where(texts != draw.index, 8), labels


class PaddedOnce(Padded):
    """The same without the drawn words: all samples could be put into one batch, once."""

    def train_batch(self, ids: Tensor, draw: Draw) -> Any:
        return self.batch(ids, draw)


def test_collate_puts_training_and_test_rows_together() -> None:
    task = Padded()
    texts, labels = task.batch(torch.tensor([0, 2]), Draw(0))
    assert texts.tolist() == [[0, 8, 8], [0, 1, 2]]
    assert labels.tolist() == [0, 2]
    assert task.test_batch(torch.tensor([1]), Draw(0))[0].tolist() == [[0, 1]]


class OfRow(Points):
    def __init__(self, row: Callable[[Tensor, int], Any]) -> None:
        self.row = row  # type: ignore[method-assign, assignment]


def image(x: Tensor, y: int) -> Any:
    return Image.fromarray(np.zeros((2, 2, 3), np.uint8)), y


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (image, "a row has a PIL image in it, which makes no batch: give the dataset a transform "),
        (lambda x, y: (x, None), "a row has a NoneType in it, which makes no batch: give tensors"),
        (lambda x, y: (x[: 1 + y], y), "rows are of several shapes (stack expects each tensor "),
        (lambda x, y: {"ids": [1] * (1 + y)}, "rows are of several shapes (each element in list "),
        (lambda x, y: {"x": x, str(y): y}, "not every row has '0': give all rows the same keys"),
    ],
)
def test_rows_that_make_no_batch(row: Callable[[Tensor, int], Any], line: str) -> None:
    with pytest.raises(DataError, match=re.escape(line)) as refused:
        OfRow(row).batch(IDS[:4], Draw(0))
    assert "or define collate(rows)" in str(refused.value)
    assert "\n" not in str(refused.value)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([1])


class LongStream(Stream):
    def __len__(self) -> int:
        return 1


class Frame:
    """As a pandas DataFrame: rows are not what its brackets give."""

    def keys(self) -> list[str]:
        return ["x"]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, name: str) -> list[int]:
        return {"x": [1, 2, 3]}[name]


class Of(Points):
    def __init__(self, train: Any, test: Any = ()) -> None:
        self.train, self.test = train, test

    def train_data(self) -> Any:
        return self.train

    def test_data(self) -> Any:
        return self.test


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (Stream(), "a Stream without a length and rows by position: a sample's position is its id"),
        (LongStream(), "a LongStream without a length and rows by position: "),
        ((i for i in range(3)), "a generator without a length and rows by position: "),
        ({1, 2}, "a set without rows by position: "),
        (Frame(), "a Frame, which gives parts by their names, not rows by their positions: "),
        (
            DataLoader(TensorDataset(IDS)),
            "a DataLoader, which gives batches in another order each time: ",
        ),
    ],
)
def test_data_without_rows(data: Any, line: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(f'train_data() is {line}')}"):
        require_rows(Of(data))
    with pytest.raises(DataError, match=f"^{re.escape(f'test_data() is {line}')}"):
        require_rows(Of([1], data))


def test_a_task_with_batches_of_its_own_needs_a_length_only() -> None:
    class Own(Of):
        def batch(self, ids: Tensor, draw: Draw) -> Any:
            return ids

    require_rows(Own({1, 2}))
    with pytest.raises(DataError, match=r"train_data\(\) is empty"):
        require_rows(Own(()))


class Opaque:
    pass


def test_a_batch_that_hides_its_tensors_has_no_digest() -> None:
    with pytest.raises(DataError, match="a batch has a Opaque in it: it must be a tuple, list"):
        digest([Opaque()])


def test_the_digest_of_a_long_array_sees_its_middle() -> None:
    values = np.arange(5000)
    other = values.copy()
    other[2500] = 0
    assert digest([values]) == digest([values.copy()]) != digest([other])


RECIPE = Recipe(epochs=2, batch_size=8, optimizer="sgd", lr=0.1)
CPU = torch.device("cpu")


def test_variants_with_texts_beside_are_trained_as_alone() -> None:
    ensemble = EnsembleTrainer(Texts(), RECIPE, [Variant(0), Variant(1)], device=CPU)
    while not ensemble.finished:
        ensemble.step()
    for seed in range(2):
        alone = Trainer(Texts(), RECIPE, seed=seed, device=CPU)
        while not alone.finished:
            alone.step()
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(ensemble.model(seed).state_dict()[name], value)


@pytest.mark.parametrize("task", [ReadTexts(), ReadByRow(), Padded(), PaddedOnce()])
def test_what_cannot_be_trained_side_by_side_is_refused(task: Task) -> None:
    with pytest.raises(ModelError, match=r"one at a time|several shapes"):
        EnsembleTrainer(task, RECIPE, [Variant(0), Variant(1)], device=CPU).step()


class Shared(Points):
    """A batch with something that all samples share."""

    def collate(self, rows: list[Any]) -> Any:
        x, y = super().collate(rows)
        return x, y, torch.linspace(0.5, 1.5, 3)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]) * batch[2]


def test_a_shared_tensor_is_not_taken_for_samples() -> None:
    ensemble = EnsembleTrainer(Shared(), RECIPE, [Variant(0), Variant(1)], device=CPU)
    alone = Trainer(Shared(), RECIPE, seed=1, device=CPU)
    for trainer in (ensemble, alone):
        while not trainer.finished:
            trainer.step()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(ensemble.model(1).state_dict()[name], value)


class OneHot(Points):
    def row(self, x: Tensor, y: int) -> Any:
        return x, self.scale * F.one_hot(torch.tensor(y), 3).float()

    scale = 1.0


class TwoHot(OneHot):
    scale = 2.0


class Column(Points):
    """A regression with outputs (B, 1) and targets (B,)."""

    output_loss = "mse"  # type: ignore[assignment]
    outputs_of_model = 1

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square()


class Flat(Column):
    """The same, with outputs (B,)."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]


def curvature(task: Task) -> tuple[GaussNewton, Tensor]:
    torch.manual_seed(0)
    model = task.model().eval()
    space = ParameterSpace(model)
    vectors_QP = torch.randn(2, space.size, generator=torch.Generator().manual_seed(1))
    return GaussNewton(model, space, task, IDS), vectors_QP


@pytest.mark.parametrize(("task", "twin"), [(OneHot(), Points()), (Column(), Flat())])
def test_targets_of_another_shape_mean_the_same(task: Task, twin: Task) -> None:
    (matrix, vectors_QP), (expected, _) = curvature(task), curvature(twin)
    torch.testing.assert_close(matrix @ vectors_QP, expected @ vectors_QP)
    found, wanted = (EkFac(0.1).solve(operator, vectors_QP).x_QP for operator in (matrix, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_weights_of_classes_that_are_no_probabilities_are_refused() -> None:
    matrix, vectors_QP = curvature(TwoHot())
    with pytest.raises(
        ModelError, match=r"targets\(\) are weights of the classes that do not sum to 1"
    ):
        matrix @ vectors_QP


@pytest.mark.parametrize("task", [OneHot(), TwoHot()])
def test_samples_without_one_class_are_not_relabelled(task: Task) -> None:
    changes = Changes(relabelled=np.array([0]), labels=np.array([1]))
    with pytest.raises(SpecError, match=r"the targets of a sample are \(1, 3\) float32, not one"):
        changes.check(task)
    changes.check(Points())
