"""Steps of LiSSA's recursion h <- v + (1 - d) h - A_B h / s, for any model.

Letters: E repeats side by side, each with mini-batches of its own, Q vectors, S steps, B samples of
a mini-batch, P parameters.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from influence_jobs.curvature.operators import Operator


class LissaSteps(ABC):
    """E repeats of the recursion for Q vectors v, which start at h = v.

    Attributes:
        longest: The largest number of steps of a block.
    """

    longest: int

    @abstractmethod
    def blocks(self, ids: Iterable[Tensor], total_EQP: Tensor | None = None) -> Iterator[int]:
        """Take one block of steps after the other; a GPU's samples come in advance.

        Args:
            ids: The mini-batches (E, S, B) of each block.
            total_EQP: Receives the sum of all h.

        Yields:
            S, once a block is done.
        """

    def take(self, ids_ESB: Tensor, total_EQP: Tensor | None = None) -> None:
        """Take one block of steps."""
        for _ in self.blocks([ids_ESB], total_EQP):
            pass

    @abstractmethod
    def h_EQP(self) -> Tensor:
        """The current h."""

    @abstractmethod
    def lengths(self) -> Tensor:
        """Lengths (E, Q) of h."""


def lissa_steps(
    operator: Operator,
    rhs_QP: Tensor,
    own_damping: float,
    scale: float,
    batch_size: int,
    repeats: int = 1,
) -> LissaSteps:
    """The fastest steps for the operator's model; all give the same h up to rounding.

    Args:
        operator: A.
        rhs_QP: v.
        own_damping: d, the recursion's own damping.
        scale: s.
        batch_size: B.
        repeats: E.
    """
    # The only use of `perceptrons` in `curvature`. Imported late: that package imports this one.
    from influence_jobs.perceptrons.lissa import perceptron_lissa_steps

    if faster := perceptron_lissa_steps(operator, rhs_QP, own_damping, scale, batch_size, repeats):
        return faster
    return AnySteps(operator, rhs_QP, own_damping, scale, repeats)


class AnySteps(LissaSteps):
    """Each step is one product of the operator, for all repeats together."""

    longest = 16  # steps between two checks for divergence

    def __init__(
        self, operator: Operator, rhs_QP: Tensor, own_damping: float, scale: float, repeats: int = 1
    ):
        self._operator, self._decay, self._scale = operator, 1 - own_damping, scale
        self._h_EQP = rhs_QP.repeat(repeats, 1, 1)
        self._h, self._v = operator.space.split(self._h_EQP), operator.space.split(rhs_QP)

    def blocks(self, ids: Iterable[Tensor], total_EQP: Tensor | None = None) -> Iterator[int]:
        sizes: deque[int] = deque()  # steps of the blocks that are begun

        def steps() -> Iterator[Tensor]:
            for ids_ESB in ids:
                sizes.append(ids_ESB.shape[1])
                yield from ids_ESB.unbind(1)

        taken = 0
        for products in self._operator.products_in_turn(self._h_EQP, steps()):
            for name, h in self._h.items():  # joined vectors would take one more pass over memory
                torch.add(self._v[name], h, alpha=self._decay, out=h)
                h.add_(products[name], alpha=-1 / self._scale)
            if total_EQP is not None:
                total_EQP += self._h_EQP
            taken += 1
            if taken == sizes[0]:
                yield sizes.popleft()
                taken = 0

    def h_EQP(self) -> Tensor:
        return self._h_EQP

    def lengths(self) -> Tensor:
        lengths_EQ: Tensor = torch.linalg.vector_norm(self._h_EQP, dim=2)
        return lengths_EQ
