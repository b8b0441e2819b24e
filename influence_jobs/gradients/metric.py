"""The quadratic form of a layer's gradient that relative influence measures it by."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A quadratic form of a matrix layer's gradient, diagonal in a Kronecker eigenbasis.

    With G (C, J) the gradient by [weight, bias] - the weight flattened over all axes but its first,
    the bias its last column if the layer has one - the form is sum_cj D_cj (U^T G V)_cj^2.

    Attributes:
        outputs_CC: U, as columns the eigenvectors of the output gradients' second moment.
        inputs_JJ: V, as columns those of the inputs' second moment, with a one for the bias.
        weights_CJ: D, none negative.
    """

    outputs_CC: Tensor
    inputs_JJ: Tensor
    weights_CJ: Tensor

    def __call__(self, gradient_CJ: Tensor) -> Tensor:
        """The form of one gradient."""
        rotated_CJ = self.outputs_CC.t() @ gradient_CJ @ self.inputs_JJ
        return (self.weights_CJ * rotated_CJ.square()).sum()
