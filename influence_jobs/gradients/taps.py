"""The base of the per-sample engines: taps on layers, one forward and one truncated backward pass.

A forward hook keeps the input of each tapped layer and passes its output through `_Tap`. In the
backward pass `_Tap` gives the output gradient to the engine. All parameters are frozen, so only the
taps create an autograd graph. It starts at the first tapped layer, and no weight gradient is
computed. When the backward pass reaches a layer, the engine visits it, and its input is freed.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError, first_line
from influence_jobs.gpu import may_round
from influence_jobs.gradients.batches import KINDS, one_sample, plain_leaves
from influence_jobs.gradients.fallback import Fallback
from influence_jobs.gradients.kinks import lies_at_a_kink
from influence_jobs.gradients.one_loss_each import CAUSES, wrong_losses
from influence_jobs.gradients.recorded_call import RecordedCall
from influence_jobs.gradients.requirements import gradient_hooks, require_independent_samples
from influence_jobs.gradients.rules import LayerRule
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.gradients.usage import Usage
from influence_jobs.memory import is_out_of_memory
from influence_jobs.terms import Precision
from influence_jobs.transfers import numbers

#: Takes a layer's name, rule, input and output gradient, the tensors with the weights' dtype.
Visit = Callable[[str, LayerRule[Any], Tensor, Tensor], None]

# Largest relative difference from plain autograd that `check` accepts.
TOLERANCE: dict[Precision, float] = {
    "float32": 1e-3, "float64": 1e-6, "bfloat16": 5e-2, "tf32": 1e-2
}  # fmt: skip


@dataclass
class _Call:
    """The state of one pass."""

    visit: Visit
    reached: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    batch_size: int = 0


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward calls `on_gradient` with the gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        # Marked dirty, the output itself is returned. A copy would cost memory, and in-place
        # operations refuse a view.
        ctx.mark_dirty(output)
        ctx.on_gradient = on_gradient
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        ctx.on_gradient(gradients[0])
        ctx.on_gradient = None  # frees the layer's input
        return gradients[0] if ctx.needs_input_grad[0] else None, None, None


class TappedModel(ABC):
    """Base class of the engines, which compute a function of every sample's gradient by layer.

    The model's parameters have `requires_grad` off until `close`. The engine leaves global settings
    alone; on CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`.
        losses: (model, batch) to one loss per sample (B,). `batches` says what a batch may be.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); the results
            are always accumulated in the dtype of the weights. `tf32` is `float32` where torch's
            flags allow TF32: checks then allow for its rounding.

    Raises:
        ModelError: The model is in train mode or uses batch statistics.
    """

    #: Words for messages: the name of the results, and what errors are relative to.
    _result: str
    _relative_to: str

    def __init__(
        self, model: nn.Module, losses: Callable[[nn.Module, Any], Tensor], precision: Precision
    ) -> None:
        require_independent_samples(model)
        self._model = model
        self._losses = losses
        self._precision: Precision = precision
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        # Of bfloat16 too, since mixed precision rounds weights to it in any case.
        half = (torch.bfloat16,) if precision == "bfloat16" else ()
        self._weight_dtypes = (self._dtype, *half)
        self._layers: dict[str, LayerRule[Any]] = {}
        self._hooks: list[Any] = []
        self._call: _Call | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    @abstractmethod
    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Results by module, with the batch as first axis."""

    def check(self, batch: Any) -> None:
        """Compare the results of each sample of a batch with plain autograd of that sample alone.

        This finds faults that the modules do not show: a weight that is also used outside its
        module, a layer that has the samples in another order than the batch, samples that influence
        each other, losses averaged over the batch, dropout called as a function. A sample at a kink
        is compared within its batch (see `kinks`).

        Args:
            batch: A few samples. Tensors whose first axis has length B are cut to one
                sample; all else is shared.

        Raises:
            ModelError: The results of a layer differ; or as `__call__`.
        """
        results = self(batch)
        size = len(next(iter(results.values())))
        plain = [
            self._of_gradients(self._plain_gradients(one_sample(batch, i, size)))
            for i in range(size)
        ]
        try:
            self._compare(results, plain)
        except ModelError:
            if self._precision != "float32":
                raise
            parameters = self._parameters().values()
            at_kinks = [
                i
                for i in range(len(plain))
                if lies_at_a_kink(self._model, self._losses, parameters, batch, i, size)
            ]
            for i in at_kinks:
                plain[i] = self._of_gradients(self._plain_in_batch(batch, i))
            self._compare(results, plain)

    def _compare(
        self, results: Mapping[str, Tensor], plain: Sequence[dict[str, tuple[Tensor, Tensor]]]
    ) -> None:
        limit, names = self._tolerance, list[str]()
        flags, worst = list[Tensor](), list[Tensor]()
        for name, all_found in results.items():
            expected = torch.cat([one[name][0] for one in plain])
            scale = torch.cat([one[name][1] for one in plain]).nan_to_num(nan=0, posinf=0).amax(0)
            found = all_found[: len(expected)]
            error = (found - expected).abs()
            wrong = (error > limit * scale) | (found.isnan() != expected.isnan())
            if wrong.numel():
                names.append(name)
                flags.append(wrong.any())
                worst.append((error / scale).where(wrong, 0).amax())
        told = numbers(flags + worst)  # one look at the device
        for name, flag, most in zip(names, told, told[len(flags) :], strict=False):
            if flag:
                raise ModelError(
                    gradient_hooks(self._model, self._parameters().values())
                    or f"layer '{name}': per-sample {self._result} differ from those of each "
                    f"sample alone by {most:.1e} of {self._relative_to} ({limit:g} is allowed): "
                    "use the weight inside of its module only, and let losses depend on one "
                    f"sample; {CAUSES}"
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

    @abstractmethod
    def _parameters(self) -> dict[str, Tensor]:
        """The parameters by which the engine differentiates, by name."""

    @abstractmethod
    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Results (1, ...) computed from one sample's gradients, and the scale of their errors."""

    def _may_repeat(self, name: str) -> bool:
        """Whether a tapped layer may be called several times in a pass. Each call is visited."""
        return True

    def _usage(self, batch: Any, modules: Mapping[str, nn.Module]) -> Usage:
        """How a forward pass over a batch uses some modules and the engine's parameters."""
        with (
            thawed(self._parameters().values()),
            torch.enable_grad(),
            torch.autocast(self._device.type, enabled=False),
        ):
            # Mixed precision uses the same layers, and rounds too much to see their order.
            return Usage(partial(self._forward, mixed=False), batch, modules)

    def _fallback_of(self, parameters: Sequence[str]) -> Fallback:
        """The way of some parameters, by full name, that no rule serves."""
        return Fallback(
            self._model,
            parameters,
            forward=self._forward,
            plain=self._plain_gradients,
            record=self._record,
            tolerance=self._tolerance,
        )

    def _freeze(self) -> None:
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)

    def _attach(self, layers: Mapping[str, LayerRule[Any]]) -> None:
        """Tap the layers of these rules in every later pass, and no others."""
        for hook in self._hooks:
            hook.remove()
        self._layers = dict(layers)
        # Prepended, so that the tap gets the layer's own output before other hooks change it.
        self._hooks = [
            rule.module.register_forward_hook(
                partial(self._tap, name, rule), prepend=True, with_kwargs=True
            )
            for name, rule in self._layers.items()
        ]

    def _run(self, batch: Any, visit: Visit, calls: Sequence[RecordedCall] = ()) -> int:
        """One forward and one truncated backward pass, with one `visit` per tapped layer.

        Args:
            calls: Calls to record besides.

        Returns:
            B.

        Raises:
            ModelError: A layer is not called, is called several times where the engine cannot do
                that, is not reached by the gradient, or its input was overwritten; the losses are
                not (B,); the model is in train mode.
        """
        require_independent_samples(self._model)
        call = self._call = _Call(visit)
        try:
            # The outer context protects the backward pass from an autocast of the caller.
            with (
                torch.enable_grad(),
                torch.autocast(self._device.type, enabled=False),
                ExitStack() as stack,
            ):
                for recorded in calls:
                    stack.enter_context(recorded.recording(self._through_tap))
                losses = self._forward(batch)
                self._refuse_unreached(call, losses)
                call.batch_size = len(losses)
                torch.autograd.grad(
                    losses, self._anchor, torch.ones_like(losses), allow_unused=True
                )
        finally:
            self._call = None
        for name in self._layers:
            if not call.done[name]:
                raise unused(name)
        return call.batch_size

    def _record(self, batch: Any, calls: Sequence[RecordedCall]) -> None:
        """One forward and one truncated backward to record calls, and for nothing else."""
        self._run(batch, lambda *_: None, calls)

    @property
    def _tolerance(self) -> float:
        rounded = self._precision == "float32" and may_round(self._device)
        return TOLERANCE["tf32" if rounded else self._precision]

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _forward(self, batch: Any, *, mixed: bool = True) -> Tensor:
        mixed = mixed and self._precision == "bfloat16"
        versions = _versions(batch)
        with (
            # A cached cast would hide uses of a thawed weight from the graph.
            torch.autocast(
                self._device.type, dtype=torch.bfloat16, enabled=mixed, cache_enabled=False
            ),
            differentiable_kernels(self._model),
        ):
            try:
                losses = self._losses(self._model, batch)
            except RuntimeError as error:
                if not mixed or is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"{type(self._model).__name__} does not run in bfloat16 on {self._device} "
                    f"({first_line(error)}): use --precision float32"
                ) from error
        if _versions(batch) != versions:
            raise ModelError(
                f"{type(self._model).__name__} or its losses overwrite the batch (an in-place "
                "operation on it), so a second pass would see other samples: work on a copy"
            )
        if wrong := wrong_losses(losses):
            raise ModelError(wrong)
        return losses

    def _tap(
        self,
        name: str,
        rule: LayerRule[Any],
        _module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        call = self._call
        if call is None:  # a forward pass that is not ours
            return None
        if call.batch_size:  # the backward pass calls the layer again, for a checkpoint
            return self._tapped(rule, output, lambda _: None)
        if call.reached[name] and not self._may_repeat(name):
            raise ModelError(
                f"layer '{name}' is called more than once in a forward pass: its {self._result} "
                "would mix the uses; give each use its own module, or leave the layer out"
            )
        call.reached[name] += 1
        if not rule.has_batch_axis(output):
            raise ModelError(
                f"layer '{name}' returns shape {tuple(output.shape)}, which has no batch axis: "
                "its first axis must be the sample"
            )
        recorded = rule.recorded(args, kwargs)
        if recorded is None:
            raise ModelError(
                f"layer '{name}' ({rule.type_name()}) is called with other arguments than in the "
                "first batch: make all calls alike, or leave the layer out"
            )
        a = recorded.detach()  # shares the version counter
        version = a._version

        def on_gradient(g: Tensor) -> None:
            if not call.batch_size:
                raise ModelError(
                    f"losses() or the forward pass takes a gradient of its own through layer "
                    f"'{name}' (torch.autograd.grad, or backward), which cannot be told from that "
                    "of the losses: use a method without gradients by sample, such as --solver "
                    "unrolled or infl submit lds"
                )
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
            call.visit(name, rule, inputs, g.to(self._dtype))
            call.done[name] += 1

        return self._tapped(rule, output, on_gradient)

    def _tapped(
        self, rule: LayerRule[Any], output: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        # A Linear over positions returns a view of a matrix that it alone made. A tap on the view
        # would cost three copies in the backward pass.
        matrix = _viewed_whole(output) if type(rule.module) is nn.Linear else None
        if matrix is None:
            return self._through_tap(output, on_gradient)
        shape = output.shape
        return self._through_tap(matrix, lambda g: on_gradient(g.reshape(shape))).view(shape)

    def _through_tap(self, output: Tensor, on_gradient: Callable[[Tensor], None]) -> Tensor:
        tapped: Tensor = _Tap.apply(output, self._anchor, on_gradient)
        return tapped

    def _refuse_unreached(self, call: _Call, losses: Tensor) -> None:
        for name in self._layers:
            if name not in call.reached:
                raise ModelError(
                    f"layer '{name}' is not called in the forward pass, or only its weight is used "
                    "there: leave it out"
                )
        if not losses.requires_grad:
            raise unused(next(iter(self._layers), ""))

    def _plain_gradients(
        self, sample: Any, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Gradients of one sample's loss by autograd and nothing else.

        Args:
            names: Full names of parameters; by default those of `_parameters`, by its names.
        """
        if names is None:
            parameters = self._parameters()
        else:
            parameters = {name: self._model.get_parameter(name) for name in names}
        with thawed(parameters.values()), torch.enable_grad():
            try:
                loss = self._forward(sample)
            except Exception as error:  # of a batch that was not cut, or of a model of several only
                if is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"losses() fails for one sample that is cut out of a batch "
                    f"({type(error).__name__}: {error}): a batch must be {KINDS}"
                ) from error
            if len(loss) != 1:
                raise ModelError(
                    f"losses() gives {len(loss)} numbers for one sample that is cut out of a "
                    f"batch: a batch must be {KINDS}"
                )
            if not loss.requires_grad:  # none of the parameters is used
                return {
                    name: torch.zeros_like(value, dtype=self._dtype)
                    for name, value in parameters.items()
                }
            gradients = torch.autograd.grad(
                loss.sum(), list(parameters.values()), materialize_grads=True
            )
        return {n: g.to(self._dtype) for n, g in zip(parameters, gradients, strict=True)}

    def _plain_in_batch(self, batch: Any, i: int) -> dict[str, Tensor]:
        """Gradients of one sample's loss within its batch by autograd and nothing else."""
        parameters = self._parameters()
        with thawed(parameters.values()), torch.enable_grad():
            loss = self._forward(batch)[i]
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return {n: g.to(self._dtype) for n, g in zip(parameters, gradients, strict=True)}


@contextmanager
def thawed(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters require gradients inside the block, and restore their flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _viewed_whole(tensor: Tensor) -> Tensor | None:
    """What a tensor is a view of, if the view changes its shape only."""
    base: Tensor | None = tensor._base
    if base is not None and base.numel() == tensor.numel():
        return base if base.is_contiguous() and tensor.is_contiguous() else None
    return None


def _versions(batch: Any) -> list[int]:
    """How often each tensor of a batch was written to."""
    leaves = [leaf for leaf in plain_leaves(batch) if isinstance(leaf, Tensor)]
    return [leaf._version for leaf in leaves if not leaf.is_inference()]


def unused(name: str) -> ModelError:
    """The refusal of a layer whose gradient does not exist."""
    return ModelError(
        f"the losses do not depend on layer '{name}' (its output is unused, detached or computed "
        "under no_grad): leave it out"
    )
