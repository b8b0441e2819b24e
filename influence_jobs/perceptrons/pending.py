"""Outputs of a linear layer whose updates are made only at the end of a block of steps.

Both LiSSA and SGD use this for their blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PART_SAMPLES = 64  # samples of a part (see `PendingOutputs`); fastest by measurement
ALIGNED = 8  # row lengths are padded to multiples of this; others are up to a quarter slower


def padded(rows: Tensor) -> Tensor:
    """Rows (..., I), each followed by zeros up to a multiple of `ALIGNED`."""
    return F.pad(rows, (0, -rows.shape[-1] % ALIGNED))


class PendingOutputs:
    """Outputs of every step as if the updates of all earlier steps had been made.

    Step s adds D_s^T X_s to the layer's weights, and step t uses a_ts times that update. X_s are
    the layer's inputs (B, I), and D_s has the shape (B, C) of its outputs. Let Z_t be the outputs
    with the weights from the beginning of the block. Then the outputs of step t are

        Z_t + sum_{s<t} a_ts (X_t X_s^T) D_s.

    Products of a single step are narrow and therefore slow. So steps are grouped into parts of
    `PART_SAMPLES` samples. When a part begins, one product adds the updates of all earlier parts
    to the outputs of the whole part. Only the updates within the part are added step by step. The
    Gram matrix X_t X_s^T is needed below its diagonal only.

    Letters: E copies of the layer, K samples of all steps together, B samples of a step, P samples
    of a part, C outputs, I inputs.

    Args:
        z_EKC: Z; it is overwritten.
        x_EKI: X. If all copies have the same inputs, pass one expanded tensor (`expand`). Then they
            also share one Gram matrix.
        responses_KK: a, by sample; 0 for s >= t.
        batch: B.

    Attributes:
        d_EKC: D; the caller fills in the rows of each step.
    """

    def __init__(self, z_EKC: Tensor, x_EKI: Tensor, responses_KK: Tensor, batch: int):
        self._z_EKC, self._responses_KK, self._batch = z_EKC, responses_KK, batch
        self._x_EKI = x_EKI if x_EKI.stride(0) else x_EKI[:1]
        self._part = max(1, PART_SAMPLES // batch) * batch
        self.d_EKC = torch.empty_like(z_EKC, memory_format=torch.contiguous_format)

    def outputs(self, step: int) -> Tensor:
        """The outputs (E, B, C) of a step.

        Call this for the steps in order, each time after D of all earlier steps is filled in.
        """
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
        gram_EPK *= self._responses_KK[first:last, :last]
        self._gram_EPK = gram_EPK.expand(len(self._z_EKC), -1, -1)
        if first:
            z_EPC = self._z_EKC[:, first:last]
            z_EPC.baddbmm_(self._gram_EPK[..., :first], self.d_EKC[:, :first])
