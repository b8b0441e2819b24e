"""Rules of layers that transformers defines, which need not be installed."""

from torch import Tensor, nn

from influence_jobs.gradients.rules.base import LayerRule, product_of_rows


class Conv1DRule(LayerRule[nn.Module]):
    """GPT-2's Linear of transformers, whose weight is stored as (I, C)."""

    layer_named = "transformers.pytorch_utils.Conv1D"
    numbered = True

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        inputs, outputs = self.weight.shape
        return outputs, inputs, 1, 1

    def as_read(self, gradient: Tensor) -> Tensor:
        return gradient.transpose(1, 2)[..., None, None]

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        inputs, outputs = self.weight.shape
        g_BTC = g.reshape(len(g), -1, outputs)
        return product_of_rows(g_BTC, a.reshape(len(a), -1, inputs))

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), -1, g.shape[-1]).sum(1)
