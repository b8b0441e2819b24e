"""Second moments of projected gradients."""

from typing import Literal

from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.specs.base import Spec


class GramSpec(Spec):
    """The mean of g g^T over the rows g of a store of projected gradients, for every layer.

    Attributes:
        gradients: The store.
        quantity: What g is the gradient of: the `loss`, or the `margin` log(p / (1 - p)) of the
            right class, whose gradient is the loss's divided by p - 1 (TRAK).
    """

    kind: Literal["gram"] = "gram"
    gradients: GradientsSpec
    quantity: Literal["loss", "margin"] = "loss"
