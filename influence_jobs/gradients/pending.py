"""Outputs of a linear layer whose updates wait for the end of a block of steps: what blocks of LiSSA and of SGD stand on."""

import torch
from torch import Tensor
from torch.nn import functional as F

PART_SAMPLES = 64  # by measurement; see below
ALIGNED = 8  # numbers; products over rows that begin anywhere lose up to a quarter of their speed


def padded(rows: Tensor) -> Tensor:
    """Rows (..., I) with zeros after them, up to a multiple of `ALIGNED`."""
    return F.pad(rows, (0, -rows.shape[-1] % ALIGNED))


class PendingOutputs:
    """Outputs step by step, each with what the steps before it would have made of the weights.

    Step s changes the layer's weights by D_s^T X_s, of which a_ts is left in step t; X are inputs (B, I) and D something of
    the outputs' shape (B, C). With Z_t the outputs under the weights as they stand, those of step t are

        Z_t + sum_{s<t} a_ts (X_t X_s^T) D_s.

    The sum is taken in parts of some steps: of the parts before, in one product for a whole part, for products of one step
    are narrow and slow; and so the Gram matrix X_t X_s^T is needed below its diagonal only.

    Letters: E copies of the layer, K samples of all steps together, B of one, C outputs, I inputs.

    Args:
        z_EKC: Z; written to.
        x_EKI: X. Copies that share them may share their memory (`expand`); then the Gram matrix is shared too.
        answers_KK: a, by sample; 0 for s >= t.
        batch: B.

    Attributes:
        d_EKC: D; the caller fills in the rows of each step.
    """

    def __init__(self, z_EKC: Tensor, x_EKI: Tensor, answers_KK: Tensor, batch: int):
        self._z_EKC, self._answers_KK, self._batch = z_EKC, answers_KK, batch
        self._x_EKI = x_EKI if x_EKI.stride(0) else x_EKI[:1]
        self._part = max(1, PART_SAMPLES // batch) * batch
        self.d_EKC = torch.empty_like(z_EKC, memory_format=torch.contiguous_format)

    def outputs(self, step: int) -> Tensor:
        """The outputs (E, B, C) of a step; steps are asked for in order, D of those before being filled in."""
        start, stop = step * self._batch, (step + 1) * self._batch
        first = start - start % self._part
        if start == first:
            self._begin_part(first)
            return self._z_EKC[:, start:stop]
        return torch.baddbmm(
            self._z_EKC[:, start:stop],
            self._gram_EPK[:, start - first : stop - first, first:start],
            self.d_EKC[:, first:start],
        )

    def _begin_part(self, first: int) -> None:
        last = first + self._part
        gram_EPK = self._x_EKI[:, first:last] @ self._x_EKI[:, :last].mT
        gram_EPK *= self._answers_KK[first:last, :last]
        self._gram_EPK = gram_EPK.expand(len(self._z_EKC), -1, -1)
        if first:
            z_EPC = self._z_EKC[:, first:last]
            z_EPC.baddbmm_(self._gram_EPK[..., :first], self.d_EKC[:, :first])
