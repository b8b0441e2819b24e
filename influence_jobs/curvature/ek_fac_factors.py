"""The factors of EK-FAC: the blocks of some parameters, in memory together and on disk."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from influence_jobs.curvature.ek_fac_blocks import MOST_SIDE, Block, MatrixBlock, VectorBlock
from influence_jobs.curvature.matrices import GaussNewton
from influence_jobs.curvature.output_gradients import OutputGradients
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.transfers import numbers

GROUP_BYTES = 2**29  # of the factors that are in memory together, if one layer has not more


class SavedFactors(Protocol):
    """Keeps the state of finished blocks, by name."""

    def read(self, name: str) -> Any:
        """What was kept; None if there is none, or it is damaged."""

    def write(self, name: str, state: Any) -> None:
        """Keep a state: tensors, numbers and plain containers."""


def likely_bytes(parameters: Mapping[str, Tensor]) -> int:
    """Of the factors in memory, if every parameter of two axes or more is a matrix."""
    each = [0]
    for value in parameters.values():
        if value.ndim > 1:
            rows, columns = len(value), value[0].numel() + 1
            squares = [side**2 for side in (rows, columns) if side <= MOST_SIDE]
            each.append(value.element_size() * (rows * columns + sum(squares)))
    return min(sum(each), max(GROUP_BYTES, *each))


def groups_of(blocks: Iterable[Block]) -> list[list[str]]:
    """Names of the parameters of some blocks, in groups of at most `GROUP_BYTES`, in order."""
    groups, taken = list[list[str]](), 0
    for block in blocks:
        if not groups or taken + block.num_bytes > GROUP_BYTES:
            groups.append([])
            taken = 0
        groups[-1] += block.names
        taken += block.num_bytes
    return groups


@dataclass
class Factors:
    """The blocks of a Gauss-Newton matrix.

    Attributes:
        blocks: By layer, or by parameter.
        exact: Whether the columns are all of the loss's Hessian.
        columns: The most columns that a batch had.
    """

    blocks: Mapping[str, Block]
    exact: bool
    columns: int = 0

    def add(
        self, engine: OutputGradients, sweep: int, batch: tuple[Any, Tensor], *, inputs: bool
    ) -> None:
        """Add a batch in one of the two sweeps; `inputs` if these samples are new in it."""

        def on_rows(layer: str, x: Tensor, g: Tensor) -> None:
            block = self.blocks[layer]
            assert isinstance(block, MatrixBlock)
            if sweep == 0:
                block.add_moments(x, g, inputs=inputs)
            else:
                block.add_squares(x, g, inputs=inputs)

        def on_gradients(parameter: str, gradients: Tensor) -> None:
            block = self.blocks[parameter]
            assert isinstance(block, VectorBlock)
            if sweep == 0:
                block.add(gradients)

        with torch.no_grad():
            engine.visit(batch, on_rows, on_gradients)

    def diagonalise(self) -> bool:
        """End the first sweep. False: a moment is not finite.

        A GPU is waited for once, and for each eigenbasis.
        """
        diagonals = [d for block in self.blocks.values() for d in block.diagonals()]
        found = numbers(
            [diagonal.isfinite().all() for diagonal in diagonals]
            + [(diagonal > 0).sum() for diagonal in diagonals]
        )
        if not all(found[: len(diagonals)]):
            return False
        live = iter(found[len(diagonals) :])
        for block in self.blocks.values():
            block.diagonalise([int(next(live)) for _ in block.diagonals()])
        return True

    def times(
        self, space: ParameterSpace, v_QP: Tensor, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A function of the matrix, given as one of its eigenvalues, times every row, (Q, P)."""
        found = dict(self.times_parts(space.split(v_QP), function))
        return space.join(found).to(v_QP.dtype)

    def times_parts(
        self, vectors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same for the parameters of these blocks, {name: (Q, *shape)}, one after the other."""
        for block in self.blocks.values():
            yield from block.times({name: vectors[name] for name in block.names}, function).items()

    def write(self, saved: SavedFactors) -> None:
        """Keep the finished blocks, each by itself."""
        for name, block in self.blocks.items():
            saved.write(name, {**block.state(), "exact": self.exact, "columns": self.columns})

    def read(self, saved: SavedFactors) -> bool:
        """Take what was kept of these blocks; False if that is not all of them."""
        for name, block in self.blocks.items():
            state = saved.read(name)
            if state is None or state["exact"] != self.exact:
                return False
            block.restore(state)
            self.columns = max(self.columns, state["columns"])
        return True

    def largest(self) -> float:
        """The largest eigenvalue of all blocks."""
        return max(numbers(block.eigenvalues.max() for block in self.blocks.values()))

    @property
    def coarse(self) -> list[str]:
        """The first parameter of each block that is coarser than a user may expect."""
        return [block.names[0] for block in self.blocks.values() if block.coarse]


def coarse_lines(names: Sequence[str]) -> list[str]:
    """What is to be said of the blocks of these parameters, in lines."""
    if not names:
        return []
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    line = (
        "these parameters have no Kronecker factors and are too large for a whole block, so their "
        f"curvature is taken row by row or as a diagonal: {', '.join(names[:6])}{more}"
    )
    return [line]


def blocks_of(
    engine: OutputGradients, operator: GaussNewton, device: torch.device
) -> dict[str, Block]:
    """Empty blocks for the parameters of an operator, by layer or parameter."""
    parameters = operator.space.parameters()
    dtypes = {parameter.dtype for parameter in parameters.values()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    matrices: dict[str, Block] = {
        layer: MatrixBlock(
            rule,
            engine.names[layer],
            complete=len(engine.names[layer]) == 1 + (rule.bias is not None),
            dtype=dtype,
            device=device,
        )
        for layer, rule in engine.matrices.items()
    }
    return matrices | {
        name: VectorBlock(name, parameters[name].shape, device, dtype) for name in engine.others
    }
