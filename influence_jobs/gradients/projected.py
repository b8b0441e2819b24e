"""Random projections of every sample's loss gradient, without forming the gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.gradients.dots import SMALLEST_PART
from influence_jobs.gradients.fallback import Fallback, Form
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.projections import Projection, together
from influence_jobs.gradients.requirements import (
    require_dtype,
    require_independent_samples,
    require_plain,
)
from influence_jobs.gradients.routes import holders, why_not_by_rules
from influence_jobs.gradients.rules import LayerRule, rule_of
from influence_jobs.gradients.taps import TappedModel
from influence_jobs.gradients.weights import ancestors
from influence_jobs.terms import Precision


class GradProjections(TappedModel):
    """Random projections of every sample's gradient, from one forward and one backward pass.

    A layer may be called several times, and several layers may share a weight: the projection is
    linear, so that the uses add up. Parameters that no rule serves go by a `Fallback`.

    The model's parameters have `requires_grad` off until `close`; weights may be loaded between
    calls.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`; for
            `bfloat16` of either float32 or bfloat16.
        space: The parameters of this model that the gradients are by.
        losses: (model, batch) to one loss per sample (B,), not averaged over the batch.
            `batches` says what a batch may be.
        projections: By group and full name of a parameter; see `projections.projections`.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); projections
            are always accumulated in float32.

    Attributes:
        losses_B: The losses of the batch of the last call.

    Raises:
        ModelError: A parameter has another dtype, or the model is in train mode or uses batch
            statistics.
    """

    _result = "projected gradients"
    _relative_to = "their largest"

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        losses: Callable[[nn.Module, Any], Tensor],
        projections: Mapping[str, Mapping[str, Projection]],
        *,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        self._space = space = space.of(model)
        for name, parameter in space.parameters().items():
            module = name.rpartition(".")[0]
            require_dtype(module, parameter, self._weight_dtypes)
            require_plain(module, model.get_submodule(module))
        self._groups = {
            group: {name: p.to(self._device, self._dtype) for name, p in of_group.items()}
            for group, of_group in projections.items()
        }
        self._projections = {
            n: p for of_group in self._groups.values() for n, p in of_group.items()
        }
        self._ruled: dict[str, dict[str, str]] = {}  # by layer, {weight or bias: its full name}
        self._reasons: dict[str, str] = {}
        self._fallback: Fallback | None = None
        self._seen: Tensor | None = None
        self.losses_B = torch.zeros(0)
        self._freeze()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Projections of every sample of a batch.

        Args:
            batch: A batch for `losses`.

        Returns:
            {group: (B, D)} with the dtype of the weights. They are not checked for NaN.

        Raises:
            ModelError: A layer is not reached by the gradient, or its input was overwritten; the
                losses are not (B,); the model is used in another way than in the first batch.
        """
        fallback = self._routed(batch)
        sums: dict[str, Tensor] = {}

        def add(name: str, projected_BKI: Tensor) -> None:
            sums[name] = sums[name] + projected_BKI if name in sums else projected_BKI

        def visit(layer: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            for own, name in self._ruled[layer].items():
                projection = self._projections[name]
                if own == "bias":
                    add(name, projection(rule.bias_gradient(g)))
                elif projection.rule is None:
                    add(name, projection(rule.weight_gradient(a, g)))
                else:
                    add(name, rule.projected(projection.left_CK, projection.right_JI, a, g))

        with torch.autocast(self._device.type, enabled=False):
            self._seen = None
            recorded = fallback.calls(batch)
            if self._layers or recorded:
                size = self._run(batch, visit, recorded)
            else:
                with torch.no_grad():
                    size = len(self._forward(batch))
            assert self._seen is not None
            self.losses_B = self._seen
            pieces: dict[str, list[Tensor]] = {}
            for found in fallback.gradients(batch, size):
                for name, gradients in found.items():
                    projected = self._projections[name](gradients.to(self._dtype))
                    pieces.setdefault(name, []).append(projected)
        sums |= {name: torch.cat(parts) for name, parts in pieces.items()}
        return {group: together(of_group, sums) for group, of_group in self._groups.items()}

    def slow_layers(self, batch: Any) -> dict[str, tuple[Form, str]]:
        """The parameters that no rule serves: by which form of `Fallback` each goes, and why.

        Args:
            batch: Of two samples or more.
        """
        fallback = self._routed(batch)
        return {name: (fallback.forms[name], why) for name, why in self._reasons.items()}

    def _forward(self, batch: Any, *, mixed: bool = True) -> Tensor:
        losses = super()._forward(batch, mixed=mixed)
        if self._seen is None:  # later passes of a call are of single samples
            self._seen = losses.detach()
        return losses

    def _routed(self, batch: Any) -> Fallback:
        """How each parameter is served, as the first batch of several samples shows."""
        if self._fallback is not None:
            return self._fallback
        require_independent_samples(self._model)
        modules, parameters = dict(self._model.named_modules()), self._space.parameters()
        held = holders(self._model, parameters)
        homes = {name: [home for home in ancestors(name) if home in modules] for name in parameters}
        watched = {home for of in homes.values() for home in of} | {
            layer for of in held.values() for layer, _ in of
        }
        usage = self._usage(batch, {name: modules[name] for name in watched})
        self._ruled, self._reasons = {}, {}
        for name, parameter in parameters.items():
            if reason := why_not_by_rules(parameter, held[name], modules, usage):
                self._reasons[name] = reason
                continue
            for layer, own in held[name]:
                self._ruled.setdefault(layer, {})[own] = name
        self._attach({layer: rule_of(modules[layer]) for layer in self._ruled})
        slow = list(self._reasons)
        fallback = self._fallback_of(slow)
        if slow and usage.size == 1:  # it does not show the forms: the next batch decides
            return fallback
        if slow:
            within = {
                name: [home for home in homes[name] if usage.within(parameters[name], home)]
                for name in slow
                # A layer that shares it and is not called yet may be later.
                if len(held[name]) == 1 or all(usage.calls(layer) for layer, _ in held[name])
            }
            fallback.find_forms(batch, usage.size, within)
        self._fallback = fallback
        return fallback

    def _parameters(self) -> dict[str, Tensor]:
        return self._space.parameters()

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {
            group: together(of_group, {n: p(gradients[n][None]) for n, p in of_group.items()})
            for group, of_group in self._groups.items()
        }
        largest = {group: projected.abs().max() for group, projected in found.items()}
        # The gradient by a bias of attention's keys is zero but for rounding, which other
        # parameters' gradients are the measure of.
        floor = SMALLEST_PART * torch.stack([*largest.values()]).max()
        return {
            group: (projected, largest[group].maximum(floor).expand_as(projected))
            for group, projected in found.items()
        }
