"""Dot products of vectors with every sample's loss gradient, without storing the gradients."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.forward_mode import directional_derivatives
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.reference import one_sample
from influence_jobs.gradients.requirements import (
    require_dtype,
    require_independent_samples,
    require_plain,
)
from influence_jobs.gradients.rules import LayerRule, rule_of, supported
from influence_jobs.gradients.taps import TappedModel, thawed
from influence_jobs.terms import Precision


class GradDots(TappedModel):
    """Dot products v_q . grad loss_b of Q vectors with every sample's loss gradient.

    The rule of a layer is used if its type has one, if the layer is called once with the batch as
    first axis, and if its parameters are used nowhere else. All other parameters - custom ones,
    attention, recurrent layers, shared weights - are differentiated in forward mode, for all
    samples of a batch at once. If the model has an operation without a forward-mode derivative,
    plain autograd differentiates them sample by sample; this is slow and gives a warning. The first
    batch decides which parameters take which way.

    The model's parameters have `requires_grad` off until `close`; weights may be loaded between
    calls. On CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`.
        space: The parameters of this model that the gradients are by.
        losses: (model, batch) to one loss per sample (B,), not averaged over the batch. A batch is
            any pytree.
        vectors_QP: The vectors in that space; copied to the device and dtype of the weights.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); products are
            always accumulated in the dtype of the weights.

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
        self._space = space
        self._names: dict[str, list[str]] = {}
        for name, parameter in space.parameters().items():
            module, _, own = name.rpartition(".")
            require_dtype(module, parameter, self._dtype)
            require_plain(module, model.get_submodule(module))
            self._names.setdefault(module, []).append(own)
        self._vectors_QP = vectors_QP.detach().to(self._device, self._dtype)
        self._ruled: dict[str, dict[str, Tensor]] | None = None
        self._in_forward_mode = True
        self._freeze()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Dot products of every sample of a batch, by module.

        Args:
            batch: A batch for `losses`.

        Returns:
            {module: (B, Q)} for every module with parameters in the space. The sum over modules is
            v_q . grad loss_b; a shared parameter counts for its first module. The dtype is that of
            the weights. The result is not checked for NaN.

        Raises:
            ModelError: A layer with a rule is not called exactly once, is not reached by the
                gradient, or its input was overwritten; the losses are not (B,); the model is in
                train mode.
        """
        self._route(batch)
        parts = self._by_rules(batch)
        for name in self._names:
            if name not in parts:
                parts[name] = self._by_derivatives(batch, [name])
        return {name: parts[name] for name in self._names}

    def total(self, batch: Any) -> Tensor:
        """Dot products of every sample of a batch, (B, Q), summed over modules.

        All parameters without a rule take one pass together.

        Raises:
            ModelError: As `__call__`.
        """
        self._route(batch)
        parts = list(self._by_rules(batch).values())
        if rest := [name for name in self._names if name not in self._layers]:
            parts.append(self._by_derivatives(batch, rest))
        total_BQ = parts[0]
        for part_BQ in parts[1:]:
            total_BQ += part_BQ
        return total_BQ

    def _parameters(self) -> dict[str, Tensor]:
        return self._space.parameters()

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        vectors = self._space.split(self._vectors_QP)
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for module, owned in self._names.items():
            dots = square = torch.zeros((), dtype=self._dtype, device=self._device)
            for name in _full(module, owned):
                terms_QP = _flat(vectors[name]) * gradients[name].flatten()
                dots = dots + terms_QP.sum(1)
                square = square + terms_QP.square().sum(1)
            # Terms may cancel, so rounding is relative to the root of their sum of squares.
            parts[module] = dots.unsqueeze(0), square.sqrt().unsqueeze(0)
        return parts

    def _by_rules(self, batch: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        vectors = self._ruled
        assert vectors is not None

        def visit(name: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            parts[name] = rule.dots(vectors[name], a, g)

        if self._layers:
            self._run(batch, visit)
        return parts

    def _by_derivatives(self, batch: Any, modules: Iterable[str]) -> Tensor:
        require_independent_samples(self._model)
        split = self._space.split(self._vectors_QP)
        names = [name for module in modules for name in _full(module, self._names[module])]
        vectors = {name: split[name] for name in names}
        if self._in_forward_mode:
            try:
                with torch.autocast(self._device.type, enabled=False):
                    return directional_derivatives(
                        self._model, lambda _, batch: self._forward(batch), batch, vectors
                    ).to(self._dtype)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._in_forward_mode = False
                warnings.warn(
                    f"parameters of '{names[0]}' and the like are differentiated sample by sample, "
                    f"which is slow: {str(error).partition(chr(10))[0]}",
                    stacklevel=3,
                )
        with torch.no_grad():
            size = len(self._forward(batch))
        flat_QP = torch.cat([_flat(part) for part in vectors.values()], dim=1)
        rows = []
        for i in range(size):
            gradients = self._plain_gradients(one_sample(batch, i, size))
            rows.append(flat_QP @ torch.cat([gradients[name].flatten() for name in names]))
        return torch.stack(rows)

    def _route(self, batch: Any) -> None:
        """On the first batch, find the layers whose rule holds, and tap them."""
        if self._ruled is not None:
            return
        require_independent_samples(self._model)
        vectors = self._space.split(self._vectors_QP)
        rules = self._plainly_used(batch)
        self._ruled = {
            name: rule.arrange({own: vectors[f"{name}.{own}"] for own in self._names[name]})
            for name, rule in rules.items()
        }
        self._attach(rules)

    def _plainly_used(self, batch: Any) -> dict[str, LayerRule[Any]]:
        """Rules of the layers that are called once for all samples and used in no other way.

        Each use of a parameter is an edge to its leaf in the autograd graph of the losses.
        """
        candidates = {
            name: rule_of(self._model.get_submodule(name))
            for name, owned in self._names.items()
            if set(owned) in ({"weight"}, {"weight", "bias"})
            and _has_rule(self._model.get_submodule(name), len(owned))
        }
        calls: dict[str, list[int]] = {name: [] for name in candidates}

        def count(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name].append(len(output) if candidates[name].has_batch_axis(output) else 0)

        with ExitStack() as stack:
            stack.enter_context(
                thawed(p for rule in candidates.values() for p in rule.module.parameters())
            )
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self._device.type, enabled=False))
            for name, rule in candidates.items():
                hook = rule.module.register_forward_hook(partial(count, name))
                stack.callback(hook.remove)
            losses = self._forward(batch)
        uses = _uses(losses)
        return {
            name: rule
            for name, rule in candidates.items()
            if calls[name] == [len(losses)]
            and all(uses[id(p)] == 1 for p in rule.module.parameters())
        }


def _has_rule(module: nn.Module, parameters: int) -> bool:
    return supported(module) and parameters == sum(1 for _ in module.parameters())


def _flat(vectors: Tensor) -> Tensor:
    return vectors.reshape(len(vectors), -1)  # vectors of a scalar parameter are (Q,)


def _full(module: str, names: Iterable[str]) -> list[str]:
    return [f"{module}.{name}" if module else name for name in names]


def _uses(losses: Tensor) -> Counter[int]:
    """Number of operations that use each leaf of the autograd graph, by the leaf's id."""
    uses: Counter[int] = Counter()
    seen, stack = set(), [losses.grad_fn]
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            if following is None:
                continue
            if (leaf := getattr(following, "variable", None)) is not None:
                uses[id(leaf)] += 1
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    return uses
