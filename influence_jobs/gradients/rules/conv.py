"""Rules of convolutions with any number of kernel axes."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product
from operator import floordiv, mod, mul
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from influence_jobs.gradients.rules.base import MatrixRule, product_of_rows, times
from influence_jobs.gradients.rules.blocks import in_blocks, through_gradient, through_patches

# If a sample's gradient takes more multiplications than this, torch's own convolution, sample by
# sample, is faster than matrix products over the batch. Measured on a CPU: 1.3 times as fast for 96
# x 96 channels of 25 x 25, 6 to 39 times for a 7 x 7 kernel with stride, half as fast for small
# layers. A GPU is faster with few large kernels.
_LARGE_CONVOLUTION = 2**22

_INDEXED = 2**31  # numbers of a tensor that CUDA's depthwise convolution takes

V = TypeVar("V", bound=nn.modules.conv._ConvNd)
Offset = tuple[int, ...]


class ConvolutionRule(MatrixRule[V]):
    """Computes a sample's gradient one kernel offset at a time, or by torch's own convolution.

    Norms may also come from the patches, copied out, or from their Gram matrices.

    Letters: G groups, k the kernel axes, I inputs of one group.
    """

    channel_axis = 1
    convolve: ClassVar[Callable[..., Tensor]]
    gradient_of_one: ClassVar[Callable[..., Tensor]]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def has_batch_axis(self, output: Tensor) -> bool:
        return output.ndim == self.weight.ndim

    @property
    def one_matrix(self) -> bool:
        return self.module.groups == 1

    def input_rows(self, a: Tensor) -> Tensor:
        """The patches under the kernel. With several groups they would be wrong."""
        module, a = self.module, self._padded(a)
        ones = (1,) * (4 - a.ndim)  # `F.unfold` needs images, so a sequence gets height 1
        patches_BJT = F.unfold(
            a.reshape(*a.shape[:2], *ones, *a.shape[2:]),
            (*ones, *module.kernel_size),
            dilation=(*ones, *module.dilation),
            stride=(*ones, *module.stride),
        )
        return patches_BJT.transpose(1, 2)

    def kernel_rows(self, a: Tensor) -> Tensor:
        module, a = self.module, self._padded(a)
        axes = len(module.kernel_size)
        pixels = zip(a.shape[2:], self._spans, module.stride, strict=True)
        out = [(size - span) // stride + 1 for size, span, stride in pixels]
        positions, offsets = math.prod(out), math.prod(module.kernel_size)
        steps = a.stride()[2:]
        windows = a.as_strided(
            (len(a), *out, *module.kernel_size, a.shape[1]),
            (
                a.stride(0),
                *map(mul, steps, module.stride),
                *map(mul, steps, module.dilation),
                a.stride(1),
            ),
        )
        # The copy goes along what lies together, if that is long.
        if a.stride(-1) == 1 and out[-1] > a.shape[1]:
            order = 0, *range(1 + axes, 2 + 2 * axes), *range(1, 1 + axes)
            rows_BkIT = windows.permute(order).reshape(len(a), offsets, -1, positions)
            return rows_BkIT.permute(0, 3, 1, 2)
        return windows.reshape(len(a), positions, offsets, -1)

    def output_rows(self, g: Tensor) -> Tensor:
        return g.flatten(2).transpose(1, 2)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        if self.by_grouped(g.device):
            return self.grouped_gradient(a, g)
        gradient = g.new_empty(len(g), *self.weight.shape)
        gradient_kBCI = self._kernel_first(gradient)
        for offset, gradient_BGCI in self._by_offset(a, g):
            gradient_kBCI[offset] = gradient_BGCI.flatten(1, 2)
        return gradient

    def by_grouped(self, device: torch.device) -> bool:
        """Whether `grouped_gradient` is the cheapest form: on a GPU, with one input in a group.

        There the other form multiplies vectors, and reads both tensors once for every offset.
        """
        return device.type == "cuda" and self.weight.shape[1] == 1

    def grouped_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """Weight gradients (B, C, I, *k) by one convolution, whose groups are the samples'.

        The output gradients are its filters; stride and dilation change places. Rochette, Manoel,
        Tramel: "Efficient per-example gradient computations in convolutional neural networks",
        2019.
        """
        module, groups, size, padded = self.module, self.module.groups, len(g), self._padded(a)
        most = max(1, (_INDEXED - 1) // max(padded[0].numel(), g[0].numel()))
        if size > most:
            blocks = zip(torch.split(a, most), torch.split(g, most), strict=True)
            return torch.cat([self.grouped_gradient(*block) for block in blocks])
        of_groups = torch.unflatten(padded, 1, (groups, -1))
        x = of_groups.movedim(2, 0).flatten(1, 2)  # (I, B G, *pixels)
        filters = g.flatten(0, 1).unsqueeze(1)
        found = type(self).convolve(
            x, filters, None, module.dilation, 0, module.stride, size * groups
        )
        # Pixels that no step of the stride reaches give further offsets.
        offsets: Any = (..., *map(slice, module.kernel_size))
        return torch.unflatten(found[offsets], 1, (size, -1)).movedim(0, 2)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.sum(dim=tuple(range(2, g.ndim)))

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        if self.by_gram(g, whole=False):
            return self.gram_kernel_norms(a, g)
        shape = self.sample_shape(g)
        if self.by_grouped(g.device):
            found: Tensor = torch.linalg.vector_norm(self.grouped_gradient(a, g), dim=2)
            return found
        own = not g.is_cuda and shape.positions * shape.weights >= _LARGE_CONVOLUTION
        if self.one_matrix and through_patches(shape, own=own, device=g.device):
            numbers = max(shape.weights, shape.positions * shape.columns)
            return in_blocks(self._patch_norms, a, g, numbers)
        norms = g.new_empty(len(g), self.module.out_channels, *self.module.kernel_size)
        if own:
            for b in range(len(g)):
                gradient_CIk = self._gradient_of_one(a[b : b + 1], g[b : b + 1])
                torch.linalg.vector_norm(gradient_CIk, dim=1, out=norms[b])
            return norms
        norms_kBC = self._kernel_first(norms)
        for offset, gradient_BGCI in self._by_offset(a, g):
            norms_kBC[offset] = torch.linalg.vector_norm(gradient_BGCI, dim=3).flatten(1)
        return norms

    def arrange_weight(self, vectors_Q: Tensor) -> Tensor:
        return self._kernel_first(vectors_Q)

    def weight_dots(self, vectors: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """Convolves the input with the filters of all Q vectors, or forms the gradient first."""
        queries, outputs, inputs = vectors.shape[-3:]
        positions, groups = math.prod(g.shape[2:]), self.module.groups

        def gradient_first(a: Tensor, g: Tensor) -> Tensor:
            dots_BQ = g.new_zeros(len(g), queries)
            for offset, gradient_BGCI in self._by_offset(a, g):
                dots_BQ.addmm_(gradient_BGCI.flatten(1), vectors[offset].flatten(1).t())
            return dots_BQ

        # Filters of all vectors for the same group of inputs are next to each other.
        def direct(a: Tensor, g: Tensor) -> Tensor:
            filters_QGCIk = vectors.permute(
                *range(vectors.ndim - 3, vectors.ndim), *range(vectors.ndim - 3)
            ).reshape(queries, groups, -1, inputs, *self.module.kernel_size)
            filters = filters_QGCIk.transpose(0, 1).flatten(0, 2)
            module, a = self.module, self._padded(a)
            rows = type(self).convolve(a, filters, None, module.stride, 0, module.dilation, groups)
            rows_BGQn = rows.reshape(len(g), groups, queries, -1)
            return (rows_BGQn @ g.reshape(len(g), groups, -1, 1)).squeeze(3).sum(1)

        if through_gradient(positions, queries):
            return in_blocks(gradient_first, a, g, outputs * inputs)
        return in_blocks(direct, a, g, positions * queries * outputs)

    def projected(
        self, left_CK: Tensor | None, right_JI: Tensor | None, a: Tensor, g: Tensor
    ) -> Tensor:
        """As in `LayerRule`; R^T x_t is a convolution of the input with the columns of R."""
        if right_JI is None or not self.one_matrix:
            return super().projected(left_CK, right_JI, a, g)
        module = self.module
        filters = right_JI.t().reshape(-1, *self.weight.shape[1:])
        rows = type(self).convolve(
            self._padded(a), filters, None, module.stride, 0, module.dilation, 1
        )
        return product_of_rows(self.output_rows(rows), times(self.output_rows(g), left_CK))

    def gradient_matrix(self, a: Tensor, g: Tensor) -> Tensor:
        """As in `MatrixRule`, but the columns are ordered by kernel offset first."""
        pieces = dict(self._by_offset(a, g))
        columns = [pieces[offset].flatten(1, 2) for offset in sorted(pieces)]
        if self.bias is not None:
            columns.append(self.bias_gradient(g).unsqueeze(2))
        return torch.cat(columns, dim=2)

    def _by_offset(self, a: Tensor, g: Tensor) -> Iterator[tuple[Offset, Tensor]]:
        """The weight gradient, one kernel offset at a time, as (B, G, C/G, I).

        It sums g times the input over positions, on views of the padded input. Zeros are added to g
        until its rows are as long as the input's. Then, in flattened images, the pixels under one
        offset are one slice. For a stride the input is split into its phases along every axis, so
        offsets come in another order. Only this split and the padding copy: both memory formats
        flatten without a copy.
        """
        module, groups = self.module, self.module.groups
        batch, channels, *out = g.shape
        a, ends = self._padded(a), [None] * len(out)

        for phase, offsets in self._phases.items():
            plane = a[(slice(None), slice(None), *map(slice, phase, ends, module.stride))]
            size = list(plane.shape[2:])
            steps, spread = [1], []  # from the last axis, the order of `F.pad`
            for axis in range(len(size) - 1, 0, -1):
                steps.insert(0, steps[0] * size[axis])
                spread += [0, size[axis] - out[axis]]
            length = sum(map(mul, out, steps)) - sum(steps) + 1
            a_BGIT = plane.flatten(2).reshape(batch, groups, a.shape[1] // groups, -1)
            g_BCT = (F.pad(g, spread) if spread else g).flatten(2)[..., :length]
            g_BGCT = g_BCT.reshape(batch, groups, channels // groups, length)
            for offset, shift in offsets:
                start = sum(map(mul, shift, steps))
                yield offset, g_BGCT @ a_BGIT[..., start : start + length].transpose(2, 3)

    def _patch_norms(self, a: Tensor, g: Tensor) -> Tensor:
        rows_BTkI = self.kernel_rows(a)
        gradient_BCJ = product_of_rows(rows_BTkI.flatten(2), self.output_rows(g))
        norms_BCk: Tensor = torch.linalg.vector_norm(
            gradient_BCJ.view(*gradient_BCJ.shape[:2], *rows_BTkI.shape[2:]), dim=3
        )
        return norms_BCk.reshape(len(g), *self.weight.shape[:1], *self.module.kernel_size)

    def _gradient_of_one(self, a_1: Tensor, g_1: Tensor) -> Tensor:
        """Weight gradient (C, I, *k) of a batch of one sample."""
        module, padded_1 = self.module, self._padded(a_1)
        return type(self).gradient_of_one(
            padded_1, module.weight.shape, g_1, module.stride, 0, module.dilation, module.groups
        )

    def _kernel_first(self, tensor: Tensor) -> Tensor:
        """A view with the kernel axes, which are the last ones, moved to the front."""
        others = tensor.ndim - len(self.module.kernel_size)
        return tensor.permute(*range(others, tensor.ndim), *range(others))

    def _padded(self, a: Tensor) -> Tensor:
        """The input with the layer's padding."""
        if not any(self._padding):
            return a
        zeros = self.module.padding_mode == "zeros"
        return F.pad(a, self._padding, mode="constant" if zeros else self.module.padding_mode)

    # These three depend on the layer's geometry only. They are cached, as small layers take only
    # microseconds.

    @cached_property
    def _spans(self) -> list[int]:
        """Pixels from the first under the kernel to the last, both counted, by axis."""
        return [
            dilation * (size - 1) + 1
            for dilation, size in zip(self.module.dilation, self.module.kernel_size, strict=True)
        ]

    @cached_property
    def _padding(self) -> list[int]:
        """The padding in the order of `F.pad`: last axis first."""
        module, padding = self.module, list[int]()
        for axis in reversed(range(len(module.kernel_size))):
            if module.padding == "same":  # of an odd total the larger half comes after the image
                total = module.dilation[axis] * (module.kernel_size[axis] - 1)
                padding += [total // 2, total - total // 2]
            elif isinstance(module.padding, str):  # "valid"
                padding += [0, 0]
            else:
                padding += [module.padding[axis]] * 2
        return padding

    @cached_property
    def _phases(self) -> dict[Offset, list[tuple[Offset, Offset]]]:
        """By phase of the stride: the kernel's offsets, and the shift of each within the phase."""
        module, phases = self.module, defaultdict[Offset, list[tuple[Offset, Offset]]](list)
        for offset in product(*map(range, module.kernel_size)):
            pixels = tuple(map(mul, offset, module.dilation))
            shift = tuple(map(floordiv, pixels, module.stride))
            phases[tuple(map(mod, pixels, module.stride))].append((offset, shift))
        return phases


class Conv1dRule(ConvolutionRule[nn.Conv1d]):
    """Any stride, padding, padding mode, dilation and groups; EK-FAC factors one group."""

    layer = nn.Conv1d
    read_as = "(C, I, kw)"
    convolve = staticmethod(F.conv1d)
    gradient_of_one = staticmethod(grad.conv1d_weight)


class Conv2dRule(ConvolutionRule[nn.Conv2d]):
    """Any stride, padding, padding mode, dilation and groups; EK-FAC factors one group."""

    layer = nn.Conv2d
    read_as = "(C, I, kh, kw)"
    convolve = staticmethod(F.conv2d)
    gradient_of_one = staticmethod(grad.conv2d_weight)
