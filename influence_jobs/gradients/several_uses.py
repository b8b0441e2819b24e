"""Norms of the gradient by a weight that several calls use, of one layer or of several.

The gradient is the sum of the calls' parts. Its norm is not a sum, so the calls of a pass are kept
until all are there.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_jobs.gradients.rules import LayerRule
from influence_jobs.gradients.rules.blocks import SampleShape, through_gram
from influence_jobs.gradients.weights import Weight
from influence_jobs.terms import Reduction

_BLOCK_CPU, _BLOCK_GPU = 2**24, 2**27  # numbers in the temporary tensors of a block of samples


class Call(NamedTuple):
    """One call of a layer, as its rule reads it, and what the parameter is called there."""

    rule: LayerRule[Any]
    a: Tensor
    g: Tensor
    own: str = "weight"  # or bias

    def part(self, samples: slice) -> "Call":
        """The call, of some samples."""
        return self._replace(a=self.a[samples], g=self.g[samples])

    def gradient(self) -> Tensor:
        """Each sample's gradient by the parameter, of this call alone."""
        if self.own == "bias":
            return self.rule.bias_gradient(self.g)
        return self.rule.weight_gradient(self.a, self.g)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """As `LayerRule.factors`; None for a bias."""
        return self.rule.factors(self.a, self.g) if self.own == "weight" else None


def norms_of_calls(calls: Sequence[Call], weight: Weight, reduction: Reduction) -> Tensor:
    """Norms of each sample's gradient, as `reduce_read` defines them.

    Args:
        calls: All calls of a pass that use the weight, read as the same matrix.
    """
    outputs, inputs, *kernel = weight.read_as
    columns = inputs * math.prod(kernel)
    of_one = [call.part(slice(1)).factors() for call in calls]
    positions = sum(factors[1].shape[1] for factors in of_one if factors)
    shape = SampleShape(positions, outputs, columns, 1)
    gram = (
        reduction == "layer"
        and None not in of_one
        and through_gram(shape, whole=True, device=calls[0].g.device)
    )
    numbers = 2 * (shape.rows + 2 * positions**2) if gram else weight.shape.numel()
    found = []
    for samples in _blocks(len(calls[0].g), numbers, on_gpu=calls[0].g.is_cuda):
        block = [call.part(samples) for call in calls]
        if gram:
            found.append(_gram_norms(block))
            continue
        gradient = block[0].gradient()
        for call in block[1:]:
            gradient = gradient + call.gradient()
        found.append(weight.norms(gradient, reduction))
    return torch.cat(found)


def _gram_norms(calls: Sequence[Call]) -> Tensor:
    """|sum_t l_t r_t^T|, t over all calls: the root of sum_tu (l_t . l_u)(r_t . r_u).

    In float64, because cancellation would cost half of float32's digits.
    """
    found = [call.factors() for call in calls]
    factors = [of_call for of_call in found if of_call is not None]
    total_B = torch.zeros(len(calls[0].g), dtype=torch.float64, device=calls[0].g.device)
    for i, j in itertools.combinations_with_replacement(range(len(factors)), 2):
        (left, right_BTJ), (left_2, right_BUJ) = factors[i], factors[j]
        products_BTU = right_BTJ.double() @ right_BUJ.double().transpose(1, 2)
        products_BTU *= _left_products(left, left_2)
        total_B += products_BTU.sum((1, 2)) * (1 if i == j else 2)
    return total_B.clamp_(min=0).sqrt_().to(calls[0].g.dtype)


def _left_products(left: Tensor, other: Tensor) -> Tensor:
    """l_t . l_u (B, T, U) of vectors (B, T, C), or of unit vectors by their ids (B, T)."""
    if left.ndim == 2 and other.ndim == 2:
        return (left.unsqueeze(2) == other.unsqueeze(1)).double()
    if left.ndim == 2:
        return _left_products(other, left).transpose(1, 2)
    if other.ndim == 2:
        ids_BTU = other.unsqueeze(1).expand(-1, left.shape[1], -1)
        return left.gather(2, ids_BTU).double()
    return left.double() @ other.double().transpose(1, 2)


def _blocks(samples: int, numbers: int, *, on_gpu: bool) -> Iterator[slice]:
    step = max(1, (_BLOCK_GPU if on_gpu else _BLOCK_CPU) // numbers)
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))
