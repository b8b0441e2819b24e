"""Rules of layers that transformers defines, which need not be installed."""

from torch import Tensor, nn

from influence_jobs.gradients.rules.base import MatrixRule


class Conv1DRule(MatrixRule[nn.Module]):
    """GPT-2's Linear of transformers, whose weight is stored as (I, C)."""

    layer_named = "transformers.pytorch_utils.Conv1D"

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        inputs, outputs = self.weight.shape
        return outputs, inputs, 1, 1

    def as_read(self, gradient: Tensor) -> Tensor:
        return gradient.transpose(1, 2)[..., None, None]

    def from_matrix(self, matrices: Tensor) -> Tensor:
        return matrices.transpose(1, 2)

    def input_rows(self, a: Tensor) -> Tensor:
        return a.reshape(len(a), -1, a.shape[-1])

    def output_rows(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), -1, g.shape[-1])
