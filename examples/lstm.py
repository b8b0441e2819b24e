"""An LSTM, or a GRU, that reads sequences of several lengths: docs/examples/lstm.md."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Doc

from influence_jobs import Batch, Task

LETTERS = "-abcd"  # "-" is padding


class Reader(nn.Module):
    """Letters (B, T) to logits (B, 2), from the state after the last letter of each."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), 8)
        self.rnn = getattr(nn, cell.upper())(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(letters))
        last = states[torch.arange(len(lengths)), lengths - 1]  # not a packed sequence
        return self.head(last)


def words(count: int, seed: int) -> list[tuple[str, int]]:
    """Words of 3 to 8 letters, and whether an "a" comes before the first "b"."""
    drawn = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        word = "".join(drawn.choice([*LETTERS[1:]], size=drawn.integers(3, 9)))
        found.append((word, int(0 <= word.find("a") < (word + "b").find("b"))))
    return found


class Lstm(Task):
    """Does an "a" come before the first "b"?"""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        cell: Annotated[Literal["lstm", "gru"], Doc("The recurrent layer.")] = "lstm",
        samples: Annotated[int, Doc("Words to train on.")] = 400,
        hidden: Annotated[int, Doc("Size of the state.")] = 16,
    ) -> None:
        self.cell, self.hidden = cell, hidden
        self.train_set, self.test_set = words(samples, 0), words(50, 1)

    def model(self) -> nn.Module:
        return Reader(self.cell, self.hidden)

    def train_data(self) -> list[tuple[str, int]]:
        return self.train_set

    def test_data(self) -> list[tuple[str, int]]:
        return self.test_set

    def collate(self, rows: list[tuple[str, int]]) -> Batch:
        read = [torch.tensor([LETTERS.index(letter) for letter in word]) for word, _ in rows]
        return {
            "letters": pad_sequence(read, batch_first=True),
            "lengths": torch.tensor([len(letters) for letters in read]),
            "labels": torch.tensor([label for _, label in rows]),
        }

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["letters"], batch["lengths"])

    def targets(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        batch = self.collate(self.test_set)
        right = self.outputs(model, batch).argmax(1) == batch["labels"]
        return {"accuracy": float(right.float().mean())}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.train_set[i] for i in ids])

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _columns([self.test_set[i] for i in ids])


def _columns(rows: list[tuple[str, int]]) -> dict[str, npt.NDArray[Any]]:
    read, labels = zip(*rows, strict=True)
    return {"label": np.array(labels), "word": np.array(read)}
