"""The blocks of EK-FAC: of one layer's matrix, or of one parameter that is no matrix."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_jobs.curvature.eigenvectors import eigh
from influence_jobs.gradients import Metric
from influence_jobs.gradients.rules import LayerRule
from influence_jobs.gradients.rules.base import product_of_rows
from influence_jobs.gradients.rules.blocks import SampleShape, in_blocks, rows_rotated_first

MOST_SIDE = 8192  # rows or columns of a matrix that get an eigenbasis: its factor has 256 MB
MOST_MOMENTS = 2**20  # numbers in the blocks of a parameter that is no matrix


class Block(ABC):
    """The curvature of some parameters.

    Attributes:
        names: Full names of the parameters.
        eigenvalues: Of the block, once it is finished.
        coarse: Whether it is coarser than the whole block or its Kronecker factors.
    """

    names: list[str]
    eigenvalues: Tensor
    coarse: bool = False

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of all that it keeps."""

    @abstractmethod
    def state(self) -> dict[str, Tensor | None]:
        """What a finished block keeps."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor | None]) -> None:
        """Take what a finished block of the same parameters kept, on any device."""

    @abstractmethod
    def diagonals(self) -> list[Tensor]:
        """Of the second moments that the first sweep adds up."""

    @abstractmethod
    def diagonalise(self, live: Sequence[int]) -> None:
        """End the first sweep.

        Args:
            live: How many numbers of each of `diagonals` are above zero.
        """

    @abstractmethod
    def times(
        self, vectors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """A function of the block, given as one of its eigenvalues, times {name: (Q, *shape)}."""


def _eigenvectors(moment: Tensor, live: int) -> Tensor:
    """Of a second moment; of numbers that are always zero, as dead units are, the unit vectors.

    Args:
        live: How many are not always zero.
    """
    if live == len(moment):
        return eigh(moment)[1]
    vectors = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    # By themselves: LAPACK may fail where many rows are zero.
    if live:
        dead_first = (moment.diagonal() > 0).byte().sort(stable=True).indices
        at = dead_first[len(moment) - live :]
        vectors[at.unsqueeze(1), at] = eigh(moment[at][:, at])[1]
    return vectors


def _there(state: Mapping[str, Tensor | None], name: str, device: torch.device) -> Tensor:
    tensor = state[name]
    assert tensor is not None
    return tensor.to(device)


class MatrixBlock(Block):
    """Of a matrix (C, J), the bias as its last column if it has one; U and V are orthogonal.

    Args:
        rule: The layer's.
        names: Of the weight, and of the bias.
        complete: Whether these are all parameters of the layer.
    """

    def __init__(
        self,
        rule: LayerRule[Any],
        names: list[str],
        *,
        complete: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names, self._rule, self.complete = names, rule, complete
        weight = rule.weight
        _, rows, columns = rule.as_matrix(weight.detach().unsqueeze(0)).shape
        self._has_bias = len(names) > 1
        self._columns = columns
        self._shape = rows, columns + self._has_bias

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._outputs, self._inputs = (
            zeros(side, side) if side <= MOST_SIDE else None for side in self._shape
        )
        self.eigenvalues = zeros(*self._shape)
        self._may_be_padded = weight.ndim < 4  # images are not
        self._squared_BJ = self.eigenvalues[:0]  # the rotated inputs of a batch, squared
        self._counted_BT = self.eigenvalues[:0]  # the positions of a batch whose inputs are added

    @property
    def num_bytes(self) -> int:
        kept = (self._outputs, self._inputs, self.eigenvalues)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def state(self) -> dict[str, Tensor | None]:
        return {
            "outputs": self._outputs, "inputs": self._inputs, "eigenvalues": self.eigenvalues
        }  # fmt: skip

    def restore(self, state: Mapping[str, Tensor | None]) -> None:
        device = self.eigenvalues.device
        self._outputs, self._inputs = (
            None if state[side] is None else _there(state, side, device)
            for side in ("outputs", "inputs")
        )
        self.eigenvalues = _there(state, "eigenvalues", device)

    def add_moments(self, x_BTJ: Tensor, g_BTC: Tensor, *, inputs: bool) -> None:
        """Add to the second moments of the rows; their scale does not matter.

        An input counts if an output depends on it: not where a text or a series is padded.
        """
        if self._outputs is not None:
            g_NC = g_BTC.flatten(0, 1)
            self._outputs.addmm_(g_NC.t(), g_NC)
        padded = self._may_be_padded and x_BTJ.shape[1] > 1
        if self._inputs is None or not (inputs or padded):
            return
        x_NJ, j = x_BTJ.flatten(0, 1), self._columns
        count: Tensor | int = len(x_NJ)
        if padded:
            counts_BT = (g_BTC != 0).any(2)
            new_BT = counts_BT if inputs else counts_BT & ~self._counted_BT
            self._counted_BT = counts_BT if inputs else counts_BT | self._counted_BT
            # Zeros in place of a shorter matrix, whose length a GPU would be asked for.
            x_NJ = x_NJ.masked_fill(~new_BT.view(-1, 1), 0)
            count = new_BT.sum()
        self._inputs[:j, :j].addmm_(x_NJ.t(), x_NJ)
        if self._has_bias:
            sums_J = x_NJ.sum(0)
            self._inputs[:j, j] += sums_J
            self._inputs[j, :j] += sums_J
            self._inputs[j, j] += count

    def diagonals(self) -> list[Tensor]:
        return [side.diagonal() for side in (self._outputs, self._inputs) if side is not None]

    def diagonalise(self, live: Sequence[int]) -> None:
        counts = iter(live)
        self._outputs, self._inputs = (
            None if moment is None else _eigenvectors(moment, next(counts))
            for moment in (self._outputs, self._inputs)
        )

    def add_squares(self, x_BTJ: Tensor, g_BTC: Tensor, *, inputs: bool) -> None:
        """Add the squares of (U^T G V), G = sum_t g_t x_t^T."""
        u, v, j = self._outputs, self._inputs, self._columns
        positions, outputs = g_BTC.shape[1:]
        shape = SampleShape(positions, outputs, self._shape[1], 1)

        def with_one(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if self._has_bias else x

        def rotated_inputs(x: Tensor) -> Tensor:
            if v is None:
                return with_one(x)
            return x @ v[:j] + v[j] if self._has_bias else x @ v

        def rows_first(x: Tensor, g: Tensor) -> Tensor:
            return product_of_rows(rotated_inputs(x), g if u is None else g @ u)

        def gradient_first(x: Tensor, g: Tensor) -> Tensor:
            gradient = product_of_rows(with_one(x), g)
            gradient = gradient if v is None else gradient @ v
            return gradient if u is None else u.t() @ gradient

        if positions == 1:
            if inputs:  # all columns of a batch have these
                self._squared_BJ = rotated_inputs(x_BTJ.squeeze(1)).square()
            g_BC = g_BTC.squeeze(1)
            g_BC = g_BC if u is None else g_BC @ u
            self.eigenvalues.addmm_(g_BC.square().t(), self._squared_BJ)
            return
        rotated = rows_first if rows_rotated_first(shape) else gradient_first

        def squares(x: Tensor, g: Tensor) -> Tensor:
            return rotated(x, g).square_().sum(0, keepdim=True)

        self.eigenvalues += in_blocks(squares, x_BTJ, g_BTC, self.eigenvalues.numel()).sum(0)

    def times(
        self, vectors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        weight, *bias = self.names
        parts = [self._rule.as_matrix(vectors[weight])]
        parts += [vectors[name].unsqueeze(2) for name in bias]
        v_QCJ = torch.cat(parts, dim=2).to(self.eigenvalues.dtype)
        rotated = self._rotated(v_QCJ, self._outputs, self._inputs)
        rotated = rotated * function(self.eigenvalues)
        back = [None if side is None else side.t() for side in (self._outputs, self._inputs)]
        x_QCJ = self._rotated(rotated, *back)
        found = {weight: self._rule.from_matrix(x_QCJ[..., : self._columns])}
        return found | dict.fromkeys(bias, x_QCJ[..., -1])

    def metric(self, damping: float, power: int) -> Metric:
        """The quadratic form of a gradient in (block + lambda I)^-power."""
        u, v = (
            torch.eye(size, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device)
            if side is None
            else side
            for side, size in zip((self._outputs, self._inputs), self._shape, strict=True)
        )
        return Metric(u, v, (self.eigenvalues + damping) ** -power)

    @staticmethod
    def _rotated(v_QCJ: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
        v_QCJ = v_QCJ if u is None else u.t() @ v_QCJ
        return v_QCJ if v is None else v_QCJ @ v


class VectorBlock(Block):
    """Of a parameter that is no matrix: R blocks (n, n) on the diagonal.

    One whole block if `MOST_MOMENTS` allows it, else one a row, else one a number.
    """

    def __init__(
        self, name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.names, self._shape = [name], shape
        size = math.prod(shape)
        cuts = 1, shape[0] if shape else 1, size
        blocks = next((r for r in cuts if size**2 // r <= MOST_MOMENTS), size)
        self.coarse = blocks > 1
        self._moments = torch.zeros(
            blocks, size // blocks, size // blocks, dtype=dtype, device=device
        )
        self._vectors, self.eigenvalues = self._moments, self._moments[..., 0]  # a diagonal's own

    @property
    def num_bytes(self) -> int:
        return 2 * self._moments.nbytes  # the eigenvectors, too

    def state(self) -> dict[str, Tensor | None]:
        return {"vectors": self._vectors, "eigenvalues": self.eigenvalues}

    def restore(self, state: Mapping[str, Tensor | None]) -> None:
        device = self.eigenvalues.device
        self._vectors = _there(state, "vectors", device)
        self.eigenvalues = _there(state, "eigenvalues", device)

    def add(self, gradients: Tensor) -> None:
        """Add gradients (b, *shape)."""
        gradient_BRn = gradients.reshape(len(gradients), *self._moments.shape[:2])
        if gradient_BRn.shape[2] == 1:
            self._moments += gradient_BRn.square().sum(0).unsqueeze(2)
        else:
            self._moments.baddbmm_(gradient_BRn.permute(1, 2, 0), gradient_BRn.transpose(0, 1))

    def diagonals(self) -> list[Tensor]:
        return [self._moments.diagonal(dim1=1, dim2=2)]

    def diagonalise(self, live: Sequence[int]) -> None:
        if self._moments.shape[2] > 1:
            try:
                self.eigenvalues, self._vectors = eigh(self._moments)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # many numbers are zero
                (diagonals,) = self.diagonals()
                counts = (diagonals > 0).sum(1).tolist()
                self._vectors = torch.stack(list(map(_eigenvectors, self._moments, counts)))
                rotated = self._vectors.transpose(1, 2) @ self._moments @ self._vectors
                self.eigenvalues = rotated.diagonal(dim1=1, dim2=2).contiguous()
            self.eigenvalues.clamp_(min=0)

    def times(
        self, vectors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        (name,) = self.names
        v_QRn = vectors[name].reshape(-1, *self.eigenvalues.shape).to(self.eigenvalues.dtype)
        if v_QRn.shape[2] > 1:
            v_RnQ = self._vectors.transpose(1, 2) @ v_QRn.permute(1, 2, 0)
            v_RnQ = v_RnQ * function(self.eigenvalues).unsqueeze(2)
            v_QRn = (self._vectors @ v_RnQ).permute(2, 0, 1)
        else:
            v_QRn = v_QRn * function(self.eigenvalues)
        return {name: v_QRn.reshape(-1, *self._shape)}
