"""Quadratic forms of every sample's gradient, layer by layer: its squared length in some metric.

Relative influence divides a score by the length of the sample's gradient, or by the length of its
influence on the parameters (Barshan, Brunet, Dziugaite: "RelatIF: Identifying Explanatory Training
Examples via Relative Influence", AISTATS 2020). If the curvature is diagonal in a
Kronecker-factored eigenbasis (George et al.: "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", NeurIPS 2018), both lengths are square roots of such forms.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.metric import Metric
from influence_jobs.gradients.requirements import find_rule
from influence_jobs.gradients.rules import LayerRule, MatrixRule, matrix_layers
from influence_jobs.gradients.taps import TappedModel
from influence_jobs.terms import Precision


class GradQuadratics(TappedModel):
    """Quadratic forms of every sample's gradient by the parameters of chosen layers.

    The model's parameters have `requires_grad` off until `close`.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`; for
            `bfloat16` of either float32 or bfloat16.
        metrics: {layer: its metric}; None means the squared L2 norm of the gradient by weight and
            bias. A metric needs a layer whose rule is a `MatrixRule`; None needs any rule. Each
            layer is called once in a forward pass, with the batch as first axis.
        losses: (model, batch) to one loss per sample (B,), not averaged over the batch.
        precision: As for `GradNorms`.

    Raises:
        ModelError: A layer is missing or not supported, a metric does not fit its layer, or the
            model is in train mode.
    """

    _result = "quadratic forms"
    _relative_to = "twice the largest"  # squaring doubles a relative error

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, Metric | None],
        losses: Callable[[nn.Module, Any], Tensor],
        *,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        found = {name: find_rule(model, name, self._weight_dtypes) for name in metrics}
        if not found:
            raise ModelError("no layer was named: name at least one")
        self._metrics = {
            name: self._fitting(name, found[name], metric) if metric else None
            for name, metric in metrics.items()
        }
        self._arranged = {
            name: rule.arrange_metric(metric)
            for name, metric in self._metrics.items()
            if metric and isinstance(rule := found[name], MatrixRule)
        }
        self._freeze()
        self._attach(found)
        self._looked = False

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """The forms of every sample of a batch.

        Returns:
            Forms (B,) by layer in the order of `metrics`, with the dtype of the weights. They are
            not checked for NaN.

        Raises:
            ModelError: As a call of `GradNorms`.
        """
        if not self._looked:
            self._require_plain(batch)
            self._looked = True
        forms: dict[str, Tensor] = {}

        def visit(name: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            if isinstance(rule, MatrixRule) and name in self._arranged:
                forms[name] = rule.quadratic(self._arranged[name], a, g)
            else:
                forms[name] = rule.squared_norms(a, g)

        self._run(batch, visit)
        return {name: forms[name] for name in self._layers}

    def _require_plain(self, batch: Any) -> None:
        """Refuse layers whose rule does not hold, as the first batch shows."""
        plain = self.plain_layers(batch)
        for name in self._layers:
            if name not in plain:
                raise ModelError(
                    f"layer '{name}' has no {self._result}, because its weights are not used in "
                    "one call of it alone, or because the first axis of its output is not the "
                    "sample: leave the layer out, or leave --relative out"
                )

    def plain_layers(self, batch: Any) -> tuple[str, ...]:
        """The layers that have quadratic forms, as a batch of two samples or more shows them."""
        modules = {name: rule.module for name, rule in self._layers.items()}
        usage = self._usage(batch, modules)
        return tuple(n for n, module in modules.items() if usage.plain(n, module.parameters()))

    def _may_repeat(self, name: str) -> bool:
        return False

    def _parameters(self) -> dict[str, Tensor]:
        return {
            f"{name}.{own}": parameter
            for name, rule in self._layers.items()
            for own, parameter in rule.module.named_parameters()
        }

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, metric in self._metrics.items():
            weight, bias = gradients[f"{name}.weight"], gradients.get(f"{name}.bias")
            if metric is None:
                form = weight.square().sum() + (0 if bias is None else bias.square().sum())
            else:
                matrix_CJ = self._layers[name].as_matrix(weight.unsqueeze(0))[0]
                columns = [matrix_CJ] + ([] if bias is None else [bias.unsqueeze(1)])
                form = metric(torch.cat(columns, dim=1))
            parts[name] = form.view(1), 2 * form.view(1)
        return parts

    def _fitting(self, name: str, rule: LayerRule[Any], metric: Metric) -> Metric:
        if not isinstance(rule, MatrixRule):
            raise ModelError(
                f"layer '{name}' ({type(rule.module).__name__}) has no Kronecker eigenbasis: only "
                f"{matrix_layers()} have one; give None for its squared gradient norm"
            )
        outputs, *axes = rule.kernel_shape
        inputs = math.prod(axes) + (rule.bias is not None)
        parts = metric.outputs_CC, metric.inputs_JJ, metric.weights_CJ
        wanted = [(outputs, outputs), (inputs, inputs), (outputs, inputs)]
        if [tuple(part.shape) for part in parts] != wanted:
            raise ModelError(
                f"layer '{name}': a metric of shapes {[tuple(part.shape) for part in parts]} does "
                f"not fit, {wanted} are needed; was it made for another layer?"
            )
        if not all(part.isfinite().all() for part in parts) or (metric.weights_CJ < 0).any():
            raise ModelError(f"layer '{name}': its metric has NaN, infinity or negative weights")
        return Metric(*(part.to(self._device, self._dtype) for part in parts))
