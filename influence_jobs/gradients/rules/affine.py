"""Rules of layers with one weight per channel or feature: normalisation layers, PReLU."""

from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule

A = TypeVar("A", bound=nn.Module)
I = TypeVar("I", nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
L = TypeVar("L", nn.LayerNorm, nn.RMSNorm)


class AffineRule(LayerRule[A]):
    """The weight gradient is no larger than the input, so it is stored as a whole."""

    read_as = "(C, 1, 1, 1)"
    channel_axis: ClassVar[int | None] = 1

    @abstractmethod
    def normalised(self, a: Tensor) -> Tensor:
        """What the weight is multiplied by: the normalised input."""

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


class BatchNorm3dRule(AffineRule[nn.BatchNorm3d]):
    """In eval mode, with running statistics."""

    layer = nn.BatchNorm3d

    def normalised(self, a: Tensor) -> Tensor:
        module = self.module
        return F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


class InstanceNormRule(AffineRule[I]):
    """Normalised by the sample's own statistics, or by running ones if the layer tracks them."""

    positions: ClassVar[int]

    def has_batch_axis(self, output: Tensor) -> bool:
        return output.ndim == 2 + self.positions

    def normalised(self, a: Tensor) -> Tensor:
        module = self.module
        own = not module.track_running_stats
        mean, variance = module.running_mean, module.running_var
        return F.instance_norm(a, mean, variance, use_input_stats=own, eps=module.eps)


class InstanceNorm1dRule(InstanceNormRule[nn.InstanceNorm1d]):
    """With affine=True; by each sample's own statistics or by running ones."""

    layer = nn.InstanceNorm1d
    positions = 1


class InstanceNorm2dRule(InstanceNormRule[nn.InstanceNorm2d]):
    """With affine=True; by each sample's own statistics or by running ones."""

    layer = nn.InstanceNorm2d
    positions = 2


class InstanceNorm3dRule(InstanceNormRule[nn.InstanceNorm3d]):
    """With affine=True; by each sample's own statistics or by running ones."""

    layer = nn.InstanceNorm3d
    positions = 3


class GroupNormRule(AffineRule[nn.GroupNorm]):
    """Any number of groups and of position axes."""

    layer = nn.GroupNorm

    def normalised(self, a: Tensor) -> Tensor:
        return F.group_norm(a, self.module.num_groups, eps=self.module.eps)


class LastAxesRule(AffineRule[L]):
    """C counts the elements of the normalised axes, the last ones."""

    def channels_first(self, output: Tensor) -> Tensor:
        first = output.ndim - len(self.module.normalized_shape)
        return output.flatten(first).movedim(-1, 1)

    def sums(self, values: Tensor) -> Tensor:
        first = values.ndim - len(self.module.normalized_shape)
        sums_BC = values.unsqueeze(1).flatten(1, first).flatten(2).sum(1)
        return sums_BC.reshape(len(values), *self.module.normalized_shape)

    def has_batch_axis(self, output: Tensor) -> bool:
        return output.ndim > len(self.module.normalized_shape)


class LayerNormRule(LastAxesRule[nn.LayerNorm]):
    """C runs over the normalised axes, of which there may be several."""

    layer = nn.LayerNorm

    def normalised(self, a: Tensor) -> Tensor:
        return F.layer_norm(a, self.module.normalized_shape, eps=self.module.eps)


class RMSNormRule(LastAxesRule[nn.RMSNorm]):
    """C runs over the normalised axes, of which there may be several."""

    layer = nn.RMSNorm

    def normalised(self, a: Tensor) -> Tensor:
        return F.rms_norm(a, list(self.module.normalized_shape), eps=self.module.eps)


class PReLURule(AffineRule[nn.PReLU]):
    """One slope for all channels, or one a channel."""

    layer = nn.PReLU
    channel_axis = None

    def normalised(self, a: Tensor) -> Tensor:
        return a.clamp(max=0)

    def sums(self, values: Tensor) -> Tensor:
        sums_BC = super().sums(values)
        return sums_BC.sum(1, keepdim=True) if self.weight.numel() == 1 else sums_BC
