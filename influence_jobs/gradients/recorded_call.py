"""A layer's one call in a pass: what it was given, and the gradients by what it returned.

From both follow the gradients of the layer's own parameters, sample by sample, by mapping the
layer's vector-Jacobian product over the batch: it needs no rule, only a layer that torch can map.

A layer that never sees the samples, such as an embedding of positions, returns one tensor for all
of them, and its gradient is already a sum. Such a tensor is repeated for each sample, as what
follows would do by broadcasting, so that each has a gradient of its own.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.rules.blocks import sample_blocks
from influence_jobs.gradients.transforms import mappable_kernels

#: (tensor, on_gradient) to the tensor, whose backward calls `on_gradient` with its gradient.
Tap = Callable[[Tensor, Callable[[Tensor], None]], Tensor]
Shapes = list[torch.Size | None]  # of the leaves of a pytree; None for what is no tensor


_PLACES = itertools.count()  # of calls, in their order


class NotMappable(Exception):
    """The layer's call cannot be mapped over the batch, for the reason given."""


@dataclass
class _Call:
    inputs: list[Any]
    structure: pytree.TreeSpec
    outputs: Shapes = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)  # by output

    def __post_init__(self) -> None:
        self.place = next(_PLACES)
        self.versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in self.inputs]


class RecordedCall:
    """The call of one layer in the passes in which it is recorded.

    Args:
        name: The layer's, for messages.
        module: The layer.

    Attributes:
        samples: B of the pass to come, for a layer that is `shared`.
    """

    samples: int

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        # Outputs that all samples share, and whether such a one has an axis for them, of length 1.
        self._shared: dict[int, bool] = {}
        self._calls: list[_Call] = []
        self._input_axes: list[int | None] = []
        self._output_axes: list[int | None] = []

    @contextmanager
    def recording(self, tap: Tap) -> Iterator[None]:
        """Record what happens in this block; what was recorded before is forgotten."""
        self.forget()
        # First in line: it must see the layer's own output, not what another hook makes of it.
        hook = self.module.register_forward_hook(
            partial(self._keep, tap), prepend=True, with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()

    def shapes(self) -> list[tuple[Shapes, Shapes]]:
        """Of each call, the shapes of the tensors that went in and came out."""
        return [([_shape(leaf) for leaf in call.inputs], call.outputs) for call in self._calls]

    def forget(self) -> None:
        """Free what was recorded."""
        self._calls = []

    @property
    def shared(self) -> bool:
        """Whether the call does not see the samples: its output is repeated for each of them."""
        return bool(self._shared)

    @property
    def place(self) -> int:
        """Grows in the order of the calls of a pass."""
        return self._calls[0].place

    def refuse_shared(self) -> None:
        """Do not repeat the output from now on."""
        self._shared = {}

    def learn_axes(self, one: list[tuple[Shapes, Shapes]], batch: int) -> None:
        """Find where the samples are, from this pass of `batch` of them and one of one sample.

        So a length that happens to be that of the batch is not taken for it.

        Args:
            one: `shapes` of the pass of one sample.

        Raises:
            NotMappable: The layer was not called once, or samples are on no axis of their own.
        """
        if len(self._calls) != 1 or len(one) != 1:
            raise NotMappable(f"it is called {len(self._calls)} times in a forward")
        several = self.shapes()
        self._input_axes = _batch_axes(several[0][0], one[0][0], batch)
        self._output_axes = _batch_axes(several[0][1], one[0][1], batch)
        (call,) = self._calls
        without = [i for i in call.gradients if self._output_axes[i] is None]
        if not without:
            if all(axis is None for axis in self._input_axes):
                raise NotMappable("no argument has a batch axis")
            return
        if any(axis is not None for axis in (*self._input_axes, *self._output_axes)):
            raise NotMappable("it returns a tensor without a batch axis")
        for i in without:
            self._shared[i] = (call.outputs[i] or ())[:1] == (1,)
            self._output_axes[i] = 0

    def gradients(
        self, parameters: Mapping[str, Tensor], batch: int
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of some samples after others, {parameter: (samples, *shape)}.

        Args:
            parameters: Of the layer, by their names in it.
            batch: B.

        Raises:
            ModelError: An input was overwritten since, or the call is other than those before.
        """
        call = self._checked(batch)
        axes = {i: axis for i, axis in enumerate(self._input_axes) if axis is not None}
        differentiable = [*call.gradients]
        wrapped = _Layer(self.module)

        def of_one(
            parameters: dict[str, Tensor], mapped: list[Tensor], cotangents: list[Tensor]
        ) -> dict[str, Tensor]:
            leaves = [*call.inputs]
            for (i, axis), leaf in zip(axes.items(), mapped, strict=True):
                leaves[i] = leaf.unsqueeze(axis)
            args, kwargs = pytree.tree_unflatten(leaves, call.structure)

            def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
                named = {f"module.{name}": value for name, value in parameters.items()}
                found = pytree.tree_leaves(functional_call(wrapped, named, (args, kwargs)))
                return [found[i] for i in differentiable]

            pullback = vjp(outputs, parameters)[1]
            whole = [
                cotangent.unsqueeze(self._output_axes[i] or 0)
                if self._shared.get(i, True)
                else cotangent
                for i, cotangent in zip(differentiable, cotangents, strict=True)
            ]
            (gradients,) = pullback(whole)
            return dict(gradients)

        inputs = [call.inputs[i] for i in axes]
        cotangents = [call.gradients[i] for i in differentiable]
        output_axes = [self._output_axes[i] for i in differentiable]
        plain = {name: parameter.detach() for name, parameter in parameters.items()}
        for block in sample_blocks(batch, plain.values()):
            with mappable_kernels(self.module):
                found: dict[str, Tensor] = vmap(
                    of_one, in_dims=(None, [*axes.values()], output_axes)
                )(plain, _part(inputs, axes.values(), block), _part(cotangents, output_axes, block))
            yield found

    def _checked(self, batch: int) -> _Call:
        """The call, if it is as those that the axes were learned from."""
        where = f"layer '{self.name}'"
        if len(self._calls) != 1:
            raise ModelError(
                f"{where} is called {len(self._calls)} times in a forward pass, and was called "
                "once in the first batch: make all batches alike, or leave the layer out"
            )
        (call,) = self._calls
        for leaf, version in zip(call.inputs, call.versions, strict=True):
            if isinstance(leaf, Tensor) and leaf._version != version:
                raise ModelError(
                    f"{where}: its input was overwritten after the layer ran (an in-place "
                    "activation or +=), so its gradient is lost; make that operation out of place"
                )
        shapes = [*(_shape(leaf) for leaf in call.inputs), *call.outputs]
        axes = self._input_axes + self._output_axes
        if len(shapes) != len(axes) or any(
            axis is not None and (shape is None or shape[axis] != batch)
            for shape, axis in zip(shapes, axes, strict=True)
        ):
            raise ModelError(
                f"{where} is called with other arguments than in the first batch: make all calls "
                "alike, or leave the layer out"
            )
        return call

    def _keep(
        self, tap: Tap, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        call = _Call(
            [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )
        self._calls.append(call)
        outputs, output_structure = pytree.tree_flatten(output)
        for i, has_axis in self._shared.items():
            # A tensor with several rows where there was one does not expand: torch says so.
            sizes = outputs[i].shape[1:] if has_axis else outputs[i].shape
            outputs[i] = outputs[i].expand(self.samples, *sizes)
        call.outputs = [_shape(leaf) for leaf in outputs]
        for i, leaf in enumerate(outputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                call.gradients[i] = leaf.new_zeros(()).expand(leaf.shape)  # if it is not used
                # A copy: what follows may write into it, and a view would refuse that.
                outputs[i] = tap(leaf.clone(), partial(call.gradients.__setitem__, i))
        return pytree.tree_unflatten(outputs, output_structure)


class _Layer(nn.Module):
    """A layer that takes its arguments as one pair, for `functional_call`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


def _shape(leaf: Any) -> torch.Size | None:
    return leaf.shape if isinstance(leaf, Tensor) else None


def _part(leaves: list[Any], axes: Any, block: slice) -> list[Tensor]:
    length = block.stop - block.start
    return [leaf.narrow(axis, block.start, length) for leaf, axis in zip(leaves, axes, strict=True)]


def _batch_axes(several: Shapes, one: Shapes, batch: int) -> list[int | None]:
    if len(several) != len(one):
        raise NotMappable("its arguments change with the batch")
    return [_batch_axis(a, b, batch) for a, b in zip(several, one, strict=True)]


def _batch_axis(several: torch.Size | None, one: torch.Size | None, batch: int) -> int | None:
    """The axis of length `batch` that has length 1 for one sample; None if the shapes are equal."""
    if several == one or several is None or one is None:
        return None
    differing = [i for i, (a, b) in enumerate(zip(several, one, strict=False)) if a != b]
    if len(several) == len(one) and len(differing) == 1:
        (axis,) = differing
        if (several[axis], one[axis]) == (batch, 1):
            return axis
    raise NotMappable(
        f"a tensor {tuple(several)} for {batch} samples is {tuple(one)} for one: samples have no "
        "axis of their own"
    )
