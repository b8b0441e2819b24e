"""Indexes of stored projected gradients."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.gram.spec import GramSpec
from influence_jobs.specs.base import Spec
from influence_jobs.terms import GradientMethod

#: Part of the mean eigenvalue that is added to a layer's second moments.
DAMPING: dict[GradientMethod, float] = {"influence": 0.1, "trak": 0.1}
TOP = 100  # samples of which the recall is measured


class GradientIndexSpec(Spec):
    """A faiss index, in which the samples of largest score for a query are found at once.

    The vectors in it have the scores as dot products: see `vectors`.

    Attributes:
        gradients: The store.
        method, damping: As those of gradient scores.
    """

    kind: Literal["gradient-index"] = "gradient-index"
    gradients: GradientsSpec
    method: GradientMethod = "influence"
    damping: Annotated[float, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def _normalise(self) -> Self:
        if self.method not in DAMPING:
            object.__setattr__(self, "damping", 0.0)
        return self

    @property
    def gram(self) -> GramSpec | None:
        """The second moments that the method divides by."""
        return gram_of(self.gradients, self.method)


def gram_of(store: GradientsSpec, method: GradientMethod) -> GramSpec | None:
    """The second moments of a store that a method divides by; None if it divides by none."""
    if method not in DAMPING:
        return None
    quantity = "margin" if method == "trak" else "loss"
    return GramSpec(task=store.task, gradients=store, quantity=quantity)
