"""The rule of Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.gradients.metric import Metric
from influence_jobs.gradients.rules.base import MatrixRule, product_of_rows
from influence_jobs.gradients.rules.blocks import in_blocks, through_gradient


class LinearRule(MatrixRule[nn.Linear]):
    """Any number of position axes; closed form without them."""

    layer = nn.Linear

    def input_rows(self, a: Tensor) -> Tensor:
        return a.unsqueeze(1) if a.ndim == 2 else a.flatten(1, -2)

    def output_rows(self, g: Tensor) -> Tensor:
        return g.unsqueeze(1) if g.ndim == 2 else g.flatten(1, -2)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g if g.ndim == 2 else g.flatten(1, -2).sum(1)

    def by_gram(self, g: Tensor, *, whole: bool) -> bool:
        return g.ndim > 2 and super().by_gram(g, whole=whole)

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        if self.by_gram(g, whole=False):
            return self.gram_kernel_norms(a, g)
        norms_BC: Tensor
        if a.ndim == 2:  # the gradient is g a^T, and the norms of its rows are |g_c| ||a||
            norms_BC = g.abs() * torch.linalg.vector_norm(a, dim=1, keepdim=True)
        else:
            norms_BC = torch.linalg.vector_norm(self.weight_gradient(a, g), dim=2)
        return norms_BC[..., None, None]

    def arrange_weight(self, vectors_Q: Tensor) -> Tensor:
        return vectors_Q.transpose(1, 2) if self._outputs_first else vectors_Q

    def weight_dots(self, vectors: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """Applies the Q vectors to the input like weights, or forms the gradient first."""
        queries, outputs, inputs = vectors.shape
        a_BTI, g_BTC = self.input_rows(a), self.output_rows(g)
        if self._outputs_first:
            a_BTI, g_BTC = g_BTC, a_BTI
        positions = a_BTI.shape[1]

        def gradient_first(a_BTI: Tensor, g_BTC: Tensor) -> Tensor:
            return product_of_rows(a_BTI, g_BTC).flatten(1) @ vectors.flatten(1).t()

        def direct(a_BTI: Tensor, g_BTC: Tensor) -> Tensor:
            rows_NQC = (a_BTI.flatten(0, 1) @ vectors.flatten(0, 1).t()).view(-1, queries, outputs)
            # A row vector times a matrix is faster than a matrix times a column vector.
            dots_NQ = (g_BTC.reshape(-1, 1, outputs) @ rows_NQC.transpose(1, 2)).squeeze(1)
            return dots_NQ.view(-1, positions, queries).sum(1) if positions > 1 else dots_NQ

        if through_gradient(positions, queries):
            return in_blocks(gradient_first, a_BTI, g_BTC, outputs * inputs)
        return in_blocks(direct, a_BTI, g_BTC, positions * queries * outputs)

    def quadratic(self, metric: Metric, a: Tensor, g: Tensor) -> Tensor:
        """Without positions (g U)^2 D ((a V)^2)^T; else g and a are rotated, then multiplied."""
        v_JJ, d_CJ = metric.inputs_JJ, metric.weights_CJ
        inputs = a @ v_JJ if self.bias is None else F.linear(a, v_JJ[:-1].t(), v_JJ[-1])
        outputs = g @ metric.outputs_CC
        if a.ndim == 2:
            return (outputs.square() @ d_CJ).mul_(inputs.square()).sum(1)

        def forms(inputs: Tensor, outputs: Tensor) -> Tensor:
            rotated_BCJ = product_of_rows(inputs.flatten(1, -2), outputs.flatten(1, -2))
            return rotated_BCJ.square_().flatten(1) @ d_CJ.flatten()

        return in_blocks(forms, inputs, outputs, d_CJ.numel())

    @property
    def _outputs_first(self) -> bool:
        """Whether the transposed product, an equal sum, has smaller intermediate results."""
        return self.module.out_features > self.module.in_features
