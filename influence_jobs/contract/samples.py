"""Checks of the training data and of a loss for every sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from influence_jobs.contract.trial import Said, Trial, fail, ok, warn
from influence_jobs.curvature.requirements import require_deterministic
from influence_jobs.gradients.batches import plain_leaves
from influence_jobs.gradients.one_loss_each import mixed_losses, wrong_losses
from influence_jobs.gradients.requirements import require_independent_samples
from influence_jobs.tasks.base import Draw, Task, digest
from influence_jobs.tasks.output_loss import RELATIVE_ERROR
from influence_jobs.tasks.rows import require_rows


def data(trial: Trial) -> Said:
    """Samples are counted, and fetched as a batch."""
    require_rows(trial.task)
    n = len(trial.task.train_data())
    tensors = [leaf for leaf in plain_leaves(trial.batch) if isinstance(leaf, Tensor)]
    shown = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    yield ok(f"{n:,} training samples; a batch of {len(trial.ids)} is {shown or 'no tensors'}")
    own = type(trial.task)
    if own.batch is Task.batch and own.collate is Task.collate:
        train_data: Any = trial.task.train_data()
        row = train_data[int(trial.ids[0])]
        parts = row.values() if isinstance(row, Mapping) else row
        if isinstance(row, Mapping | tuple | list) and any(map(_numbers, parts)):
            yield warn(
                "rows hold lists of numbers, and default_collate turns each position of a list "
                "into a tensor of its own: give tensors, or define collate(rows)"
            )


def _numbers(part: Any) -> bool:
    return isinstance(part, list | tuple) and all(isinstance(x, int | float) for x in part)


def repeatable(trial: Trial) -> Said:
    """The same samples are the same numbers each time they are fetched."""
    right = True
    for name, fetch in (("batch", trial.task.batch), ("train_batch", trial.task.train_batch)):
        if digest(fetch(trial.ids, Draw(0))) != digest(fetch(trial.ids, Draw(0))):
            right = False
            augment = ", and augment in train_batch()" if name == "batch" else ""
            yield fail(
                f"{name}() gives different numbers each time the same samples are fetched, so no "
                "result could be repeated: let its random numbers depend on (draw.seed, "
                f"draw.index, sample id) only{augment}"
            )
    if right:
        yield ok("samples are the same numbers when they are fetched twice")


def losses(trial: Trial) -> Said:
    """One finite number a sample, which depends on the parameters."""
    losses_B, size = trial.losses_B, len(trial.ids)
    if wrong := wrong_losses(losses_B, torch.Size([size])):
        yield fail(wrong)
    elif not losses_B.isfinite().all():
        bad = (~losses_B.isfinite()).nonzero().flatten()
        more = f", and of {len(bad) - 1} more of {size}" if len(bad) > 1 else ""
        yield fail(
            f"the loss of sample {int(trial.ids[int(bad[0])])} is "
            f"{float(losses_B.detach()[bad[0]])}{more}: correct the sample or leave it out"
        )
    elif not losses_B.requires_grad:
        yield fail(
            "losses() has no gradient: the outputs are detached, computed under torch.no_grad(), "
            "or all parameters are frozen"
        )
    else:
        low, high = map(float, losses_B.detach().aminmax())
        yield ok(f"{size} samples have {size} losses, {low:.3g} to {high:.3g} untrained")


def deterministic(trial: Trial) -> Said:
    """In eval mode two passes over the same samples give the same losses."""
    require_deterministic(trial.task, trial.model, trial.batch, trial.batch)
    yield ok("two passes in eval mode give the same losses")


@torch.no_grad()
def independent(trial: Trial) -> Said:
    """A sample's loss is the same alone as in a batch."""
    require_independent_samples(trial.model)
    together_B = trial.losses_B.detach()
    alone_B = torch.cat(
        [trial.task.losses(trial.model, trial.fetch(i)) for i in trial.ids.unsqueeze(1)]
    )
    scale = torch.maximum(together_B.abs().max(), alone_B.abs().max())
    if (together_B - alone_B).abs().max() <= RELATIVE_ERROR * scale:
        yield ok("a sample's loss is the same alone and in a batch")
        return
    yield fail(mixed_losses(alone_B, together_B, len(together_B)))
