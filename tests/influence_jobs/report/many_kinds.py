"""Tasks of texts, table rows and sounds, whose samples say hostile things."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from influence_jobs import Sound, Task, Text

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
WORDS = ("the", "cat", "likes", "milk", HOSTILE, "\u202eodd\ttab")
RATE = 4000


class Texts(Task):
    """Sentences; each word but the first is predicted from the one before."""

    output_loss = "cross-entropy"

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.rows = [
            torch.randint(len(WORDS), (int(n),), generator=drawn)
            for n in torch.randint(3, 7, (16,), generator=drawn)
        ]
        self.rows[3] = torch.tensor([0, 4, 5, 4])

    def model(self):
        return nn.Sequential(nn.Embedding(len(WORDS), 4), nn.Linear(4, len(WORDS)))

    def train_data(self):
        return self.rows

    def test_data(self):
        return self.rows[:4]

    def collate(self, rows):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def outputs(self, model, batch):
        return model(batch[:, :-1].clamp_min(0))

    def targets(self, batch):
        return batch[:, 1:]

    def losses(self, model, batch):
        return F.cross_entropy(
            self.outputs(model, batch).transpose(1, 2), self.targets(batch), reduction="none"
        ).sum(1)

    def show(self, sample):
        words = [WORDS[i] for i in self.rows[sample]]
        return Text([words[0], *(f" {word}" for word in words[1:])], range(1, len(words)))

    def show_test(self, test):
        return self.show(test)


class WrongTexts(Texts):
    """Which forgets that the first word is no token."""

    def show(self, sample):
        return [*super().show(sample).pieces]


class Rows(Task):
    """Table rows of two numbers and a town."""

    output_loss = "mse"
    towns = ("=HYPERLINK(1)", "Rome", HOSTILE)

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.rand(12, 2, generator=drawn)
        self.data = torch.utils.data.TensorDataset(self.x, self.x.sum(1, keepdim=True))

    def model(self):
        return nn.Linear(2, 1)

    def train_data(self):
        return self.data

    def test_data(self):
        return self.data

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().sum(1)

    def describe(self, ids):
        towns = np.array([self.towns[i % 3] for i in ids])
        return {"size": self.x[ids, 0].numpy(), "age": ids * -1, "town": towns}

    def describe_test(self, ids):
        return self.describe(ids)


class Sounds(Rows):
    """The same rows, heard."""

    def show(self, sample):
        seconds = 100 if sample == 5 else 0.5
        return Sound(np.sin(np.arange(int(seconds * RATE)) * (sample + 1) / 50), RATE)

    def show_test(self, test):
        return self.show(test)
