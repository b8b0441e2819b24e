"""The rule of Embedding."""

import torch
from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule
from influence_jobs.gradients.rules.blocks import in_blocks


class EmbeddingRule(LayerRule[nn.Embedding]):
    """C counts the rows; only the rows that a sample uses take work.

    Letters: R rows, D width.
    """

    layer = nn.Embedding
    # They change weights in the forward pass, or make gradients depend on the batch.
    refused_options = ("max_norm", "scale_grad_by_freq", "sparse")

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        ids_BT, g_BTD = self._positions(a, g)
        gradient_BRD = g.new_zeros(len(ids_BT), *self.weight.shape)
        ids_BTD = ids_BT.unsqueeze(2).expand_as(g_BTD)
        return gradient_BRD.scatter_add_(1, ids_BTD, g_BTD)

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """Sums g over the positions of each (sample, row) that occurs; all other norms are 0."""
        ids_BT, g_BTD = self._positions(a, g)
        batch, rows = len(ids_BT), self.module.num_embeddings
        pairs = ids_BT + rows * torch.arange(batch, device=a.device).unsqueeze(1)
        present, position = torch.unique(pairs.flatten(), return_inverse=True)
        sums = g.new_zeros(len(present), self.module.embedding_dim)
        sums.index_add_(0, position, g_BTD.flatten(0, 1))
        norms = g.new_zeros(batch * rows)
        norms[present] = torch.linalg.vector_norm(sums, dim=1)
        return norms.view(batch, rows, 1, 1)

    def arrange_weight(self, vectors_Q: Tensor) -> Tensor:
        return vectors_Q.transpose(0, 1)  # (R, Q, D), so that one row of all vectors is contiguous

    def weight_dots(self, vectors: Tensor, a: Tensor, g: Tensor) -> Tensor:
        def dots(ids_BT: Tensor, g_BTD: Tensor) -> Tensor:
            return (vectors[ids_BT] @ g_BTD.unsqueeze(3)).squeeze(3).sum(1)

        ids_BT, g_BTD = self._positions(a, g)
        return in_blocks(dots, ids_BT, g_BTD, ids_BT.shape[1] * vectors[0].numel())

    def _positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Row ids (B, T), and each position's contribution to its row's gradient, (B, T, D)."""
        ids_BT, g_BTD = a.reshape(len(a), -1), g.reshape(len(a), -1, self.module.embedding_dim)
        if self.module.padding_idx is not None:
            g_BTD = g_BTD.masked_fill((ids_BT == self.module.padding_idx).unsqueeze(2), 0)
        return ids_BT, g_BTD
