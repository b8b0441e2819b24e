"""Per-sample gradients of parameters that no rule serves, in three forms, the cheapest first.

`layer`: the vector-Jacobian product of the smallest layer whose one call has all uses of the
parameter, mapped over the samples; it shares the pass that the rules go by. `model`: the gradient
of one sample's loss by the parameter, mapped over the samples: a forward and a backward more, for
all such parameters together. `sample`: plain autograd, sample by sample.

Which form serves a parameter is found with the first batch: the first two samples' gradients must
agree with plain autograd.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError
from influence_jobs.gradients.batches import flattened, has_samples
from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.one_loss_each import CAUSES, mixed_losses
from influence_jobs.gradients.recorded_call import NotMappable, RecordedCall
from influence_jobs.gradients.reference import LossModule
from influence_jobs.gradients.rules.blocks import sample_blocks
from influence_jobs.gradients.transforms import mappable_kernels
from influence_jobs.memory import is_out_of_memory

Form = Literal["layer", "model", "sample"]
_LISTED = 6  # layers in a line
# What each form does, and what that takes against rules alone (measured on a CPU).
_COST: dict[Form, str] = {
    "layer": "mapped over the samples through their own layer (1 to 3 times as slow, recurrent 20)",
    "model": "mapped over the samples through the whole model (1.5 to 4 times as slow)",
    "sample": "sample by sample (as slow as batches of one)",
}


class Fallback:
    """The gradients of some parameters, each in the form that was found for it.

    Args:
        model: In eval mode.
        parameters: Full names, each of another parameter.
        forward: From a batch to one loss a sample, as the engine computes it.
        plain: A batch of one sample and parameters to the gradients, by plain autograd.
        record: Runs the engine's pass over a batch with some calls recorded.
        tolerance: Largest difference to plain autograd, as a part of the largest number.

    Attributes:
        forms: By parameter, once they are found.
        reasons: By parameter, what speaks against the forms that were tried before.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[str],
        *,
        forward: Callable[[Any], Tensor],
        plain: Callable[[Any, Sequence[str]], dict[str, Tensor]],
        record: Callable[[Any, Sequence[RecordedCall]], None],
        tolerance: float,
    ) -> None:
        self.parameters = list(parameters)
        self.forms: dict[str, Form] = dict.fromkeys(self.parameters, "sample")
        self.reasons: dict[str, str] = {}
        self._model, self._forward, self._plain, self._record = model, forward, plain, record
        self._tolerance = tolerance
        self._calls: dict[str, RecordedCall] = {}
        self._homes: dict[str, str] = {}  # by parameter of form `layer`
        self._cut: list[bool] | None = None  # which leaves of a batch have the samples

    def calls(self, batch: Any) -> list[RecordedCall]:
        """What a pass over a batch must record before `gradients`."""
        for call in self._calls.values():
            call.samples = self.size_of(batch)
        return [*self._calls.values()]

    def find_forms(self, batch: Any, size: int, homes: Mapping[str, Sequence[str]]) -> None:
        """Choose each parameter's form, with the first two samples of a batch of two or more.

        Args:
            homes: By parameter the layers whose one call has all its uses, the smallest first.

        Raises:
            ModelError: A sample's loss depends on the others, or the batch cannot be cut.
        """
        self._cut = [has_samples(leaf, size) for leaf in flattened(batch)[0]]
        two = self._samples(batch, slice(0, 2))
        alone = [self._samples(batch, slice(i, i + 1)) for i in range(2)]
        self._require_alone(batch, alone)
        rows = [self._plain(sample, self.parameters) for sample in alone]
        wanted = {name: torch.stack([row[name] for row in rows]) for name in self.parameters}
        self._find_homes(two, alone[0], wanted, homes)
        left = self._of("sample")
        if not left:
            return
        try:
            found = _whole(self._by_model(two, left))
        except Exception as error:  # the model may raise anything when mapped
            if is_out_of_memory(error):
                raise
            self._say(left, error)
            return
        for name in left:
            if self._agree(found[name], wanted[name]):
                self.forms[name] = "model"
            else:
                self._say([name], "mapped over the samples, it differs from plain autograd")

    def gradients(self, batch: Any, size: int) -> Iterator[dict[str, Tensor]]:
        """{parameter: (samples, *shape)}: of some parameters and samples after others.

        Each parameter's samples come in their order. The engine's pass over this batch, with
        `calls` recorded, must have come before.

        Args:
            size: B.

        Raises:
            ModelError: A layer's call is other than in the first batch.
        """
        for home, call in self._calls.items():
            yield from self._by_layer(call, [n for n, h in self._homes.items() if h == home], size)
            call.forget()
        if names := self._of("model"):
            yield from self._by_model(batch, names)
        if names := self._of("sample"):
            for i in range(size):
                sample = self._samples(batch, slice(i, i + 1)) if size > 1 else batch
                found = self._plain(sample, names)
                yield {name: gradient.unsqueeze(0) for name, gradient in found.items()}

    def size_of(self, batch: Any) -> int:
        """B of a batch like the first."""
        leaves, _ = flattened(batch)
        if self._cut is None:
            with torch.no_grad():
                return len(self._forward(batch))
        return next(
            len(leaf)
            for leaf, of_sample in zip(leaves, self._flags(leaves), strict=True)
            if of_sample
        )

    def _of(self, form: Form) -> list[str]:
        return [name for name in self.parameters if self.forms[name] == form]

    def _by_layer(
        self, call: RecordedCall, names: Sequence[str], size: int
    ) -> Iterator[dict[str, Tensor]]:
        prefix = len(call.name) + 1
        own = {name[prefix:]: self._model.get_parameter(name) for name in names}
        for found in call.gradients(own, size):
            yield {f"{call.name}.{name}": gradient for name, gradient in found.items()}

    def _by_model(self, batch: Any, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        leaves, structure = flattened(batch)
        # Texts cannot be mapped: a model that reads them fails or differs, and is cut by samples.
        cut = [
            of_sample and isinstance(leaf, Tensor)
            for leaf, of_sample in zip(leaves, self._flags(leaves), strict=True)
        ]
        wrapped = LossModule(self._model, lambda _, batch: self._forward(batch))
        parameters = {f"model.{name}": self._model.get_parameter(name).detach() for name in names}

        def loss(parameters: dict[str, Tensor], mapped: list[Tensor]) -> Tensor:
            samples = iter(mapped)
            whole = [
                next(samples).unsqueeze(0) if of_sample else leaf
                for leaf, of_sample in zip(leaves, cut, strict=True)
            ]
            found: Tensor = functional_call(
                wrapped, parameters, (pytree.tree_unflatten(whole, structure),)
            )
            return found.squeeze(0)

        mapped = [leaf for leaf, of_sample in zip(leaves, cut, strict=True) if of_sample]
        for block in sample_blocks(len(mapped[0]), parameters.values()):
            with mappable_kernels(self._model):
                found = vmap(grad(loss), in_dims=(None, 0))(
                    parameters, [leaf[block] for leaf in mapped]
                )
            yield {name.removeprefix("model."): gradient for name, gradient in found.items()}

    def _find_homes(
        self,
        two: Any,
        one: Any,
        wanted: Mapping[str, Tensor],
        homes: Mapping[str, Sequence[str]],
    ) -> None:
        """Give the form `layer` to the parameters for which one of their homes proves right."""
        calls = {
            home: RecordedCall(home, self._model.get_submodule(home))
            for name in self.parameters
            for home in homes.get(name, ())
        }
        if not calls:
            return
        unlearned = self._learn(calls, two, one, wanted, homes)
        for name in self.parameters:
            for home in homes.get(name, ()):
                try:
                    if home in unlearned:
                        raise unlearned[home]
                    found = _whole(self._by_layer(calls[home], [name], 2))
                except Exception as error:  # as above
                    if is_out_of_memory(error):
                        raise
                    self._say([name], error)
                    continue
                if self._agree(found[name], wanted[name]):
                    self.forms[name], self._homes[name] = "layer", home
                    self._calls[home] = calls[home]
                    break
                self._say([name], f"layer '{home}' alone differs from plain autograd")

    def _learn(
        self,
        calls: Mapping[str, RecordedCall],
        two: Any,
        one: Any,
        wanted: Mapping[str, Tensor],
        homes: Mapping[str, Sequence[str]],
    ) -> dict[str, Exception]:
        """Record two samples in calls whose axes are known; of the others what is in the way.

        What follows a call that all samples share has them on an axis of its own as soon as that
        call's output is repeated. So of the shared calls the first is repeated, and all are looked
        at again.
        """
        shared: list[RecordedCall] = []
        refused: dict[str, Exception] = {}

        def recorded(batch: Any, samples: int) -> None:
            for call in shared:
                call.samples = samples
            self._record(batch, [*calls.values()])

        while True:
            recorded(one, 1)
            shapes = {home: call.shapes() for home, call in calls.items()}
            recorded(two, 2)
            unlearned, found = dict(refused), []
            for home, call in calls.items():
                if call in shared or home in refused:
                    continue
                try:
                    call.learn_axes(shapes[home], 2)
                except NotMappable as error:
                    unlearned[home] = error
                if call.shared:
                    found.append(call)
            if not found:
                return unlearned
            first = min(found, key=lambda call: call.place)
            for call in found:
                if call is not first:
                    call.refuse_shared()
            shared.append(first)
            own = [name for name in self.parameters if first.name in homes.get(name, ())]
            try:
                recorded(two, 2)
                rows = _whole(self._by_layer(first, own, 2))
                if not all(self._agree(rows[name], wanted[name]) for name in own):
                    raise NotMappable("what all samples share cannot be repeated for each")
            except Exception as error:  # as above
                if is_out_of_memory(error):
                    raise
                shared.remove(first)
                first.refuse_shared()
                refused[first.name] = error

    def _require_alone(self, batch: Any, alone: Sequence[Any]) -> None:
        """Refuse losses that are others for a sample alone; no form by samples could tell."""
        with torch.no_grad():
            losses_B = self._forward(batch)
            together, size = losses_B[: len(alone)], len(losses_B)
            try:
                apart = torch.cat([self._forward(sample) for sample in alone])
            except Exception as error:  # whatever losses raise of what was not cut
                if is_out_of_memory(error):
                    raise
                apart = together[:0]
        scale = together.abs().max()
        if len(apart) != len(alone):
            raise ModelError(f"a sample's loss cannot be computed alone: {CAUSES}")
        if (apart - together).abs().max() > self._tolerance * scale:
            raise ModelError(mixed_losses(apart, together, size))

    def _samples(self, batch: Any, block: slice) -> Any:
        leaves, structure = flattened(batch)
        cut = [
            leaf[block] if of_sample else leaf
            for leaf, of_sample in zip(leaves, self._flags(leaves), strict=True)
        ]
        return pytree.tree_unflatten(cut, structure)

    def _flags(self, leaves: Sequence[Any]) -> list[bool]:
        assert self._cut is not None
        if len(leaves) != len(self._cut):
            raise ModelError(
                f"a batch has {len(leaves)} parts, and the first batch had {len(self._cut)}: give "
                "all batches the same parts"
            )
        return self._cut

    def _agree(self, found: Tensor, wanted: Tensor) -> bool:
        limit = self._tolerance * wanted.abs().max()
        return bool(((found - wanted).abs() <= limit).all())

    def _say(self, names: Sequence[str], reason: object) -> None:
        line = str(reason).partition("\n")[0]
        self.reasons |= {name: line for name in names if name not in self.reasons}


def slow_lines(slow: Mapping[str, tuple[Form, str]]) -> list[str]:
    """Lines for people about layers that no rule serves: a form each, with what it costs.

    Args:
        slow: By layer its form, and why no rule serves it.
    """
    lines = []
    for form, cost in _COST.items():
        reasons: dict[str, list[str]] = {}
        for name, (of, reason) in slow.items():
            if of == form:
                reasons.setdefault(reason, []).append(name)
        told = "; ".join(
            f"{', '.join(names[:_LISTED])}"
            f"{f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''} ({reason})"
            for reason, names in reasons.items()
        )
        if told:
            lines.append(f"gradients without a rule are computed {cost}: {told}")
    return lines


def _whole(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All samples' gradients at once."""
    found = [*parts]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
