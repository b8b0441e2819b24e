"""Dot products of vectors with every sample's loss gradient, without storing the gradients."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.batches import one_sample
from influence_jobs.gradients.fallback import Fallback
from influence_jobs.gradients.forward_mode import directional_derivatives
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.requirements import (
    require_dtype,
    require_independent_samples,
    require_plain,
)
from influence_jobs.gradients.routes import holders, why_not_by_rules
from influence_jobs.gradients.rules import LayerRule, rule_of
from influence_jobs.gradients.taps import TappedModel
from influence_jobs.memory import is_out_of_memory
from influence_jobs.terms import Precision

SMALLEST_PART = 1e-3  # of a product: rounding is not measured against smaller ones


class GradDots(TappedModel):
    """Dot products v_q . grad loss_b of Q vectors with every sample's loss gradient.

    The rule of a layer is used if its type has one, if every call of the layer has the batch as
    first axis, and if its parameters are used nowhere else but in layers that share them and have
    rules too. All other parameters - custom ones, attention, recurrent layers - are differentiated
    in forward mode, for all samples of a batch at once. If the model has an operation without a
    forward-mode derivative, plain autograd differentiates them sample by sample; this is slow and
    gives a warning. The first batch decides which parameters take which way.

    The model's parameters have `requires_grad` off until `close`; weights may be loaded between
    calls. On CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`; for
            `bfloat16` of either float32 or bfloat16.
        space: The parameters of this model that the gradients are by.
        losses: (model, batch) to one loss per sample (B,), not averaged over the batch.
            `batches` says what a batch may be.
        vectors_QP: The vectors in that space; copied to the device and dtype of the weights.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); products are
            accumulated in float32, but for parameters without a rule.

    Raises:
        ModelError: The vectors are not (Q, P) or not finite, a parameter has another dtype, or the
            model is in train mode or uses batch statistics.
    """

    _result = "dot products"
    _relative_to = "their size"

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        losses: Callable[[nn.Module, Any], Tensor],
        vectors_QP: Tensor,
        *,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        if vectors_QP.ndim != 2 or vectors_QP.shape[1] != space.size:
            raise ModelError(
                f"vectors of shape {tuple(vectors_QP.shape)} do not fit {type(model).__name__}: "
                f"(Q, {space.size}) is needed; were they made for other parameters?"
            )
        finite_Q = vectors_QP.isfinite().all(dim=1)
        if not finite_Q.all():
            raise ModelError(
                f"vector {int((~finite_Q).nonzero()[0])} holds NaN or infinity: compute it again"
            )
        self._space = space = space.of(model)  # which may have been made of a copy
        for name, parameter in space.parameters().items():
            module = name.rpartition(".")[0]
            require_dtype(module, parameter, self._weight_dtypes)
            require_plain(module, model.get_submodule(module))
        self._names = {group: names for group, names in space.groups.items() if names}
        self._fallback: Fallback | None = None
        self._vectors_QP = vectors_QP.detach().to(self._device, self._dtype)
        # By layer and group: the vectors of its parameters, as its rule reads them.
        self._ruled: dict[str, dict[str, dict[str, Tensor]]] | None = None
        self._by_rule: set[str] = set()
        self._why_not_forward = ""
        self._verified = False  # forward mode, by plain autograd
        self._freeze()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Dot products of every sample of a batch, by module.

        Args:
            batch: A batch for `losses`.

        Returns:
            Products (B, Q) by module, for all with parameters in the space. The sum over modules is
            v_q . grad loss_b; a shared parameter counts for its first module. The dtype is that of
            the weights. The result is not checked for NaN.

        Raises:
            ModelError: A layer with a rule is not called, is not reached by the
                gradient, or its input was overwritten; the losses are not (B,); the model is in
                train mode.
        """
        self._route(batch)
        parts = self._by_rules(batch)
        rest = [group for group in self._names if group not in parts]
        if found := self._in_forward_mode(batch, [[group] for group in rest]):
            parts |= dict(zip(rest, found, strict=True))
        elif rest:
            parts |= self._by_gradients(batch, rest)
        return {group: parts[group] for group in self._names}

    def total(self, batch: Any) -> Tensor:
        """Dot products of every sample of a batch, (B, Q), summed over modules.

        All parameters without a rule take one pass together.

        Raises:
            ModelError: As `__call__`.
        """
        self._route(batch)
        parts = list(self._by_rules(batch).values())
        rest = [group for group in self._names if group not in self._by_rule]
        if found := self._in_forward_mode(batch, [rest] if rest else []):
            parts += found
        elif rest:
            parts += self._by_gradients(batch, rest).values()
        total_BQ = parts[0]
        for part_BQ in parts[1:]:
            total_BQ += part_BQ
        return total_BQ

    def _parameters(self) -> dict[str, Tensor]:
        return self._space.parameters()

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        vectors = self._space.split(self._vectors_QP)
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for group, names in self._names.items():
            dots = square = torch.zeros((), dtype=self._dtype, device=self._device)
            for name in names:
                flat_P, sums = gradients[name].flatten(), list[Tensor]()
                for vector_P in _flat(vectors[name]):  # the terms of all would double the memory
                    terms_P = vector_P * flat_P
                    # In float64, where squares of small gradients do not vanish.
                    sums.append(torch.stack([terms_P.sum().double(), terms_P.double().norm() ** 2]))
                dots = dots + torch.stack(sums)[:, 0].to(self._dtype)
                square = square + torch.stack(sums)[:, 1]
            # Terms may cancel, so rounding is relative to the root of their sum of squares.
            parts[group] = dots.unsqueeze(0), square.sqrt().unsqueeze(0)
        # The gradient by a bias of attention's keys is zero but for rounding, which other
        # parameters' gradients are the measure of.
        total = torch.stack([scale for _, scale in parts.values()]).norm(dim=0)
        return {
            group: (dots, torch.maximum(scale, SMALLEST_PART * total))
            for group, (dots, scale) in parts.items()
        }

    def _by_rules(self, batch: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        ruled = self._ruled
        assert ruled is not None

        def visit(layer: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            for group, vectors in ruled[layer].items():
                part_BQ = rule.dots(vectors, a, g)
                parts[group] = parts[group] + part_BQ if group in parts else part_BQ

        if self._layers:
            self._run(batch, visit)
        return parts

    def _in_forward_mode(self, batch: Any, several: Sequence[Sequence[str]]) -> list[Tensor] | None:
        """The products (B, Q) of some groups together, of others together; None if it fails."""
        if not several or self._fallback is not None:
            return None
        require_independent_samples(self._model)
        split, parameters = self._space.split(self._vectors_QP), self._space.parameters()
        found = []
        try:
            with torch.autocast(self._device.type, enabled=False):
                for groups in several:
                    names = [name for group in groups for name in self._names[group]]
                    dots_BQ = directional_derivatives(
                        self._model,
                        lambda _, batch: self._forward(batch),
                        batch,
                        {name: split[name].to(parameters[name].dtype) for name in names},
                    )
                    found.append(dots_BQ.to(self._dtype))
                if not self._verified and len(found[0]) > 1:
                    if not self._as_plain(batch, several, found):
                        self._why_not_forward = "forward mode differs from plain autograd"
                        return None
                    self._verified = True  # not before: the comparison may run out of memory
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._why_not_forward = str(error).partition("\n")[0]
            return None
        return found

    def _as_plain(
        self, batch: Any, several: Sequence[Sequence[str]], found: Sequence[Tensor]
    ) -> bool:
        """Whether the products of the first two samples agree with plain autograd."""
        size = len(found[0])
        for i in range(2):
            wanted = self._of_gradients(self._plain_gradients(one_sample(batch, i, size)))
            for groups, dots_BQ in zip(several, found, strict=True):
                dots_Q = torch.stack([wanted[group][0][0] for group in groups]).sum(0)
                scale_Q = torch.stack([wanted[group][1][0] for group in groups]).norm(dim=0)
                limit_Q = self._tolerance * scale_Q
                if ((dots_BQ[i] - dots_Q).abs() > limit_Q).any():
                    return False
        return True

    def _by_gradients(self, batch: Any, groups: Sequence[str]) -> dict[str, Tensor]:
        """The products (B, Q) of groups that have no forward mode, through gradients."""
        require_independent_samples(self._model)
        names = [name for group in groups for name in self._names[group]]
        with torch.no_grad():
            size = len(self._forward(batch))
        fallback = self._fallback or self._fallback_of(names)
        if self._fallback is None and size > 1:
            fallback.find_forms(batch, size, {})
            self._fallback = fallback
            how = (
                "sample by sample"
                if "sample" in fallback.forms.values()
                else "with all samples mapped"
            )
            warnings.warn(
                f"parameters such as those of '{names[0]}' are differentiated {how}, which is "
                f"slow: {self._why_not_forward}",
                stacklevel=3,
            )
        vectors = self._space.split(self._vectors_QP)
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.autocast(self._device.type, enabled=False):
            for found in fallback.gradients(batch, size):
                for name, gradient in found.items():
                    dots_BQ = gradient.to(self._dtype).flatten(1) @ _flat(vectors[name]).t()
                    pieces[name].append(dots_BQ)
        by_name = {name: torch.cat(parts) for name, parts in pieces.items()}
        return {
            group: torch.stack([by_name[name] for name in self._names[group]]).sum(0)
            for group in groups
        }

    def _route(self, batch: Any) -> None:
        """On the first batch, find the groups whose layers' rules hold, and tap the layers."""
        if self._ruled is not None:
            return
        require_independent_samples(self._model)
        vectors, parameters = self._space.split(self._vectors_QP), self._space.parameters()
        modules, held = dict(self._model.named_modules()), holders(self._model, parameters)
        watched = {layer for of in held.values() for layer, _ in of}
        usage = self._usage(batch, {name: modules[name] for name in watched})
        self._ruled = {}
        for group, names in self._names.items():
            if any(why_not_by_rules(parameters[n], held[n], modules, usage) for n in names):
                continue
            self._by_rule.add(group)
            for name in names:
                for layer, own in held[name]:
                    of_group = self._ruled.setdefault(layer, {}).setdefault(group, {})
                    of_group[own] = vectors[name]
        rules = {layer: rule_of(modules[layer]) for layer in self._ruled}
        for layer, groups in self._ruled.items():
            groups |= {group: rules[layer].arrange(of) for group, of in groups.items()}
        self._attach(rules)


def _flat(vectors: Tensor) -> Tensor:
    return vectors.reshape(len(vectors), -1)  # vectors of a scalar parameter are (Q,)
