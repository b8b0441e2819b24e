"""A sample's gradient of one layer, in the pieces that norms, dot products and quadratics are made of.

`a` is the layer's input and `g` the gradient of the summed losses by its output, both with the batch
as first axis.

Letters: B batch, C outputs (rows of the weight), I inputs of one output, G groups, T positions,
D width of an embedding.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

#: Layers with one scale and one shift per channel or feature.
Affine = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm


def linear_weight(a: Tensor, g: Tensor) -> Tensor:
    """Weight gradient (B, C, I) of a Linear layer."""
    return g.flatten(1, -2).transpose(1, 2) @ a.flatten(1, -2)


def conv2d_weight(module: nn.Conv2d, a: Tensor, g: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Weight gradient of a convolution, one kernel offset (y, x) at a time, as (B, G, C/G, I/G).

    Sums g x input over positions, on views of the padded input: in a flattened image of the input's
    width the pixels under one offset are one slice, if g is spread to that width with zeros. A
    stride is undone by splitting the input into its (row, column) phases, so offsets do not come in
    their order. Only this split and the padding copy; both memory formats flatten without a copy,
    so the layout is the model's own.
    """
    batch, channels, out_h, out_w = g.shape
    (kernel_h, kernel_w), groups = module.kernel_size, module.groups
    (stride_h, stride_w), (dilation_h, dilation_w) = module.stride, module.dilation
    a = conv2d_pad(module, a)

    phases: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y in range(kernel_h):
        for x in range(kernel_w):
            phase = (y * dilation_h % stride_h, x * dilation_w % stride_w)
            phases.setdefault(phase, []).append((y, x))

    for (phase_y, phase_x), offsets in phases.items():
        plane = a[:, :, phase_y::stride_h, phase_x::stride_w]
        width = plane.shape[3]
        length = (out_h - 1) * width + out_w
        a_BGIT = plane.flatten(2).reshape(batch, groups, a.shape[1] // groups, -1)
        g_BCT = F.pad(g, (0, width - out_w)).flatten(2)[..., :length]
        g_BGCT = g_BCT.reshape(batch, groups, channels // groups, length)
        for y, x in offsets:
            start = (y * dilation_h // stride_h) * width + x * dilation_w // stride_w
            yield y, x, g_BGCT @ a_BGIT[..., start : start + length].transpose(2, 3)


def conv2d_weight_of_one(module: nn.Conv2d, a_1: Tensor, g_1: Tensor) -> Tensor:
    """Weight gradient (C, I/G, kh, kw) of a convolution, of one sample with its batch axis."""
    padded_1 = conv2d_pad(module, a_1)
    gradient_CIhw: Tensor = grad.conv2d_weight(  # type: ignore[no-untyped-call]
        padded_1, module.weight.shape, g_1, module.stride, 0, module.dilation, module.groups
    )
    return gradient_CIhw


def conv2d_pad(module: nn.Conv2d, a: Tensor) -> Tensor:
    """The input as the kernel sees it."""
    padding: list[int] = []  # in the order of `F.pad`: left, right, top, bottom
    for axis in (1, 0):
        if module.padding == "same":  # an odd total puts the larger half after the image
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        elif isinstance(module.padding, str):  # "valid"
            padding += [0, 0]
        else:
            padding += [module.padding[axis]] * 2
    if not any(padding):
        return a
    return F.pad(
        a, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode
    )


def affine_weight(module: Affine, a: Tensor, g: Tensor) -> Tensor:
    """Gradient (B, C) of a normalisation layer's scale, its axes flattened."""
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.GroupNorm):
        normalised = F.group_norm(a, module.num_groups, eps=module.eps)
    else:
        normalised = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return channel_sums(module, g * normalised)


def channel_sums(module: nn.Linear | nn.Conv2d | Affine, values: Tensor) -> Tensor:
    """Sums (B, C) over a sample's positions of values shaped like the output: of g, the bias gradient."""
    if isinstance(module, nn.Linear):
        return values if values.ndim == 2 else values.flatten(1, -2).sum(1)
    if isinstance(module, nn.LayerNorm):
        first = values.ndim - len(module.normalized_shape)
        return values.unsqueeze(1).flatten(1, first).flatten(2).sum(1)
    return values.sum(dim=tuple(range(2, values.ndim))) if values.ndim > 2 else values


def embedding_positions(module: nn.Embedding, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Row ids (B, T) and what each position adds to its row's gradient, (B, T, D)."""
    ids_BT, g_BTD = a.reshape(len(a), -1), g.reshape(len(a), -1, module.embedding_dim)
    if module.padding_idx is not None:
        g_BTD = g_BTD.masked_fill((ids_BT == module.padding_idx).unsqueeze(2), 0)
    return ids_BT, g_BTD


def embedding_row_norms(module: nn.Embedding, a: Tensor, g: Tensor) -> Tensor:
    """L2 norms (B, rows) of the rows of an Embedding's weight gradient.

    Adds up g over the positions of each (sample, row) that occurs; other rows have gradient 0.
    """
    ids_BT, g_BTD = embedding_positions(module, a, g)
    batch, rows = len(ids_BT), module.num_embeddings
    pairs = ids_BT + rows * torch.arange(batch, device=a.device).unsqueeze(1)
    present, position = torch.unique(pairs.flatten(), return_inverse=True)
    sums = g.new_zeros(len(present), module.embedding_dim)
    sums.index_add_(0, position, g_BTD.flatten(0, 1))
    norms = g.new_zeros(batch * rows)
    norms[present] = torch.linalg.vector_norm(sums, dim=1)
    return norms.view(batch, rows)
