"""Per-sample gradient norms of chosen layers from one forward and one truncated backward pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.fallback import Fallback, Form
from influence_jobs.gradients.requirements import require_dtype, require_independent_samples
from influence_jobs.gradients.routes import Held, holders, why_not_by_rules
from influence_jobs.gradients.rules import LayerRule, rule_of
from influence_jobs.gradients.several_uses import Call, norms_of_calls
from influence_jobs.gradients.taps import TappedModel, unused
from influence_jobs.gradients.usage import Usage
from influence_jobs.gradients.weights import Weight, ancestors, weight_named
from influence_jobs.terms import Precision, Reduction

# Between these norms the squares in float32 are exact enough.
_SAFE = 2.0**-56, 2.0**60


class GradNorms(TappedModel):
    """Per-sample weight-gradient norms of chosen layers, from one forward and one backward pass.

    Let G_b `(C, I, *kernel)` be the gradient of sample b's loss by a layer's weight; the bias does
    not count. The reductions are: `kernel`, the L2 norm over I, `(B, C, *kernel)`; `channel`, the
    kernel norms summed over the kernel, (B, C); `layer`, the L2 norm of all of G_b, (B,). Losses
    must not be averaged over the batch: an average would scale every norm by 1/B.

    The model's parameters have `requires_grad` off until `close`. The engine leaves global settings
    alone; on CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`; for
            `bfloat16` of either float32 or bfloat16.
        layers: Names of layers with one weight, or full names of parameters; see `Weight`.
        losses: (model, batch) to one loss per sample (B,). `batches` says what a batch may be.
        reduction: See above.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); norms are
            always accumulated in float32.

    Raises:
        ModelError: A layer is missing or has no weight, or the model is in train mode.
    """

    _result = "norms"
    _relative_to = "the largest"

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        losses: Callable[[nn.Module, Any], Tensor],
        *,
        reduction: Reduction,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        self._reduction: Reduction = reduction
        self._weights = {name: weight_named(model, name) for name in layers}
        if not self._weights:
            raise ModelError("no layer was named: name at least one")
        for name, weight in self._weights.items():
            require_dtype(name, model.get_parameter(weight.parameter), self._weight_dtypes)
        self._fallback: Fallback | None = None
        self._reasons: dict[str, str] = {}  # of the layers that do not go by a rule
        # By weight with several uses, or bias, the layers whose calls they are.
        self._sharers: dict[str, list[Held]] = {}
        self._shared_layers: set[str] = set()
        self._by_rule: set[str] = set()
        self._ranged = False  # whether every layer's norms are watched; a batch had some to watch
        self._freeze()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Norms of every sample of a batch.

        Args:
            batch: A batch for `losses`.

        Returns:
            Norms by layer in the order of `layers`, `(B, C, *kernel)`, (B, C) or (B,), with the
            dtype of the weights. They are not checked for NaN.

        Raises:
            ModelError: A layer is not called, or not as in the first batch; it is not reached by
                the gradient, or its input was overwritten; the losses are not (B,); the model went
                into train mode.
        """
        found, right = self.unwatched(batch)
        if right is None or right:
            return found
        self._ranged = True
        return self._computed(batch)

    def unwatched(self, batch: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The norms without a look at their range, for which the program would wait for a GPU.

        Args:
            batch: A batch for `losses`.

        Returns:
            The norms as of a call, and a scalar that says whether they are right. If they are not,
            since squares left the range of float32, call the engine itself. None means that they
            are.

        Raises:
            ModelError: As a call.
        """
        found = self._computed(batch)
        if self._ranged or self._dtype == torch.float64:
            return found, None
        return found, _in_safe_range(found.values())

    def _computed(self, batch: Any) -> dict[str, Tensor]:
        fallback = self._routed(batch)
        norms: dict[str, Tensor] = {}
        calls: dict[str, list[Call]] = {layer: [] for layer in self._shared_layers}

        def visit(name: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            if name in calls:
                calls[name].append(Call(rule, a, g))
            if name in self._by_rule:
                norms[name] = self._watched(lambda g: rule.norms(a, g, self._reduction), g)

        with torch.autocast(self._device.type, enabled=False):
            recorded = fallback.calls(batch)
            if self._layers or recorded:
                size = self._run(batch, visit, recorded)
            else:
                size = fallback.size_of(batch)
            for name, layers in self._sharers.items():
                used_in = [call._replace(own=own) for layer, own in layers for call in calls[layer]]
                norms[name] = self._norms_of_calls(self._weights[name], used_in)
            pieces: dict[str, list[Tensor]] = {name: [] for name in self._weights}
            for found in fallback.gradients(batch, size):
                for name, weight in self._weights.items():
                    if name not in norms and weight.parameter in found:
                        gradient = found[weight.parameter].to(self._dtype)
                        pieces[name].append(self._norms_of(weight, gradient))
        return {
            name: norms[name] if name in norms else torch.cat(pieces[name])
            for name in self._weights
        }

    def slow_layers(self, batch: Any) -> dict[str, tuple[Form, str]]:
        """The layers that no rule serves: by which form of `Fallback` each goes, and why.

        Args:
            batch: Of two samples or more.

        Raises:
            ModelError: As a call.
        """
        fallback = self._routed(batch)
        return {
            name: (fallback.forms[self._weights[name].parameter], why)
            for name, why in self._reasons.items()
        }

    def _routed(self, batch: Any) -> Fallback:
        """Which layers go by their rule, and the fallback of the others, as the first batch shows.

        One sample does not show the forms: it goes by plain autograd, and the next batch decides.
        """
        if self._fallback is not None:
            return self._fallback
        require_independent_samples(self._model)
        modules = dict(self._model.named_modules())
        weights = self._weights.values()
        parameters = self._parameters()
        held = holders(self._model, parameters)
        homes = {
            w.parameter: [home for home in ancestors(w.parameter) if home in modules]
            for w in weights
        }
        names = {name for of in homes.values() for name in of} | {w.owner for w in weights}
        names |= {layer for of in held.values() for layer, _ in of}
        usage = self._usage(batch, {name: modules[name] for name in names})
        rules: dict[str, LayerRule[Any]] = {}
        for name, weight in self._weights.items():
            reason = self._why_not_by_rule(name, weight, usage)
            if reason is None and weight.rule is not None:
                rules[name] = weight.rule
            elif not why_not_by_rules(parameters[name], held[name], modules, usage):
                self._sharers[name] = held[name]
            elif reason is not None:
                self._reasons[name] = reason
        self._shared_layers = {layer for layers in self._sharers.values() for layer, _ in layers}
        self._by_rule = {*rules}
        rules |= {layer: rule_of(modules[layer]) for layer in self._shared_layers}
        self._attach(rules)
        slow = list(dict.fromkeys(self._weights[name].parameter for name in self._reasons))
        fallback = self._fallback_of(slow)
        if slow and usage.size == 1:
            return fallback
        if slow:
            # A holder that is not called yet may be later: no one layer has all uses.
            uncalled = {
                self._weights[name].parameter
                for name, of in held.items()
                if len(of) > 1 and not all(usage.calls(layer) for layer, _ in of)
            }
            within = {
                name: [
                    home
                    for home in homes[name]
                    if usage.within(self._model.get_parameter(name), home)
                ]
                for name in slow
                if name not in uncalled
            }
            fallback.find_forms(batch, usage.size, within)
        self._fallback = fallback
        return fallback

    def _why_not_by_rule(self, name: str, weight: Weight, usage: Usage) -> str | None:
        """What speaks against the rule; None if nothing does.

        Raises:
            ModelError: The losses do not depend on the weight.
        """
        parameter, owner = self._model.get_parameter(weight.parameter), weight.owner
        uses = usage.uses(parameter)
        if uses == 0:
            if usage.calls(owner) == 0:
                raise ModelError(f"layer '{name}' is not called in the forward pass: leave it out")
            raise unused(name)
        if weight.rule is None or not weight.ruled:
            kind = type(self._model.get_submodule(owner)).__name__
            return f"no rule for {weight.parameter.rpartition('.')[2]} of {kind}"
        if usage.plain(owner, [parameter]):
            return None
        if uses > 1:
            return f"its weight is used {uses} times in a forward"
        return "its rule is not for the way it is called, or it has the samples in another order"

    def _parameters(self) -> dict[str, Tensor]:
        return {
            name: self._model.get_parameter(weight.parameter)
            for name, weight in self._weights.items()
        }

    def _norms_of(self, weight: Weight, gradients: Tensor) -> Tensor:
        return self._watched(lambda g: weight.norms(g, self._reduction), gradients)

    def _norms_of_calls(self, weight: Weight, calls: Sequence[Call]) -> Tensor:
        if not self._ranged:
            return norms_of_calls(calls, weight, self._reduction)
        # Norms are linear in the calls' gradients together.
        sizes = [call.g[0].numel() for call in calls]
        together_BG = torch.cat([call.g.flatten(1) for call in calls], dim=1)

        def norms(together_BG: Tensor) -> Tensor:
            parts = torch.split(together_BG, sizes, dim=1)
            scaled = [
                call._replace(g=part.view_as(call.g))
                for call, part in zip(calls, parts, strict=True)
            ]
            return norms_of_calls(scaled, weight, self._reduction)

        return _in_range(norms, together_BG)

    def _may_repeat(self, name: str) -> bool:
        return name in self._shared_layers

    def _watched(self, norms: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        return _in_range(norms, g) if self._ranged else norms(g)

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight in self._weights.items():
            gradient = gradients[name].unsqueeze(0)
            norms = _in_range(partial(weight.norms, reduction=self._reduction), gradient)
            parts[name] = norms, norms.nan_to_num(nan=0, posinf=0).amax().expand_as(norms)
        return parts


def _in_safe_range(norms: Iterable[Tensor]) -> Tensor:
    """Whether each sample's largest norm of each layer is one whose squares are exact enough."""
    smallest, largest = _SAFE
    largest_LB = torch.stack([n if n.ndim == 1 else n.flatten(1).amax(1) for n in norms])
    least, most = largest_LB.aminmax()
    return (least >= smallest) & (most <= largest)  # not if one is NaN


def _in_range(norms: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
    """Norms as a function of gradients g, both (B, ...), also where squares leave float32's range.

    Norms are linear in g. Samples whose largest norm is out of range are computed once more from g
    times a power of two.
    """
    found = norms(g)
    if found.dtype == torch.float64 or _in_safe_range([found]):
        return found
    smallest, largest = _SAFE
    largest_B = found.flatten(1).amax(1) if found.ndim > 1 else found
    lost_B = ~((largest_B >= smallest) & (largest_B <= largest))
    size_B = torch.linalg.vector_norm(g.flatten(1), torch.inf, dim=1)
    lost_B &= (size_B > 0) & size_B.isfinite()  # gradients may well be zero
    if not lost_B.any():
        return found
    # In two steps: the inverse of a denormal number is out of range itself.
    half_B = torch.where(lost_B, -torch.frexp(size_B).exponent // 2, 0)
    for _ in range(2):
        g = torch.ldexp(g, _along(half_B, g))
    again = norms(g)
    for _ in range(2):
        again = torch.ldexp(again, _along(-half_B, again))
    return torch.where(_along(lost_B, found), again, found)


def _along(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *(1,) * (like.ndim - 1))
