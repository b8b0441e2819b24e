"""How a forward uses layers and parameters: what decides whether a rule holds for them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients.batches import one_sample, part_of
from influence_jobs.gradients.one_loss_each import mixed_losses
from influence_jobs.gradients.rules import LayerRule, nearest_rule
from influence_jobs.memory import is_out_of_memory
from influence_jobs.transfers import numbers, on_device

FEW = 8  # samples that show in which order a module has them
OFF = 0.02  # of the largest gradient: more than rounding of float32, also to TF32


@dataclass
class _Call:
    rows: int  # of the output that the layer's rule works on; 0 where the rule is not for the call
    inputs: list[Any]  # nodes of the graph
    outputs: set[Any]
    leaves: set[int]  # ids of the leaves among the inputs
    tensors: list[Tensor]  # of the output, until it is known in which order they have the samples
    in_order: bool = True  # whether its rows are the samples of the batch, one after the other


class Usage:
    """What a forward pass shows of some modules and of their parameters.

    Each use of a parameter is an edge to its leaf in the graph of the losses. A second pass, over
    the first sample alone, tells an axis that is as long as the batch by chance from the samples'.
    Two backward passes of a few samples tell in which order a module has them, as far as its output
    has a row for each.

    Args:
        forward: From a batch to one loss a sample; the parameters require gradients.
        batch: The batch. It is cut as `one_sample` does it.
        modules: By name, those to look at.

    Attributes:
        size: B.
    """

    def __init__(
        self, forward: Callable[[Any], Tensor], batch: Any, modules: Mapping[str, nn.Module]
    ) -> None:
        self._calls, losses = _watched(forward, batch, modules)
        self.size = len(losses)
        self._losses = losses.grad_fn
        self._uses = _uses([self._losses])
        self._of_one = self._calls if self.size == 1 else None
        if self.size > 1:
            self._look_at_one(forward, batch, modules, losses.detach())
        if self.size > 1 and self._of_one is not None:
            part = part_of(batch, slice(0, FEW), self.size)
            try:
                few, some = _watched(forward, part, modules)
                self._see_order(some, few)
            except Exception as error:  # such as a backward that may run only once
                if is_out_of_memory(error):
                    raise
        for calls in [*self._calls.values(), *(self._of_one or {}).values()]:
            for call in calls:
                call.tensors = []  # which hold the graph

    def _look_at_one(
        self,
        forward: Callable[[Any], Tensor],
        batch: Any,
        modules: Mapping[str, nn.Module],
        losses_B: Tensor,
    ) -> None:
        alone_1: Tensor | None = None
        try:
            of_one, alone_1 = _watched(forward, one_sample(batch, 0, self.size), modules)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
        if alone_1 is not None and len(alone_1) != 1:
            return  # a batch that cannot be cut leaves the question to `TappedModel.check`
        if alone_1 is not None and _alike(alone_1, losses_B):
            self._of_one = of_one
            return
        shared = _shared_leaf(forward, batch, losses_B)
        if shared is not None:
            raise ModelError(
                f"a batch of {self.size} samples holds a tensor {tuple(shared.shape)} that has no "
                "row for each sample but happens to be as long, so it would be cut with the "
                "samples: keep what all samples share in the task or the model, not in the batch"
            )
        if alone_1 is not None:
            raise ModelError(mixed_losses(alone_1, losses_B[:1], self.size))

    def _see_order(self, losses_B: Tensor, few: Mapping[str, list[_Call]]) -> None:
        """Mark the calls whose rows are not the samples in their order.

        If the losses are weighted, so is the gradient of each row: by the weight of its sample.

        Args:
            losses_B: Of a few samples.
            few: Their calls.
        """
        size, outputs = len(losses_B), []
        for module, calls in self._calls.items():
            of_one = (self._of_one or {})[module]
            for call, some, alone in zip(calls, few[module], of_one, strict=True):
                for output, one in zip(some.tensors, alone.tensors, strict=True):
                    rows = output.shape[:1] == (size,) and one.shape[:1] == (1,)
                    # Half precision rounds too much to tell.
                    exact = output.dtype in (torch.float32, torch.float64)
                    if rows and exact and output.requires_grad and output.numel():
                        outputs.append((call, output))
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        weights_B = on_device(1 + order / size, losses_B.device).to(losses_B.dtype)
        plain, weighted = (
            torch.autograd.grad(
                losses_B, [o for _, o in outputs], by, retain_graph=True, allow_unused=True
            )
            for by in (torch.ones_like(losses_B), weights_B)
        )
        seen = [
            (call, _moved(g, found, weights_B).to(losses_B.device))
            for (call, _), g, found in zip(outputs, plain, weighted, strict=True)
            if g is not None
        ]
        for (call, _), moved in zip(seen, numbers([m for _, m in seen]), strict=True):
            call.in_order = call.in_order and not moved

    def calls(self, module: str) -> int:
        """How often a module is called."""
        return len(self._calls[module])

    def uses(self, parameter: Tensor) -> int:
        """How many operations on the way to the losses use a parameter."""
        return self._uses[id(parameter)]

    def plain(self, module: str, parameters: Iterable[Tensor]) -> bool:
        """Whether a layer's rule holds: one call for all samples, and no other use."""
        return self.calls(module) == 1 and self.in_calls(module, parameters)

    def in_calls(self, module: str, parameters: Iterable[Tensor]) -> bool:
        """Whether each call of a layer is for all samples, and a use of each parameter."""
        count = self.calls(module)
        return (
            count > 0
            and self._for_all_samples(module)
            and all(self.uses(parameter) == count for parameter in parameters)
        )

    def only_in_calls(self, parameter: Tensor, modules: Collection[str]) -> bool:
        """Whether the uses of a parameter are the calls of some layers, each for all samples."""
        calls = sum(self.calls(module) for module in modules)
        return calls == self.uses(parameter) and all(map(self._for_all_samples, modules))

    def _for_all_samples(self, module: str) -> bool:
        count = self.calls(module)
        rows = [call.rows for call in self._calls[module]]
        if self._of_one is not None and [c.rows for c in self._of_one[module]] != [1] * count:
            return False
        in_order = all(call.in_order for call in self._calls[module])
        return rows == [self.size] * count and in_order

    def within(self, parameter: Tensor, module: str) -> bool:
        """Whether a module is called once, and all uses of a parameter are in that call."""
        if len(self._calls[module]) != 1:
            return False
        (call,) = self._calls[module]
        if not call.in_order:
            return False
        outside = _uses([self._losses, *call.inputs], call.outputs)
        return not outside[id(parameter)] and id(parameter) not in call.leaves


