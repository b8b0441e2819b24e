"""Rules of transposed convolutions, over any number of kernel axes."""

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from influence_jobs.gradients.rules.base import LayerRule
from influence_jobs.gradients.rules.blocks import patches

V = TypeVar("V", bound=nn.modules.conv._ConvTransposeNd)


class ConvolutionTransposeRule(LayerRule[V]):
    """As a convolution of the output's gradient, whose own output gradient is the layer's input.

    A transposed convolution is the map that carries a convolution's output gradient back to its
    input. So its weight gradient is that convolution's, with input and output in exchanged roles.

    Letters: G groups, k one axis or several of the kernel; I are the inputs of one group.
    """

    numbered = True
    channel_axis = 1
    gradient_of_one: ClassVar[Callable[..., Tensor]]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        module = self.module
        inputs = module.in_channels // module.groups
        return module.out_channels, inputs, *module.kernel_size

    def as_read(self, gradient: Tensor) -> Tensor:
        module = self.module
        inputs = module.in_channels // module.groups
        gradient_BGICk = gradient.reshape(len(gradient), -1, inputs, *module.weight.shape[1:])
        return gradient_BGICk.transpose(2, 3).reshape(len(gradient), *self.kernel_shape)

    def has_batch_axis(self, output: Tensor) -> bool:
        return output.ndim == self.weight.ndim

    @property
    def one_matrix(self) -> bool:
        return self.module.groups == 1

    def rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of one position, (B, T, I), and the patch of g that they add to, (B, T, Ck).

        The matrix has a row for every output and kernel offset.
        """
        module = self.module
        a = F.pad(a, self._unused(a, g))
        padding = [p for p in reversed([*map(int, module.padding)]) for _ in range(2)]
        g_BTR = patches(F.pad(g, padding), module.kernel_size, module.stride, module.dilation)
        return a.flatten(2).transpose(1, 2), g_BTR

    def as_matrix(self, weights: Tensor) -> Tensor:
        return weights.flatten(2).transpose(1, 2)

    def from_matrix(self, matrices: Tensor) -> Tensor:
        return matrices.transpose(1, 2).reshape(len(matrices), *self.weight.shape)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """By one convolution, which has the samples of the batch as further groups."""
        module, batch = self.module, len(g)
        a = F.pad(a, self._unused(a, g))
        found = type(self).gradient_of_one(
            g.reshape(1, -1, *g.shape[2:]),
            (batch * module.in_channels, *module.weight.shape[1:]),
            a.reshape(1, -1, *a.shape[2:]),
            module.stride,
            module.padding,
            module.dilation,
            batch * module.groups,
        )
        return found.reshape(batch, *module.weight.shape)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.sum(dim=tuple(range(2, g.ndim)))

    def _unused(self, a: Tensor, g: Tensor) -> list[int]:
        """Zeros to add to the input, for `F.pad`.

        With an output padding of a stride or more, the convolution has more outputs than the layer
        has inputs.
        """
        module, zeros = self.module, list[int]()
        for axis, padding in reversed([*enumerate(map(int, module.padding))]):
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
            free = g.shape[2 + axis] + 2 * padding - reach - 1
            zeros += [0, free // module.stride[axis] + 1 - a.shape[2 + axis]]
        return zeros


class ConvTranspose1dRule(ConvolutionTransposeRule[nn.ConvTranspose1d]):
    """Any stride, padding, output padding, dilation and groups."""

    layer = nn.ConvTranspose1d
    read_as = "(C, I, kw)"
    gradient_of_one = staticmethod(grad.conv1d_weight)


class ConvTranspose2dRule(ConvolutionTransposeRule[nn.ConvTranspose2d]):
    """Any stride, padding, output padding, dilation and groups."""

    layer = nn.ConvTranspose2d
    read_as = "(C, I, kh, kw)"
    gradient_of_one = staticmethod(grad.conv2d_weight)


class ConvTranspose3dRule(ConvolutionTransposeRule[nn.ConvTranspose3d]):
    """Any stride, padding, output padding, dilation and groups."""

    layer = nn.ConvTranspose3d
    read_as = "(C, I, kd, kh, kw)"
    gradient_of_one = staticmethod(grad.conv3d_weight)
