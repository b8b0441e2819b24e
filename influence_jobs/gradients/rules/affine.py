"""Rules of normalisation layers: one scale and one shift per channel or feature."""

from abc import abstractmethod
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule

A = TypeVar("A", bound=nn.Module)


class AffineRule(LayerRule[A]):
    """The weight gradient is no larger than the input, so it is stored as a whole."""

    read_as = "(C, 1, 1, 1)"
    channel_axis = 1

    @abstractmethod
    def normalised(self, a: Tensor) -> Tensor:
        """The normalised input, before scale and shift."""

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        return self.sums(g * self.normalised(a))

    def bias_gradient(self, g: Tensor) -> Tensor:
        return self.sums(g)

    def sums(self, values: Tensor) -> Tensor:
        """Sum values of the output's shape over a sample's positions: (B, *weight shape)."""
        return values.sum(dim=tuple(range(2, values.ndim))) if values.ndim > 2 else values

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.weight.numel(), 1, 1, 1

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        return self.weight_gradient(a, g).flatten(1).abs()[..., None, None]

    def weight_dots(self, vectors: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return self.weight_gradient(a, g).flatten(1) @ vectors.flatten(1).t()

    def weight_squares(self, a: Tensor, g: Tensor) -> Tensor:
        return self.weight_gradient(a, g).flatten(1).square().sum(1)


class BatchNorm1dRule(AffineRule[nn.BatchNorm1d]):
    """In eval mode, with running statistics; the input may have positions."""

    layer = nn.BatchNorm1d

    def normalised(self, a: Tensor) -> Tensor:
        module = self.module
        return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


class BatchNorm2dRule(AffineRule[nn.BatchNorm2d]):
    """In eval mode, with running statistics."""

    layer = nn.BatchNorm2d

    def normalised(self, a: Tensor) -> Tensor:
        module = self.module
        return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


class GroupNormRule(AffineRule[nn.GroupNorm]):
    """Any number of groups and of position axes."""

    layer = nn.GroupNorm

    def normalised(self, a: Tensor) -> Tensor:
        return F.group_norm(a, self.module.num_groups, eps=self.module.eps)


class LayerNormRule(AffineRule[nn.LayerNorm]):
    """C counts the elements of the normalised axes, which may be several."""

    layer = nn.LayerNorm

    def channels_first(self, output: Tensor) -> Tensor:
        first = output.ndim - len(self.module.normalized_shape)
        return output.flatten(first).movedim(-1, 1)

    def normalised(self, a: Tensor) -> Tensor:
        return F.layer_norm(a, self.module.normalized_shape, eps=self.module.eps)

    def sums(self, values: Tensor) -> Tensor:
        first = values.ndim - len(self.module.normalized_shape)
        sums_BC = values.unsqueeze(1).flatten(1, first).flatten(2).sum(1)
        return sums_BC.reshape(len(values), *self.module.normalized_shape)

    def has_batch_axis(self, output: Tensor) -> bool:
        return output.ndim > len(self.module.normalized_shape)
