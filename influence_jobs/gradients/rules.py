"""A rule per layer type: from a layer's input and output gradient to its weight gradient's norms.

Every weight is read as a kernel (C, I, kh, kw): a Linear or Embedding weight has kh = kw = 1, that
of a normalisation layer has I = 1 too. A rule returns the *kernel norms* (B, C, kh, kw), the L2
norm over I of each sample's weight gradient, and holds the gradient of one kernel offset at a time.

Letters: B batch, C outputs (rows of the weight), I inputs of one output, G groups, T positions,
D width of an embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.terms import Reduction


def _linear(module: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    norms_BC: Tensor
    if a.ndim == 2:  # the gradient is the outer product g a^T: its rows have norms |g_c| ||a||
        norms_BC = g.abs() * torch.linalg.vector_norm(a, dim=1, keepdim=True)
    else:
        gradient_BCI = g.flatten(1, -2).transpose(1, 2) @ a.flatten(1, -2)
        norms_BC = torch.linalg.vector_norm(gradient_BCI, dim=2)
    return norms_BC[..., None, None]


def _conv2d(module: nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """Sum g x input over positions, one kernel offset at a time, on views of the padded input.

    In a flattened image of the input's width the pixels under one offset are one slice, if g is
    spread to that width with zeros. A stride is undone by splitting the input into its (row,
    column) phases. Only this split and the padding copy; both memory formats flatten without a
    copy, so the layout is the model's own.
    """
    batch, channels, out_h, out_w = g.shape
    (kernel_h, kernel_w), groups = module.kernel_size, module.groups
    (stride_h, stride_w), (dilation_h, dilation_w) = module.stride, module.dilation
    padding = _conv2d_padding(module)
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, padding, mode=mode)

    phases: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y in range(kernel_h):
        for x in range(kernel_w):
            phase = (y * dilation_h % stride_h, x * dilation_w % stride_w)
            phases.setdefault(phase, []).append((y, x))

    norms = g.new_empty(batch, channels, kernel_h, kernel_w)
    for (phase_y, phase_x), offsets in phases.items():
        plane = a[:, :, phase_y::stride_h, phase_x::stride_w]
        width = plane.shape[3]
        length = (out_h - 1) * width + out_w
        a_BGIT = plane.flatten(2).reshape(batch, groups, a.shape[1] // groups, -1)
        g_BCT = F.pad(g, (0, width - out_w)).flatten(2)[..., :length]
        g_BGCT = g_BCT.reshape(batch, groups, channels // groups, length)
        for y, x in offsets:
            start = (y * dilation_h // stride_h) * width + x * dilation_w // stride_w
            gradient_BGCI = g_BGCT @ a_BGIT[..., start : start + length].transpose(2, 3)
            norms[:, :, y, x] = torch.linalg.vector_norm(gradient_BGCI, dim=3).flatten(1)
    return norms


def _conv2d_padding(module: nn.Conv2d) -> list[int]:
    """Padding in the order of `F.pad`: left, right, top, bottom."""
    padding: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":  # an odd total puts the larger half after the image
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        elif isinstance(module.padding, str):  # "valid"
            padding += [0, 0]
        else:
            padding += [module.padding[axis]] * 2
    return padding


def _batch_norm2d(module: nn.BatchNorm2d, a: Tensor, g: Tensor) -> Tensor:
    normalised = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return (g * normalised).sum(dim=(2, 3)).abs()[..., None, None]


def _layer_norm(module: nn.LayerNorm, a: Tensor, g: Tensor) -> Tensor:
    shape = module.normalized_shape
    products = g * F.layer_norm(a, shape, eps=module.eps)
    products_BTC = products.unsqueeze(1).flatten(1, a.ndim - len(shape)).flatten(2)
    return products_BTC.sum(dim=1).abs()[..., None, None]


def _embedding(module: nn.Embedding, a: Tensor, g: Tensor) -> Tensor:
    """Add up g over the positions of each (sample, row) that occurs; other rows have gradient 0."""
    batch, rows = a.shape[0], module.num_embeddings
    ids_BT, g_BTD = a.reshape(batch, -1), g.reshape(batch, -1, module.embedding_dim)
    if module.padding_idx is not None:
        g_BTD = g_BTD.masked_fill((ids_BT == module.padding_idx).unsqueeze(2), 0)
    pairs = ids_BT + rows * torch.arange(batch, device=a.device).unsqueeze(1)
    present, position = torch.unique(pairs.flatten(), return_inverse=True)
    sums = g.new_zeros(len(present), module.embedding_dim)
    sums.index_add_(0, position, g_BTD.flatten(0, 1))
    norms = g.new_zeros(batch * rows)
    norms[present] = torch.linalg.vector_norm(sums, dim=1)
    return norms.view(batch, rows, 1, 1)


# Looked up by exact type: a subclass may compute something else.
_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm2d: _batch_norm2d,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}

#: The supported layer types, for messages.
SUPPORTED = ", ".join(kind.__name__ for kind in _RULES)


def supported(module: nn.Module) -> bool:
    """Whether there is a rule for this layer's exact type; a subclass has none."""
    return type(module) in _RULES


