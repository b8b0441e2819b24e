"""What the checks look at, and what they say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.tasks.base import Batch, Draw, Task, some_ids, spread_ids
from influence_jobs.tasks.placement import converted, to_device
from influence_jobs.terms import ScorePrecision, html_table
from influence_jobs.training.train import seeded

Mark = Literal["ok", "warn", "fail"]
Line = tuple[Mark, str]
Said = Iterator[Line]  # what one check yields
FIRST, SPREAD = 8, 8  # samples looked at: the first ones, and others over the whole set


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        mark: fail: results would be wrong, or none; warn: is this what you mean?
        check: What was looked at, in a word or two.
        said: What is so and, unless it is right, the cure.
    """

    mark: Mark
    check: str
    said: str

    def __str__(self) -> str:
        return f"{self.mark:<4}  {self.check}: {self.said}"


class Findings(list[Finding]):
    """What was found, a line each."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return html_table([(found.mark, found.check, found.said) for found in self])


def ok(said: str) -> Line:
    """What is as it should be, or left out by choice."""
    return "ok", said


def warn(said: str) -> Line:
    """What may not be what the user means."""
    return "warn", said


def fail(said: str) -> Line:
    """What makes results wrong or impossible."""
    return "fail", said


class Trial:
    """A task with its model in eval mode, untrained, and a few training samples.

    Args:
        task: The task, with its data.
        device: Where to compute.
    """

    def __init__(self, task: Task, device: torch.device):
        self.task, self.device = task, device

    @cached_property
    def ids(self) -> Tensor:
        """Ids of the samples looked at, (B,)."""
        n = len(self.task.train_data())
        spread = spread_ids(n, SPREAD).tolist()
        return torch.tensor(sorted({*range(min(n, FIRST)), *spread}))

    @cached_property
    def few(self) -> Tensor:
        """Ids of some of them, in no order, to be compared with plain autograd one by one."""
        return self.ids[some_ids(len(self.ids), SPREAD)]

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the initial weights of seed 0, in the dtype of computations."""
        return self._built[0]

    @cached_property
    def _built(self) -> tuple[nn.Module, Callable[[Batch], Batch]]:
        with seeded(0, self.device):
            return converted(self.task, self.device)

    @property
    def precision(self) -> ScorePrecision:
        """That dtype."""
        double = next(self.model.parameters()).dtype == torch.float64
        return "float64" if double else "float32"

    def given(self, batch: Batch) -> Batch:
        """A batch on the device, in the dtype of computations."""
        return self._built[1](to_device(batch, self.device))

    def fetch(self, ids: Tensor) -> Batch:
        """Training samples as attribution sees them, on the device."""
        return self.given(self.task.batch(ids, Draw(0)))

    @cached_property
    def batch(self) -> Batch:
        """The samples looked at."""
        return self.fetch(self.ids)

    @cached_property
    def losses_B(self) -> Tensor:
        """Their losses, with a graph."""
        with differentiable_kernels(self.model):
            return self.task.losses(self.model, self.batch)

    @cached_property
    def full_batch(self) -> Batch:
        """As many samples as pass together in attribution: what times are measured with."""
        return self.fetch(torch.arange(min(self.task.batch_size, len(self.task.train_data()))))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen, by name, a tied one once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
