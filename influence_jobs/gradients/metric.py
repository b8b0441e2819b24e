"""The quadratic form that measures a layer's gradient in relative influence."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A quadratic form of a matrix layer's gradient, diagonal in a Kronecker eigenbasis.

    Let G (C, J) be the gradient by [weight, bias]: the weight is flattened over all axes except the
    first, and the bias, if there is one, is the last column. The form is
    sum_cj D_cj (U^T G V)_cj^2.

    Attributes:
        outputs_CC: U. Its columns are eigenvectors of the second moment of the output gradients.
        inputs_JJ: V. Its columns are eigenvectors of the second moment of the inputs, with a one
            appended for the bias.
        weights_CJ: D, not negative.
    """

    outputs_CC: Tensor
    inputs_JJ: Tensor
    weights_CJ: Tensor

    def __call__(self, gradient_CJ: Tensor) -> Tensor:
        """The value of the form for one gradient."""
        rotated_CJ = self.outputs_CC.t() @ gradient_CJ @ self.inputs_JJ
        return (self.weights_CJ * rotated_CJ.square()).sum()
