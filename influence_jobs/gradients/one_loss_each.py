"""What is wrong with losses that are not one number for each sample, of that sample alone."""

import torch
from torch import Tensor

from influence_jobs.gradients.batches import KINDS

SAME = 0.01  # of the largest loss: no rounding, not even of bfloat16
CAUSES = (
    "usual causes are a mean, a softmax or a broadcast over the batch (dim 0), batch statistics, "
    f"random operations in the forward, and a batch other than {KINDS}"
)


def wrong_losses(losses: object, samples: torch.Size | None = None) -> str:
    """What is wrong with the type or shape of losses; nothing if they are one float a sample.

    Args:
        losses: What a task's `losses` gives.
        samples: The shape that they must have; None for one axis of any length.
    """
    shape = "" if samples is None else f", shape {tuple(samples)}"
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        return f"losses() gives {kind}, and a tensor of one float for each sample is needed{shape}"
    if losses.shape == samples if samples is not None else losses.ndim == 1:
        return ""
    cure = "take the sum or the mean over every axis but the first"
    if losses.numel() == 1 or (samples is not None and losses.ndim < len(samples)):
        cure = "leave the mean over the batch out (reduction='none')"
    elif losses.ndim == 1:
        cure = "give as many losses as there are samples"
    return (
        f"losses() has shape {tuple(losses.shape)}, and one number for each sample is needed"
        f"{shape}: {cure}"
    )


def mixed_losses(alone_B: Tensor, together_B: Tensor, size: int) -> str:
    """How the losses of samples differ that must be the same alone and in a batch.

    Args:
        alone_B: Of each sample as a batch of its own.
        together_B: Of the same samples in a batch.
        size: How many samples that batch has.
    """
    alone_B, together_B = alone_B.detach(), together_B.detach()
    if ((together_B * size - alone_B).abs().max() <= SAME * alone_B.abs().max()).item():
        return (
            f"losses() divides by the number of samples in the batch ({size}): leave the division "
            "out, since the loss of a sample must not depend on the others"
        )
    worst = int((together_B - alone_B).abs().argmax())
    return (
        f"a sample's loss is {float(alone_B[worst]) + 0.0:.4g} alone and "
        f"{float(together_B[worst]):.4g} in a batch of {size}: let it depend on that sample only; "
        f"{CAUSES}"
    )