def has_batch_axis(module: nn.Module, output: Tensor) -> bool:
    """Whether a supported layer was called with a batch, not with one bare sample."""
    if isinstance(module, nn.Conv2d):
        return output.ndim == 4
    if isinstance(module, nn.LayerNorm):
        return output.ndim > len(module.normalized_shape)
    return output.ndim >= 2


def kernel_norms(module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Norms over the input axis of each sample's weight gradient.

    Args:
        module: A supported layer.
        a: Its input, first axis B.
        g: Gradient of the summed losses by its output, first axis B, of the weight's type.

    Returns:
        (B, C, kh, kw), of g's type.
    """
    return _RULES[type(module)](module, a, g)


def reduce_norms(norms: Tensor, reduction: Reduction) -> Tensor:
    """From kernel norms (B, C, kh, kw) to the norms that `reduce_gradient` defines."""
    if reduction == "kernel":
        return norms
    if reduction == "channel":
        return norms.sum(dim=(2, 3))
    whole: Tensor = torch.linalg.vector_norm(norms, dim=(1, 2, 3))
    return whole


def kernel_shape(module: nn.Module) -> tuple[int, int, int, int]:
    """Shape (C, I, kh, kw) in which the weight of a supported layer is read.

    Raises:
        ModelError: No rule for this type of layer.
    """
    if not supported(module):
        raise ModelError(
            f"no gradient rule for a layer of type {type(module).__name__}; supported: {SUPPORTED}"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv2d):
        channels, inputs, kernel_h, kernel_w = weight.shape
        return channels, inputs, kernel_h, kernel_w
    if isinstance(module, nn.Linear | nn.Embedding):
        return weight.shape[0], weight.shape[1], 1, 1
    return weight.numel(), 1, 1, 1


def norm_shape(module: nn.Module, reduction: Reduction) -> tuple[int, ...]:
    """Shape of one sample's norms, for example (96, 3, 3), (96,) or ().

    Raises:
        ModelError: No rule for this type of layer.
    """
    channels, _, kernel_h, kernel_w = kernel_shape(module)
    if reduction == "kernel":
        return channels, kernel_h, kernel_w
    return (channels,) if reduction == "channel" else ()


def reduce_gradient(module: nn.Module, gradient: Tensor, reduction: Reduction) -> Tensor:
    """Norms of given weight gradients (B, *weight shape): the definition of the reductions.

    `kernel`: L2 over the input axis, (B, C, kh, kw). `channel`: the kernel norms summed over kh and
    kw, (B, C), section 3.2.3 of the report. `layer`: L2 of the whole gradient, (B,).
    """
    gradient_BCIhw = gradient.reshape(len(gradient), *kernel_shape(module))
    if reduction == "layer":
        return gradient_BCIhw.square().sum(dim=(1, 2, 3, 4)).sqrt()
    norms_BChw = gradient_BCIhw.square().sum(dim=2).sqrt()
    return norms_BChw if reduction == "kernel" else norms_BChw.sum(dim=(2, 3))
