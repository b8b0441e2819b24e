"""The rules of Embedding and EmbeddingBag."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule, product_of_rows, times
from influence_jobs.gradients.rules.blocks import in_blocks

E = TypeVar("E", nn.Embedding, nn.EmbeddingBag)


class RowsRule(LayerRule[E]):
    """C counts the rows; only the rows that a sample uses take work.

    Letters: R rows, D width.
    """

    channel_axis = None
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
        pairs = (ids_BT + rows * torch.arange(batch, device=a.device).unsqueeze(1)).flatten()
        if a.device.type == "cpu":
            present, place = torch.unique(pairs, return_inverse=True)
            count = len(present)
        else:  # a GPU would be waited for: equal pairs get one number each, of room for all
            in_order, order = pairs.sort(stable=True)
            numbers = torch.zeros_like(order)
            numbers[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
            place, count = torch.empty_like(order), len(pairs)
            place[order] = numbers
        sums = g.new_zeros(count, self.module.embedding_dim)
        sums.index_add_(0, place, g_BTD.flatten(0, 1))
        norms = g.new_zeros(batch * rows)
        norms[pairs] = torch.linalg.vector_norm(sums, dim=1)[place]
        return norms.view(batch, rows, 1, 1)

    def factors(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self._positions(a, g)

    def projected(
        self, left_CK: Tensor | None, right_JI: Tensor | None, a: Tensor, g: Tensor
    ) -> Tensor:
        """As in `LayerRule`; a row's input is one, so L^T of it is a row of L."""
        ids_BT, g_BTD = self._positions(a, g)
        if left_CK is None:
            left_CK = torch.eye(self.module.num_embeddings, device=g.device, dtype=g.dtype)
        return product_of_rows(times(g_BTD, right_JI), left_CK[ids_BT])

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


class EmbeddingRule(RowsRule[nn.Embedding]):
    """C are the rows; only the rows that a sample uses are worked on."""

    layer = nn.Embedding


class EmbeddingBagRule(RowsRule[nn.EmbeddingBag]):
    """Sums and means of ids (B, N), unweighted; other calls go by the fallback."""

    layer = nn.EmbeddingBag

    def recorded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        more = args[1:] + tuple(value for name, value in kwargs.items() if name != "input")
        ids = super().recorded(args, kwargs)
        plain = self.module.mode != "max" and all(value is None for value in more)
        return ids if plain and ids is not None and ids.ndim == 2 else None

    def _positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if self.module.mode == "mean":
            counted = (
                a != self.module.padding_idx if self.module.padding_idx is not None else a >= 0
            )
            g = g / counted.sum(1, keepdim=True).clamp(min=1)
        return super()._positions(a, g.unsqueeze(1).expand(-1, a.shape[1], -1))
