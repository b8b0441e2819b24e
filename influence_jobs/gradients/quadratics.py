"""Quadratic forms of every sample's gradient, layer by layer: its squared length in a chosen metric.

Relative influence divides a score by the length of the sample's gradient, or of its influence on the
parameters: Barshan, Brunet, Dziugaite: "RelatIF: Identifying Explanatory Training Samples via
Relative Influence", AISTATS 2020. With a curvature that is diagonal in a Kronecker-factored
eigenbasis (George et al.: "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis", NeurIPS 2018) both lengths are square roots of such forms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import layers
from influence_jobs.gradients.dot_rules import in_blocks
from influence_jobs.gradients.requirements import find_layer
from influence_jobs.gradients.rules import kernel_norms
from influence_jobs.gradients.taps import TappedModel
from influence_jobs.terms import Precision

_KINDS = (
    nn.Linear,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
)


@dataclass(frozen=True)
class Metric:
    """A quadratic form of a Linear or Conv2d layer's gradient, diagonal in a Kronecker eigenbasis.

    With G (C, J) the gradient by [weight, bias] - the weight flattened over (I, kh, kw), the bias
    its last column if the layer has one - the form is sum_cj D_cj (U^T G V)_cj^2.

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


class GradQuadratics(TappedModel):
    """A quadratic form of every sample's gradient by each of some layers.

    Linear layers that are called with one vector a sample are done in closed form,
    (g U)^2 D ((a V)^2)^T; of the others the gradients of one layer and a block of samples are formed.

    The model's parameters have `requires_grad` off until `close`.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`.
        metrics: {layer: its metric}, None for the squared L2 norm of the gradient by weight and
            bias. A metric is for Linear and Conv2d; None is for BatchNorm1d, BatchNorm2d, LayerNorm,
            GroupNorm and Embedding too. Each layer is called once in a forward, the batch as first axis.
        losses: (model, batch) to one loss per sample (B,), not averaged over the batch.
        precision: As for `GradNorms`.

    Raises:
        ModelError: A layer is missing or not supported, a metric does not fit its layer, or the
            model is in train mode.
    """

    _result = "quadratic forms"
    _relative_to = "twice the largest"  # as a square's relative error is twice its root's

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, Metric | None],
        losses: Callable[[nn.Module, Any], Tensor],
        *,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        found = {name: find_layer(model, name, self._dtype, _KINDS) for name in metrics}
        if not found:
            raise ModelError("no layer was named: name at least one")
        self._metrics = {
            name: self._fitting(name, found[name], metric) if metric else None
            for name, metric in metrics.items()
        }
        # A convolution's gradient is put together offset by offset, so V's rows are, too.
        self._ordered = {
            name: _offsets_first(found[name], metric) if metric else None
            for name, metric in self._metrics.items()
        }
        self._freeze()
        self._attach(found)

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """The forms of every sample of a batch.

        Returns:
            {layer: (B,)} in the order of `metrics`; float32, or float64 under precision float64.
            Not checked for NaN.

        Raises:
            ModelError: As a call of `GradNorms`.
        """
        forms: dict[str, Tensor] = {}

        def rule(name: str, module: nn.Module, a: Tensor, g: Tensor) -> None:
            metric = self._ordered[name]
            if metric is None:
                forms[name] = _squared_norms(module, a, g)
            elif isinstance(module, nn.Conv2d):
                forms[name] = _conv2d(module, metric, a, g)
            else:
                assert isinstance(module, nn.Linear)
                forms[name] = _linear(module, metric, a, g)

        self._run(batch, rule)
        return {name: forms[name] for name in self._layers}

    def _parameters(self) -> dict[str, Tensor]:
        return {
            f"{name}.{own}": parameter
            for name, module in self._layers.items()
            for own, parameter in module.named_parameters()
        }

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, metric in self._metrics.items():
            weight, bias = gradients[f"{name}.weight"], gradients.get(f"{name}.bias")
            if metric is None:
                form = weight.square().sum() + (0 if bias is None else bias.square().sum())
            else:
                columns = [weight.flatten(1)] + ([] if bias is None else [bias.unsqueeze(1)])
                form = metric(torch.cat(columns, dim=1))
            parts[name] = form.view(1), 2 * form.view(1)
        return parts

    def _fitting(self, name: str, module: nn.Module, metric: Metric) -> Metric:
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise ModelError(
                f"layer '{name}' ({type(module).__name__}) has no Kronecker eigenbasis: only Linear "
                "and Conv2d have; give None for its squared gradient norm"
            )
        outputs = len(module.weight)
        inputs = module.weight[0].numel() + (module.bias is not None)
        parts = metric.outputs_CC, metric.inputs_JJ, metric.weights_CJ
        wanted = [(outputs, outputs), (inputs, inputs), (outputs, inputs)]
        if [tuple(part.shape) for part in parts] != wanted:
            raise ModelError(
                f"layer '{name}': a metric of shapes {[tuple(part.shape) for part in parts]} does "
                f"not fit, {wanted} is needed; was it made for another layer?"
            )
        if not all(part.isfinite().all() for part in parts) or (metric.weights_CJ < 0).any():
            raise ModelError(f"layer '{name}': its metric has NaN, infinity or negative weights")
        return Metric(*(part.to(self._device, self._dtype) for part in parts))


