"""Sequences: the tokens of a sample, spans of them, and what each brings to its sample's loss.

The task names the cross-entropy as its `output_loss`, and its targets are classes (B, T), of which
-100 does not count. A sample's tokens are its positions with a target that counts, in their order
and numbered from 0. So neither padding, on either side, nor a masked beginning moves a number.

Letters: B batch, T positions.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import SpecError
from influence_jobs.tasks.output_loss import (
    IGNORED,
    Form,
    forms_of,
    forms_that_give,
    which_forms_give,
)

if TYPE_CHECKING:  # which measures by this
    from influence_jobs.tasks.base import Batch, Draw, Task

CURE = (
    'tokens are positions of targets(), classes (B, T), where output_loss = "cross-entropy" is of '
    "outputs() of as many positions"
)


def counted_tokens(task: "Task", targets: Any) -> Tensor | None:
    """Which positions have a target that counts, (B, T); None if targets are no sequences."""
    if task.output_loss != "cross-entropy" or not isinstance(targets, Tensor):
        return None
    return targets != IGNORED if targets.ndim == 2 and not targets.is_floating_point() else None


def tokens_in(task: "Task", batch: "Batch") -> Tensor | None:
    """The number of tokens of each sample, (B,); None if they are no sequences."""
    try:
        counted_BT = counted_tokens(task, task.targets(batch))
    except NotImplementedError:
        return None
    return None if counted_BT is None else counted_BT.sum(1)


def most_tokens(task: "Task", draw: "Draw") -> int:
    """The most tokens that a training sample has; all are read once.

    Raises:
        SpecError: They are no sequences, or none has a token.
    """
    most, ids = 0, torch.arange(len(task.train_data()))
    for piece in torch.split(ids, task.batch_size):
        counts_B = tokens_in(task, task.batch(piece, draw))
        if counts_B is None:
            raise SpecError(f"{type(task).__name__} has no tokens: leave --per-token out ({CURE})")
        most = max(most, int(counts_B.max()))
    if most == 0:
        raise SpecError(f"no target of {type(task).__name__} counts: all are {IGNORED}")
    return most


def order_of(counted_BT: Tensor) -> Tensor:
    """By sample the positions of its tokens, and then all others, (B, T)."""
    return (~counted_BT).byte().sort(dim=1, stable=True).indices


def span_of(
    outputs: Tensor, targets_BT: Tensor, classes: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the tokens start..stop of each sample.

    Args:
        classes: The axis of the outputs with the classes.

    Raises:
        SpecError: A sample has fewer tokens, or the outputs are not of these positions.
    """
    counted_BT = targets_BT != IGNORED
    if (fewest := int(counted_BT.sum(1).min())) < stop:
        raise SpecError(f"tokens {start}:{stop} are outside a sample of {fewest} tokens")
    logits = outputs.movedim(classes, -1)
    if logits.shape[:-1] != targets_BT.shape:
        raise SpecError(
            f"outputs are {tuple(outputs.shape)} and targets {tuple(targets_BT.shape)}: {CURE}"
        )
    places = order_of(counted_BT)[:, start:stop]
    chosen = logits.gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2]))
    return chosen.movedim(-1, classes), targets_BT.gather(1, places)


class TokenLosses:
    """What each token brings to its sample's loss, (B, T): the parts add up to the losses.

    Where a loss is the mean over the tokens, a token's part is its own loss by their number. Behind
    a sample's tokens are zeros.
    """

    def __init__(self, task: "Task") -> None:
        self._task = task
        self._forms: list[Form] = []  # the one in use first; the others gave the losses seen so far

    @torch.no_grad()
    def look(self, model: nn.Module, batch: "Batch") -> Tensor:
        """See how losses are made of tokens, as a call needs it; the numbers of tokens (B,).

        Raises:
            SpecError: The losses are not those of tokens that the task declares.
        """
        task = self._task
        outputs, targets = task.outputs(model, batch), task.targets(batch)
        forms = [form for form in forms_of(task) if form.parts is not None]
        losses_B = task.losses(model, batch)
        counted = counted_tokens(task, targets)
        sound_B = losses_B.isfinite()
        if not sound_B.all() and sound_B.any():  # the others are named with their shard
            losses_B, outputs, targets = (t[sound_B] for t in (losses_B, outputs, targets))
        self._forms = [*forms_that_give(losses_B, outputs, targets, forms)]
        if not self._forms or counted is None:
            raise self._without_parts()
        return counted.sum(1)

    @torch.no_grad()
    def unwatched(self, model: nn.Module, batch: "Batch") -> tuple[Tensor, Tensor]:
        """The numbers of tokens (B,), and a scalar: whether losses are made of them as seen before.

        A program that looks at these waits for a GPU. If the losses are not, `turn` to another way.

        Raises:
            SpecError: These samples are no sequences.
        """
        task = self._task
        outputs, targets = task.outputs(model, batch), task.targets(batch)
        counted = counted_tokens(task, targets)
        if counted is None:
            raise self._without_parts()
        right_1 = which_forms_give(task.losses(model, batch), outputs, targets, self._forms[:1])
        return counted.sum(1), right_1[0]

    def turn(self) -> None:
        """Take another of the ways that gave the losses that `look` saw.

        Raises:
            SpecError: There is none.
        """
        del self._forms[0]
        if not self._forms:
            raise self._without_parts()

    def _without_parts(self) -> SpecError:
        return SpecError(
            f"losses of {type(self._task).__name__} are not the sum or the mean over tokens, so "
            f"they have no parts: leave --per-token out ({CURE})"
        )

    def __call__(self, model: nn.Module, batch: "Batch") -> Tensor:
        parts = self._forms[0].parts
        assert parts is not None
        targets_BT = self._task.targets(batch)
        parts_BT = parts(self._task.outputs(model, batch), targets_BT)
        return parts_BT.gather(1, order_of(targets_BT != IGNORED))