def _alike(alone_1: Tensor, losses_B: Tensor) -> bool:
    """Whether the first sample's loss is the same alone, up to rounding in half precision."""
    limit = 0.05 * losses_B.abs().max() + 1e-5
    return not bool((alone_1[0] - losses_B[0]).abs() > limit)  # NaN is not told here


def _shared_leaf(forward: Callable[[Any], Tensor], batch: Any, losses_B: Tensor) -> Tensor | None:
    """A tensor as long as the batch without which, uncut, the first sample's loss is another."""
    size = len(losses_B)
    whole, structure = pytree.tree_flatten(batch)
    cut = pytree.tree_leaves(one_sample(batch, 0, size))
    for i, leaf in enumerate(whole):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != size:
            continue
        leaves = [*cut[:i], leaf, *cut[i + 1 :]]
        try:
            found = forward(pytree.tree_unflatten(leaves, structure)).detach()
        except (RuntimeError, ValueError, IndexError, ModelError):
            continue
        if len(found) == 1 and _alike(found, losses_B):
            return leaf
    return None


def _watched(
    forward: Callable[[Any], Tensor], batch: Any, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, list[_Call]], Tensor]:
    """The calls of some modules in a forward pass, and its losses."""
    calls: dict[str, list[_Call]] = {name: [] for name in modules}

    def note(
        noted: list[_Call],
        rule: LayerRule[Any] | None,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        rows = 0
        if (
            rule is not None
            and rule.recorded(args, kwargs) is not None
            and isinstance(output, Tensor)
            and rule.has_batch_axis(output)
        ):
            rows = len(output)
        inputs = [leaf for leaf in _tensors((args, kwargs)) if leaf.requires_grad]
        noted.append(
            _Call(
                rows,
                [leaf.grad_fn for leaf in inputs if leaf.grad_fn is not None],
                {leaf.grad_fn for leaf in _tensors(output) if leaf.grad_fn is not None},
                {id(leaf) for leaf in inputs if leaf.is_leaf},
                _tensors(output),
            )
        )

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = partial(note, calls[name], nearest_rule(module))
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return calls, forward(batch)


def _moved(g: Tensor, weighted: Tensor, weights_B: Tensor) -> Tensor:
    """Whether every row depends on one sample only, and one at least on another than the one there.

    A row that depends on several samples is left to `TappedModel.check`, which refuses it.
    """
    g_BD, found_BD = (one.reshape(len(one), -1) for one in (g, weighted))
    own_B = weights_B.to(g.device, g.dtype)
    of_each_B = ((found_BD * g_BD).sum(1) / (g_BD * g_BD).sum(1)).nan_to_num()
    elsewhere, several = (
        (found_BD - g_BD * by_B.unsqueeze(1)).abs().amax() > OFF * g.abs().amax()
        for by_B in (own_B, of_each_B)
    )
    return elsewhere & ~several


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _uses(starts: Iterable[Any], stops: Iterable[Any] = ()) -> Counter[int]:
    """How many operations use each leaf, by the leaf's id, not looking beyond some nodes."""
    uses: Counter[int] = Counter()
    seen, stack = set(stops), [*starts]
    stack = [node for node in stack if node not in seen]
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
