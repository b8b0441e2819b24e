"""A rule per layer type: from a layer's input and output gradient to its weight gradient's norms.

Every weight is read as a kernel (C, I, kh, kw): a Linear or Embedding weight has kh = kw = 1, that
of a normalisation layer has I = 1 too. A rule returns the *kernel norms* (B, C, kh, kw), the L2
norm over I of each sample's weight gradient, and holds the gradient of one kernel offset at a time.

Letters: B batch, C outputs (rows of the weight), I inputs of one output, G groups.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import layers
from influence_jobs.terms import Reduction

# Multiplications for a sample's gradient above which torch's own convolution, sample by sample, beats matrix products
# over the batch (measured on a CPU: by 1.3 on 96 x 96 channels of 25 x 25, by 6 to 39 on a 7 x 7 kernel with stride; half
# as fast on small layers). A GPU wants few and large kernels.
_LARGE_CONVOLUTION = 2**22


def _linear(module: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    norms_BC: Tensor
    if a.ndim == 2:  # the gradient is the outer product g a^T: its rows have norms |g_c| ||a||
        norms_BC = g.abs() * torch.linalg.vector_norm(a, dim=1, keepdim=True)
    else:
        norms_BC = torch.linalg.vector_norm(layers.linear_weight(a, g), dim=2)
    return norms_BC[..., None, None]


def _conv2d(module: nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    norms = g.new_empty(len(g), module.out_channels, *module.kernel_size)
    multiplications = module.weight.numel() * g.shape[2] * g.shape[3]
    if multiplications >= _LARGE_CONVOLUTION and not g.is_cuda:
        for b in range(len(g)):
            gradient_CIhw = layers.conv2d_weight_of_one(module, a[b : b + 1], g[b : b + 1])
            torch.linalg.vector_norm(gradient_CIhw, dim=1, out=norms[b])
        return norms
    for y, x, gradient_BGCI in layers.conv2d_weight(module, a, g):
        norms[:, :, y, x] = torch.linalg.vector_norm(gradient_BGCI, dim=3).flatten(1)
    return norms


def _affine(module: layers.Affine, a: Tensor, g: Tensor) -> Tensor:
    return layers.affine_weight(module, a, g).abs()[..., None, None]


def _embedding(module: nn.Embedding, a: Tensor, g: Tensor) -> Tensor:
    return layers.embedding_row_norms(module, a, g)[..., None, None]


# Looked up by exact type: a subclass may compute something else.
_RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm2d: _affine,
    nn.LayerNorm: _affine,
    nn.Embedding: _embedding,
}

#: The supported layer types.
SUPPORTED = tuple(_RULES)


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
            f"no gradient rule for a layer of type {type(module).__name__}; supported: "
            + ", ".join(kind.__name__ for kind in SUPPORTED)
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
