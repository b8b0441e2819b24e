"""What is kept of a sample's weight gradient: the three reductions to norms."""

import torch
from torch import Tensor

from influence_jobs.terms import Reduction


def reduce_read(gradient: Tensor, reduction: Reduction) -> Tensor:
    """Norms of gradients (B, C, I, *kernel). This defines the reductions.

    `kernel`: L2 over the input axis, (B, C, *kernel). `channel`: the kernel norms summed over the
    kernel, (B, C), as in section 3.2.3 of the research report. `layer`: L2 of the whole gradient,
    (B,).
    """
    if reduction == "layer":
        return gradient.square().sum(dim=tuple(range(1, gradient.ndim))).sqrt()
    norms = gradient.square().sum(dim=2).sqrt()
    return norms if reduction == "kernel" else _sum_over_kernel(norms)


def reduce_norms(norms: Tensor, reduction: Reduction) -> Tensor:
    """Reduce kernel norms (B, C, *kernel) to the norms that `reduce_read` defines."""
    if reduction == "kernel":
        return norms
    if reduction == "channel":
        return _sum_over_kernel(norms)
    whole: Tensor = torch.linalg.vector_norm(norms, dim=tuple(range(1, norms.ndim)))
    return whole


def reduced_shape(read: tuple[int, ...], reduction: Reduction) -> tuple[int, ...]:
    """Shape of the norms of a weight that is read as (C, I, *kernel)."""
    channels, _, *kernel = read
    if reduction == "kernel":
        return channels, *kernel
    return (channels,) if reduction == "channel" else ()


def _sum_over_kernel(norms: Tensor) -> Tensor:
    kernel = tuple(range(2, norms.ndim))
    return norms.sum(dim=kernel) if kernel else norms  # an empty `dim` would sum over all axes
