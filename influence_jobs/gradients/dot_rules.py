"""A rule per layer type: dot products of Q vectors with every sample's gradient of that layer.

With vectors v_Q of the layer's parameters, a rule maps the layer's input a and output gradient g to
(B, Q). For a weight there are two orders. *Direct*: the input goes through the Q vectors as if
they were weights of Q layers, in one GEMM or convolution, and the outputs are weighted by g and
summed; no sample's gradient exists. *Through the gradient*: a block of samples' gradients of this
one layer is formed, then multiplied with all vectors at once. See `through_gradient`.

Letters: B batch, Q vectors, C outputs, I inputs of one output, G groups, T positions, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.gradients import layers

# Numbers in one temporary: 8 MB stay in a CPU's cache; a GPU wants fewer and larger kernels.
_BLOCK_CPU, _BLOCK_GPU = 2**21, 2**26
# Multiplications that take as long as writing and reading a number (measured on a CPU: 30 to 150).
_MEMORY = 32
# Fewer samples in a block would read the vectors too often.
_FEWEST_SAMPLES = 16


def through_gradient(positions: int, vectors: int) -> bool:
    """Whether forming each sample's weight gradient first is cheaper.

    Per number of the weight and sample: T multiplications for the gradient, Q for the products with
    it and its way to memory and back, against T Q for the direct order. One position, or one
    vector, is always direct.
    """
    return positions + vectors + _MEMORY < positions * vectors


def _linear(module: nn.Linear, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
    weight_QCI = vectors["weight"]
    queries, outputs, inputs = weight_QCI.shape
    a_BTI, g_BTC = (
        a.reshape(len(a), -1, module.in_features),
        g.reshape(len(g), -1, module.out_features),
    )
    if _outputs_first(module):  # the other way round is the same sum with smaller intermediates
        a_BTI, g_BTC = g_BTC, a_BTI
    positions = a_BTI.shape[1]

    def gradient_first(a_BTI: Tensor, g_BTC: Tensor) -> Tensor:
        return layers.linear_weight(a_BTI, g_BTC).flatten(1) @ weight_QCI.flatten(1).t()

    def direct(a_BTI: Tensor, g_BTC: Tensor) -> Tensor:
        rows_NQC = (a_BTI.flatten(0, 1) @ weight_QCI.flatten(0, 1).t()).view(-1, queries, outputs)
        # A row vector times a matrix: faster than the matrix times a column.
        dots_NQ = (g_BTC.reshape(-1, 1, outputs) @ rows_NQC.transpose(1, 2)).squeeze(1)
        return dots_NQ.view(-1, positions, queries).sum(1) if positions > 1 else dots_NQ

    if through_gradient(positions, queries):
        dots_BQ = in_blocks(gradient_first, a_BTI, g_BTC, outputs * inputs)
    else:
        dots_BQ = in_blocks(direct, a_BTI, g_BTC, positions * queries * outputs)
    return _add_bias(dots_BQ, vectors, module, g)


def _conv2d(module: nn.Conv2d, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
    weight_hwQCI, groups = vectors["weight"], module.groups
    queries, outputs, inputs = weight_hwQCI.shape[2:]
    positions = g.shape[2] * g.shape[3]

    def gradient_first(a: Tensor, g: Tensor) -> Tensor:
        dots_BQ = g.new_zeros(len(g), queries)
        for y, x, gradient_BGCI in layers.conv2d_weight(module, a, g):
            dots_BQ.addmm_(gradient_BGCI.flatten(1), weight_hwQCI[y, x].flatten(1).t())
        return dots_BQ

    # The filters of all vectors that see one group of inputs lie together.
    def direct(a: Tensor, g: Tensor) -> Tensor:
        filters_QGCIhw = weight_hwQCI.permute(2, 3, 4, 0, 1).reshape(
            queries, groups, -1, inputs, *module.kernel_size
        )
        filters = filters_QGCIhw.transpose(0, 1).flatten(0, 2)
        a = layers.conv2d_pad(module, a)
        rows = F.conv2d(a, filters, None, module.stride, 0, module.dilation, groups)
        rows_BGQn = rows.reshape(len(g), groups, queries, -1)
        return (rows_BGQn @ g.reshape(len(g), groups, -1, 1)).squeeze(3).sum(1)

    if through_gradient(positions, queries):
        dots_BQ = in_blocks(gradient_first, a, g, outputs * inputs)
    else:
        dots_BQ = in_blocks(direct, a, g, positions * queries * outputs)
    return _add_bias(dots_BQ, vectors, module, g)


def _affine(module: layers.Affine, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
    dots_BQ = layers.affine_weight(module, a, g) @ vectors["weight"].flatten(1).t()
    return _add_bias(dots_BQ, vectors, module, g)


def _embedding(module: nn.Embedding, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
    weight_RQD = vectors["weight"]

    def direct(ids_BT: Tensor, g_BTD: Tensor) -> Tensor:
        return (weight_RQD[ids_BT] @ g_BTD.unsqueeze(3)).squeeze(3).sum(1)

    ids_BT, g_BTD = layers.embedding_positions(module, a, g)
    return in_blocks(direct, ids_BT, g_BTD, ids_BT.shape[1] * weight_RQD[0].numel())


def _add_bias(
    dots_BQ: Tensor,
    vectors: Mapping[str, Tensor],
    module: nn.Linear | nn.Conv2d | layers.Affine,
    g: Tensor,
) -> Tensor:
    if "bias" in vectors:
        dots_BQ.addmm_(layers.channel_sums(module, g), vectors["bias"].flatten(1).t())
    return dots_BQ


def in_blocks(
    results: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, numbers: int
) -> Tensor:
    """`results` of blocks of samples, each sample needing so many numbers of temporary memory."""
    samples = max(_FEWEST_SAMPLES, (_BLOCK_GPU if g.is_cuda else _BLOCK_CPU) // numbers)
    if samples >= len(g):
        return results(a, g)
    blocks = zip(torch.split(a, samples), torch.split(g, samples), strict=True)
    return torch.cat([results(*block) for block in blocks])


def _outputs_first(module: nn.Linear) -> bool:
    return module.out_features > module.in_features


# Looked up by exact type: a subclass may compute something else.
_RULES: dict[type[nn.Module], Callable[[Any, Mapping[str, Tensor], Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _affine,
    nn.BatchNorm2d: _affine,
    nn.LayerNorm: _affine,
    nn.GroupNorm: _affine,
    nn.Embedding: _embedding,
}


def has_dot_rule(module: nn.Module) -> bool:
    """Whether there is a rule for this layer's exact type; a subclass has none."""
    return type(module) in _RULES


def arranged(module: nn.Module, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors {parameter: (Q, *shape)} of a layer as its rule reads them, contiguous."""
    orders: dict[type[nn.Module], tuple[int, ...]] = {
        nn.Conv2d: (3, 4, 0, 1, 2),
        nn.Embedding: (1, 0, 2),
    }
    if isinstance(module, nn.Linear) and _outputs_first(module):
        orders[nn.Linear] = (0, 2, 1)
    order = orders.get(type(module))
    return {
        name: (part.permute(order) if order and name == "weight" else part).contiguous()
        for name, part in vectors.items()
    }


def gradient_dots(module: nn.Module, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
    """Dot products of vectors with every sample's gradient by the layer's own parameters.

    Args:
        module: A layer with a rule.
        vectors: As `arranged` gives them.
        a: Its input, first axis B.
        g: Gradient of the summed losses by its output, first axis B, of the vectors' type.

    Returns:
        (B, Q), of g's type.
    """
    return _RULES[type(module)](module, vectors, a, g)
