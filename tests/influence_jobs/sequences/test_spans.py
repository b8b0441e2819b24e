"""Spans of tokens as queries, of tasks that define no measure()."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.errors import SpecError
from influence_jobs.jobs.queries import queries_table, require_queries, size_of
from influence_jobs.requests.options import QueriesOptions
from influence_jobs.requests.queries import queries_of
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.sequences import most_tokens

IGNORED = -100
WORDS, LENGTH = 6, 6
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
}


class Texts(Task):
    """Three texts: padded behind, in front, and with a gap and a beginning that do not count."""

    output_loss = "cross-entropy"
    quantities = ("loss", "output")

    def __init__(self, reduction: str = "mean", *, second: bool = False) -> None:
        self.reduction, self.second = reduction, second
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(3, LENGTH, 4, generator=generator)
        self.y = torch.randint(WORDS, (3, LENGTH), generator=generator)
        self.y[0, 4:], self.y[1, :2], self.y[2, [0, 3]] = IGNORED, IGNORED, IGNORED

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, WORDS).eval()

    def train_data(self) -> Tensor:
        return self.y

    test_data = train_data

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        return self.x[ids], self.y[ids]

    test_batch = batch

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits.mT if self.second else logits

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch[1]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        counted_BT = batch[1] != IGNORED
        losses_BT = F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none")
        if self.reduction == "mean over all":
            return losses_BT.mean(1)
        total_B = losses_BT.sum(1)
        return total_B if self.reduction == "sum" else total_B / counted_BT.sum(1)


def tokens_of(task: Texts, i: int) -> list[int]:
    return [t for t in range(LENGTH) if task.y[i, t] != IGNORED]


@pytest.mark.parametrize("second", [False, True], ids=["last", "second"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "mean over all"])
@pytest.mark.parametrize("span", [(0, 1), (1, 3), (0, 4)], ids=str)
def test_a_span_is_measured_alone(reduction: str, second: bool, span: tuple[int, int]) -> None:
    task = Texts(reduction, second=second)
    model, (start, stop) = task.model(), span
    batch = task.batch(torch.arange(3), Draw(0))
    region = (0, start, 1, stop - start)
    losses_B = task.measure(model, batch, "loss", region)
    outputs_B = task.measure(model, batch, "output", region)
    for i in range(3):
        places = tokens_of(task, i)[start:stop]
        logits = model(task.x[i, places])
        losses = F.cross_entropy(logits, task.y[i, places], reduction="none")
        expected = losses.sum() if reduction == "sum" else losses.mean()
        torch.testing.assert_close(losses_B[i], expected)
        own = torch.stack([row[k] for row, k in zip(logits, task.y[i, places], strict=True)])
        torch.testing.assert_close(outputs_B[i], own.mean())
    assert size_of(task, 0) == (1, 4)
    assert most_tokens(task, Draw(0)) == 4


def test_as_many_words_as_positions() -> None:
    """Shapes do not tell which axis has the classes: the losses do."""
    assert WORDS == LENGTH
    for second in (False, True):
        task = Texts(second=second)
        batch = task.batch(torch.tensor([1]), Draw(0))
        found = task.measure(task.model(), batch, "loss", (0, 0, 1, 4))
        torch.testing.assert_close(found, task.losses(task.model(), batch))


def asked(task: Task, **options: Any) -> tuple[Query, ...]:
    return queries_of(QueriesOptions.checked({"test": 1, **options}), task).items


def test_spans_are_asked_for_in_words_numbers_and_files(tmp_path: Path) -> None:
    task = Texts()
    first, second = Query(test=1, region=(0, 1, 1, 2)), Query(test=1, region=(0, 3, 1, 1))
    assert asked(task, tokens="1:3") == asked(task, tokens=(1, 3)) == (first,)
    assert asked(task, tokens=["1:3", "3:4"]) == asked(task, tokens=[(1, 3), (3, 4)])
    assert asked(task, tokens=["1:3", "3:4"]) == (first, second)
    file = tmp_path / "spans.txt"
    file.write_text("1 1:3\n1 3:4\n2\n")
    found = asked(task, test=(), test_set=str(file))
    assert found == (first, second, Query(test=2))
    table = queries_table(task, Queries(items=found))
    assert table.column("region").to_pylist() == ["1:3", "3:4", None]


class Measured(Texts):
    """With spans of its own making, as images one pixel high."""

    def test_size(self, test: int) -> tuple[int, int]:
        return 1, 9

    def measure(self, model, batch, quantity, region) -> Tensor:
        return self.losses(model, batch) * (region[1] if region else 1)


def test_a_measure_of_ones_own_is_asked_as_it_says() -> None:
    assert asked(Measured(), tokens="4:9") == (Query(test=1, region=(0, 4, 1, 5)),)


class Classes(Texts):
    """One class a sample."""

    def targets(self, batch: Batch) -> Tensor:
        return batch[1][:, 0]


class Values(Texts):
    output_loss = "mse"


class OtherLoss(Texts):
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().losses(model, batch) ** 2


def refusal(task: Task, **options: Any) -> str:
    with pytest.raises(SpecError) as found:
        task.measure(
            task.model(),
            task.test_batch(torch.tensor([1]), Draw(0)),
            "loss",
            asked(task, **options)[0].region,
        )
    return str(found.value)


def test_what_has_no_such_tokens_is_refused_with_the_cure(tmp_path: Path) -> None:
    assert "tokens 2:5 are outside test sample 1, which has 4 with a target" in refusal(
        Texts(), tokens="2:5"
    )
    assert "tokens 5:12 are outside test sample 1, which has 9" in refusal(
        Measured(), tokens="5:12"
    )
    for other in (Classes(), Values()):
        said = refusal(other, tokens="0:1")
        assert f"{type(other).__name__} has no tokens: leave --tokens out (tokens are" in said
        with pytest.raises(SpecError, match="has no tokens: leave --per-token out"):
            most_tokens(other, Draw(0))
    assert "--tokens 3:3: the span is empty" in refusal(Texts(), tokens="3:3")
    assert "--tokens 3: write A:B" in refusal(Texts(), tokens="3")
    assert "--tokens -1:2: write A:B" in refusal(Texts(), tokens="-1:2")
    assert "there is no test sample 7" in refusal(Texts(), test=7, tokens="0:1")
    assert "correct output_loss" in refusal(OtherLoss(), tokens="0:1")
    file = tmp_path / "spans.txt"
    file.write_text("1 1:3\n")
    assert "leave --point, --region and --tokens out" in refusal(
        Texts(), test=(), test_set=str(file), tokens="0:1"
    )
    with pytest.raises(SpecError, match="tokens 0:5 are outside a sample of 4 tokens"):
        task = Texts()
        batch = task.batch(torch.arange(3), Draw(0))
        task.measure(task.model(), batch, "loss", (0, 0, 1, 5))
    require_queries(Texts(), Queries(items=(Query(test=1, region=(0, 1, 1, 3)),)))


def test_no_target_counts() -> None:
    task = Texts()
    task.y[:] = IGNORED
    with pytest.raises(SpecError, match="no target of Texts counts: all are -100"):
        most_tokens(task, Draw(0))
    assert "tokens 0:1 are outside test sample 1, which has 0" in refusal(task, tokens="0:1")
