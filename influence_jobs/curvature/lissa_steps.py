"""Steps of LiSSA's recursion h <- v + (1 - d) h - A_B h / s, for any model.

Letters: E repeats side by side, each with mini-batches of its own, Q vectors, S steps, B samples of
a mini-batch, P parameters.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from influence_jobs.curvature.operators import Operator


class LissaSteps(ABC):
    """E repeats of the recursion for Q vectors v, which start at h = v.

    Attributes:
        longest: The largest number of steps per call of `take`.
    """

    longest: int

    @abstractmethod
    def take(self, ids_ESB: Tensor, total_EQP: Tensor | None = None) -> None:
        """Take S steps of every repeat on these mini-batches, and add each h to a total."""

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

    def take(self, ids_ESB: Tensor, total_EQP: Tensor | None = None) -> None:
        for ids_EB in ids_ESB.unbind(1):
            products = self._operator.products(self._h_EQP, ids_EB)
            for name, h in self._h.items():  # joined vectors would take one more pass over memory
                torch.add(self._v[name], h, alpha=self._decay, out=h)
                h.add_(products[name], alpha=-1 / self._scale)
            if total_EQP is not None:
                total_EQP += self._h_EQP

    def h_EQP(self) -> Tensor:
        return self._h_EQP

    def lengths(self) -> Tensor:
        lengths_EQ: Tensor = torch.linalg.vector_norm(self._h_EQP, dim=2)
        return lengths_EQ
