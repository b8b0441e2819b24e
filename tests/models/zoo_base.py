"""What the tasks of the zoo share: a few samples, and the losses that people use.

The tasks import nothing but torch, the makers of the models, and `Task`, as users' own do.
"""

from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task

TRAIN, TEST = 24, 4  # samples


def normal(rows, shape, seed):
    """Standard normal numbers (rows, *shape)."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


class Zoo(Task):
    """A task of which a subclass says `data(rows, seed)`."""

    def data(self, rows, seed):
        raise NotImplementedError

    @cache  # noqa: B019  (a task lives as long as its data)
    def train_data(self):
        return self.data(TRAIN, 0)

    @cache  # noqa: B019
    def test_data(self):
        return self.data(TEST, 1)

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]


class Classifier(Zoo):
    """Inputs of a shape, in one of three classes; cross-entropy."""

    output_loss = "cross-entropy"
    shape: ClassVar[tuple[int, ...]] = (3, 16, 16)
    dtype: ClassVar[torch.dtype] = torch.float32

    def data(self, rows, seed):
        x = normal(rows, self.shape, seed)
        thirds = x.flatten(1).tensor_split(3, 1)
        labels = torch.stack([third.mean(1) for third in thirds], 1).argmax(1)
        return TensorDataset(x.to(self.dtype), labels)

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


class Pictures(Classifier):
    """Images, which people can look at."""

    def describe(self, ids):
        return {"label": self.train_data().tensors[1].numpy()[ids]}

    def pictures(self, ids):
        return _picture(self.train_data().tensors[0][torch.from_numpy(ids)])

    def test_picture(self, test):
        return _picture(self.test_data().tensors[0][[test]])[0]


def _picture(x):
    grey = (x.mean(1) * 60 + 128).clamp(0, 255)
    return grey.numpy().astype(np.uint8)


class Tokens(Zoo):
    """Texts (rows, 8) of 13 words, to go on word by word; a sample's loss is its mean token's."""

    output_loss = "cross-entropy"
    words, length = 13, 6

    def data(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (rows, self.length + 1), generator=generator)
        return TensorDataset(steps.cumsum(1) % self.words)

    def outputs(self, model, batch):
        return model(input_ids=batch[0][:, :-1]).logits

    def targets(self, batch):
        return batch[0][:, 1:]

    def losses(self, model, batch):
        logits = self.outputs(model, batch)
        return F.cross_entropy(logits.mT, self.targets(batch), reduction="none").mean(1)
