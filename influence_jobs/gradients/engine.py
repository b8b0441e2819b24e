"""Per-sample gradient norms of chosen layers from one forward and one truncated backward.

A forward hook keeps the input of each asked layer and passes its output through `_Tap`, whose
backward hands the output gradient to the layer's rule. With all parameters frozen the taps are the
only reason for a graph: it starts at the first asked layer, no weight gradient is computed, and as
the backward reaches a layer its norms are reduced and its input is freed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.reference import one_sample
from influence_jobs.gradients.requirements import find_layer, require_independent_samples
from influence_jobs.gradients.rules import (
    has_batch_axis,
    kernel_norms,
    reduce_gradient,
    reduce_norms,
)
from influence_jobs.terms import Precision, Reduction

# Largest difference to plain autograd that `check` accepts, as a part of the layer's largest norm.
_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 5e-2}


@dataclass
class _Call:
    """What one call of the engine has seen so far."""

    reached: set[str] = field(default_factory=set)
    batch_size: int = 0
    norms: dict[str, Tensor] = field(default_factory=dict)


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward shows the output gradient to `on_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        # Marked dirty, the output itself goes on: no copy, and no view, which in-place ops refuse.
        ctx.mark_dirty(output)
        ctx.on_gradient = on_gradient
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        ctx.on_gradient(gradients[0])
        ctx.on_gradient = None  # frees the layer's input
        return gradients[0] if ctx.needs_input_grad[0] else None, None, None


class GradNorms:
    """Per-sample weight-gradient norms of chosen layers: one forward, one truncated backward.

    With G_b the gradient of sample b's loss by a layer's weight (its bias does not count), read as
    (C, I, kh, kw), the reductions are: `kernel`, the L2 norm over I, (B, C, kh, kw); `channel`, the
    kernel norms summed over kh and kw, (B, C); `layer`, the L2 norm of all of G_b, (B,). Losses
    must not be averaged over the batch: an average scales every norm by 1/B.

    The model's parameters have `requires_grad` off until `close`. The engine leaves global settings
    alone; on CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`.
        layers: Names of modules, each called once in a forward with the batch as first axis.
        losses: (model, batch) to one loss per sample (B,). A batch is any pytree.
        reduction: See above.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); norms are
            always accumulated in the type of the weights.

    Raises:
        ModelError: A layer is missing or not supported, or the model is in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        losses: Callable[[nn.Module, Any], Tensor],
        *,
        reduction: Reduction,
        precision: Precision = "float32",
    ) -> None:
        self._model = model
        self._losses = losses
        self._reduction: Reduction = reduction
        self._precision: Precision = precision
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        require_independent_samples(model)
        self._layers = {name: find_layer(model, name, self._dtype) for name in layers}
        if not self._layers:
            raise ModelError("no layer was named: name at least one")
        self._device_type = next(self._weights()).device.type

        self._call: _Call | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        # First in line: the tap must see the layer's own output, not what another hook makes of it.
        self._hooks = [
            module.register_forward_hook(partial(self._tap, name), prepend=True, with_kwargs=True)
            for name, module in self._layers.items()
        ]

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Norms of every sample of a batch.

        Args:
            batch: What `losses` understands.

        Returns:
            {layer: norms} in the order of `layers`: (B, C, kh, kw), (B, C) or (B,); float32, or
            float64 under precision float64. Not checked for NaN.

        Raises:
            ModelError: A layer is not called exactly once, is not reached by the gradient, or its
                input was overwritten; the losses are not (B,); the model went into train mode.
        """
        require_independent_samples(self._model)
        call = self._call = _Call()
        try:
            # The outer context shields the backward from an autocast of the caller's.
            with torch.enable_grad(), torch.autocast(self._device_type, enabled=False):
                losses = self._forward(batch)
                self._refuse_unreached(call, losses)
                call.batch_size = len(losses)
                torch.autograd.grad(
                    losses, self._anchor, torch.ones_like(losses), allow_unused=True
                )
        finally:
            self._call = None
        for name in self._layers:
            if name not in call.norms:
                raise _unused(name)
        return {name: call.norms[name] for name in self._layers}

    def check(self, batch: Any) -> None:
        """Compare the first two samples' norms with plain autograd of each sample alone.

        Catches what no look at the modules can: a weight also used outside its module, samples that
        influence each other, losses averaged over the batch, dropout called as a function.

        Args:
            batch: Best of two samples. Its tensors with a first axis of length B are cut to one
                sample; all else is shared.

        Raises:
            ModelError: The norms of a layer differ; or as `__call__`.
        """
        norms = self(batch)
        size = len(next(iter(norms.values())))
        alone = [self._plain_norms(one_sample(batch, i, size)) for i in range(min(size, 2))]
        for name, found in norms.items():
            expected = torch.cat([one[name] for one in alone])
            found = found[: len(expected)]
            scale = expected.nan_to_num(nan=0, posinf=0).max().item()
            limit = _TOLERANCE[self._precision]
            if not torch.isclose(found, expected, rtol=0, atol=limit * scale, equal_nan=True).all():
                error = ((found - expected).abs().max() / scale).item()
                raise ModelError(
                    f"layer '{name}': per-sample norms differ from one-sample autograd by "
                    f"{error:.1e} of the largest (allowed {limit:g}); usual causes: the weight is "
                    "used outside its module too, samples influence each other (batch statistics), "
                    "losses divided by the batch size, random operations in the forward"
                )

    def close(self) -> None:
        """Remove the hooks and restore every parameter's `requires_grad`. May be called again."""
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._hooks, self._flags = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _forward(self, batch: Any) -> Tensor:
        mixed = self._precision == "bfloat16"
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=mixed):
            losses = self._losses(self._model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            what = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ModelError(
                f"losses of {type(self._model).__name__} are {what}: one loss per sample, shape "
                "(B,), is needed; do not average over the batch (reduction='none')"
            )
        return losses

    def _tap(
        self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        call = self._call
        if call is None:  # a forward that is not ours
            return None
        if name in call.reached:
            raise ModelError(
                f"layer '{name}' is called more than once in a forward: its norms would mix the "
                "uses; give each use its own module, or leave the layer out"
            )
        call.reached.add(name)
        if not has_batch_axis(module, output):
            raise ModelError(
                f"layer '{name}' returns shape {tuple(output.shape)}, which has no batch axis: "
                "its first axis must be the sample"
            )
        a = (args[0] if args else kwargs["input"]).detach()  # shares the version counter
        version = a._version

        def on_gradient(g: Tensor) -> None:
            if a._version != version:
                raise ModelError(
                    f"layer '{name}': its input was overwritten after the layer ran (an in-place "
                    "activation or +=), so its gradient is lost; make that operation out of place"
                )
            if len(g) != call.batch_size:
                raise ModelError(
                    f"layer '{name}' returns {len(g)} rows for a batch of {call.batch_size}: "
                    "its first axis must be the sample"
                )
            inputs = a.to(self._dtype) if a.is_floating_point() else a
            norms = kernel_norms(module, inputs, g.to(self._dtype))
            call.norms[name] = reduce_norms(norms, self._reduction)

        tapped: Tensor = _Tap.apply(output, self._anchor, on_gradient)
        return tapped

    def _refuse_unreached(self, call: _Call, losses: Tensor) -> None:
        for name in self._layers:
            if name not in call.reached:
                raise ModelError(
                    f"layer '{name}' is not called in the forward, or only its weight is used "
                    "there: leave it out"
                )
        if not losses.requires_grad:
            raise _unused(next(iter(self._layers)))

    def _plain_norms(self, sample: Any) -> dict[str, Tensor]:
        with self._thawed(), torch.enable_grad():
            loss = self._forward(sample)
            if len(loss) != 1:
                raise ModelError(
                    f"losses of {type(self._model).__name__} for one sample have length "
                    f"{len(loss)}: the batch must be a tuple, list or dict of tensors (or a "
                    "registered pytree) to be cut into samples"
                )
            gradients = torch.autograd.grad(
                loss.sum(), list(self._weights()), materialize_grads=True
            )
        return {
            name: reduce_gradient(module, gradient.unsqueeze(0), self._reduction)
            for (name, module), gradient in zip(self._layers.items(), gradients, strict=True)
        }

    def _weights(self) -> Iterator[Tensor]:
        for module in self._layers.values():
            assert isinstance(module.weight, Tensor)
            yield module.weight

    @contextmanager
    def _thawed(self) -> Iterator[None]:
        for weight in self._weights():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self._weights():
                weight.requires_grad_(False)


def _unused(name: str) -> ModelError:
    return ModelError(
        f"the losses do not depend on layer '{name}' (its output is unused, detached or computed "
        "under no_grad): leave it out"
    )