def _linear(module: nn.Linear, metric: Metric, a: Tensor, g: Tensor) -> Tensor:
    v_JJ, d_CJ = metric.inputs_JJ, metric.weights_CJ
    inputs = a @ v_JJ if module.bias is None else F.linear(a, v_JJ[:-1].t(), v_JJ[-1])
    outputs = g @ metric.outputs_CC
    if a.ndim == 2:
        return (outputs.square() @ d_CJ).mul_(inputs.square()).sum(1)

    def forms(inputs: Tensor, outputs: Tensor) -> Tensor:
        return layers.linear_weight(inputs, outputs).square_().flatten(1) @ d_CJ.flatten()

    return in_blocks(forms, inputs, outputs, d_CJ.numel())


def _conv2d(module: nn.Conv2d, metric: Metric, a: Tensor, g: Tensor) -> Tensor:
    def forms(a: Tensor, g: Tensor) -> Tensor:
        pieces = {(y, x): piece for y, x, piece in layers.conv2d_weight(module, a, g)}
        columns = [pieces[offset].flatten(1, 2) for offset in sorted(pieces)]
        if module.bias is not None:
            columns.append(layers.channel_sums(module, g).unsqueeze(2))
        rotated_BCJ = metric.outputs_CC.t() @ (torch.cat(columns, dim=2) @ metric.inputs_JJ)
        return rotated_BCJ.square_().flatten(1) @ metric.weights_CJ.flatten()

    return in_blocks(forms, a, g, metric.weights_CJ.numel())


def _squared_norms(module: Any, a: Tensor, g: Tensor) -> Tensor:
    def squares(a: Tensor, g: Tensor) -> Tensor:
        if isinstance(module, layers.Affine):
            return layers.affine_weight(module, a, g).square().sum(1)
        return kernel_norms(module, a, g).flatten(1).square().sum(1)

    forms_B = in_blocks(squares, a, g, module.weight.numel())
    if getattr(module, "bias", None) is not None:
        forms_B += layers.channel_sums(module, g).square().sum(1)
    return forms_B


def _offsets_first(module: nn.Module, metric: Metric) -> Metric:
    if not isinstance(module, nn.Conv2d):
        return metric
    numbers = module.weight[0].numel()
    weight_rows, bias_rows = metric.inputs_JJ[:numbers], metric.inputs_JJ[numbers:]
    rows_IkJ = weight_rows.reshape(module.weight.shape[1], -1, weight_rows.shape[1])
    ordered = torch.cat([rows_IkJ.transpose(0, 1).flatten(0, 1), bias_rows])
    return Metric(metric.outputs_CC, ordered, metric.weights_CJ)
