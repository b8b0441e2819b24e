"""Per-sample gradients of (outputs . s), as rows of each layer's matrix or as a whole."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.dots import SMALLEST_PART
from influence_jobs.gradients.fallback import Fallback
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.requirements import require_plain
from influence_jobs.gradients.rules import LayerRule, nearest_rule, rule_of, supported
from influence_jobs.gradients.rules.base import product_of_rows
from influence_jobs.gradients.rules.blocks import sample_blocks
from influence_jobs.gradients.taps import TappedModel

#: Takes a layer's name, rows x_t (B, T, J) of the matrix's input, g_t (B, T, C) its output.
OnRows = Callable[[str, Tensor, Tensor], None]
#: Takes a parameter's name, and gradients (b, *shape) of the next b samples.
OnGradients = Callable[[str, Tensor], None]


class OutputGradients(TappedModel):
    """J^T s of every sample, by the parameters of a space; J is the Jacobian of its outputs.

    A weight whose layer applies one matrix to every position comes as rows: sum_t g_t x_t^T is its
    gradient, over all positions of all calls. Its bias is sum_t g_t. All other gradients come as
    they are, through the layer's rule or a `Fallback`.

    Args:
        model: In eval mode.
        space: The parameters.
        outputs: (model, batch) to outputs (B, ...).
        like: A batch of a few samples and vectors s of its outputs' shape. It shows how the model
            uses its parameters.

    Attributes:
        matrices: The rule of each layer whose weight comes as rows.
        names: By such a layer, full names of the parameters that its rows are of: weight, bias.
        others: Full names of all other parameters.

    Raises:
        ModelError: A gradient differs from that of plain autograd.
    """

    _result = "gradients of the outputs"
    _relative_to = "the parameter's largest"

    def __init__(
        self,
        model: nn.Module,
        space: ParameterSpace,
        outputs: Callable[[nn.Module, Any], Tensor],
        like: tuple[Any, Tensor],
    ) -> None:
        def weighted(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
            products = outputs(model, batch[0]) * batch[1]
            return products.reshape(len(products), -1).sum(1)

        dtypes = {parameter.dtype for parameter in space.parameters().values()}
        precision = "float64" if torch.float64 in dtypes else "float32"
        super().__init__(model, weighted, precision)  # type: ignore[arg-type]
        self._space = space
        self.matrices: dict[str, LayerRule[Any]] = {}
        self.names: dict[str, list[str]] = {}
        self.others: list[str] = []
        # Of `others`, those that a rule serves, by layer.
        self._ruled: dict[str, list[str]] = {}
        self._freeze()
        try:
            try:
                self._look(like, nearest_rule)
            except ModelError:  # a subclass may compute otherwise than the layer it inherits from
                self._look(like, lambda layer: rule_of(layer) if supported(layer) else None)
        except BaseException:
            self.close()
            raise

    def visit(self, batch: tuple[Any, Tensor], on_rows: OnRows, on_gradients: OnGradients) -> None:
        """Compute the gradients of a batch, and give them to the two functions.

        Raises:
            ModelError: The model is used in another way than in the batch `like`.
        """
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.matrices}

        def visit(name: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            if name in self.matrices:
                rows[name].append(rule.rows(a, g))
            for parameter in self._ruled.get(name, ()):
                for block in sample_blocks(len(g), [self._model.get_parameter(parameter)]):
                    on_gradients(parameter, _own_gradient(rule, parameter, a[block], g[block]))

        with torch.autocast(self._device.type, enabled=False):
            recorded = self._fallback.calls(batch)
            reached = bool(self._layers or recorded)
            size = self._run(batch, visit, recorded) if reached else len(batch[1])
            for name, pairs in rows.items():
                x, g = zip(*pairs, strict=True)
                on_rows(name, torch.cat(x, dim=1), torch.cat(g, dim=1))
            for found in self._fallback.gradients(batch, size):
                for name, gradients in found.items():
                    on_gradients(name, gradients.to(self._dtype))

    def __call__(self, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        """The gradients as they are, {parameter: (B, *shape)}: for a few samples."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._space.shapes}

        def on_rows(layer: str, x: Tensor, g: Tensor) -> None:
            weight, *bias = self.names[layer]
            found[weight].append(self.matrices[layer].from_matrix(product_of_rows(x, g)))
            for name in bias:
                found[name].append(g.sum(1))

        self.visit(batch, on_rows, lambda name, gradients: found[name].append(gradients))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _look(
        self, like: tuple[Any, Tensor], rule_for: Callable[[nn.Module], LayerRule[Any] | None]
    ) -> None:
        """Find how each parameter's gradients come, and compare them with plain autograd."""
        self.matrices, self.names, self._ruled = {}, {}, {}
        self._fallback = self._routed(like, rule_for)
        self.check(like)

    def _routed(
        self, like: tuple[Any, Tensor], rule_for: Callable[[nn.Module], LayerRule[Any] | None]
    ) -> Fallback:
        owners: dict[str, list[str]] = {}
        for name in self._space.shapes:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        modules = {owner: self._model.get_submodule(owner) for owner in owners}
        parameters = self._space.parameters()
        usage = self._usage(like, modules)
        slow, tapped = list[str](), dict[str, LayerRule[Any]]()
        for owner, names in owners.items():
            require_plain(owner, modules[owner])
            rule = rule_for(modules[owner])
            if rule is None or not _known(modules[owner]):
                slow += names
                continue
            held = [name for name in names if usage.in_calls(owner, [parameters[name]])]
            slow += [name for name in names if name not in held]
            weight, bias = f"{owner}.weight".lstrip("."), f"{owner}.bias".lstrip(".")
            if weight in held and rule.one_matrix:
                self.matrices[owner] = rule
                columns = {weight, bias} if rule.bias_is_column else {weight}
                self.names[owner] = [name for name in held if name in columns]
                held = [name for name in held if name not in columns]
            if held and usage.calls(owner) > 1:
                slow += held
            elif held:
                self._ruled[owner] = held
            if owner in self.matrices or owner in self._ruled:
                tapped[owner] = rule
        in_rows = {name for names in self.names.values() for name in names}
        self.others = [name for name in self._space.shapes if name not in in_rows]
        self._attach(tapped)
        fallback = self._fallback_of(slow)
        if slow and usage.size > 1:
            fallback.find_forms(like, usage.size, {})
        return fallback

    def _parameters(self) -> dict[str, Tensor]:
        return self._space.parameters()

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        # The gradient by a bias of attention's keys is zero but for rounding, which other
        # parameters' gradients are the measure of.
        largest = {name: gradient.abs().max() for name, gradient in gradients.items()}
        floor = SMALLEST_PART * torch.stack([*largest.values()]).max()
        return {
            name: (
                gradient.unsqueeze(0).to(self._dtype),
                largest[name].maximum(floor).to(self._dtype).expand(1, *gradient.shape),
            )
            for name, gradient in gradients.items()
        }


def _known(module: nn.Module) -> bool:
    """Whether a module has no parameters but those that its rule knows."""
    return {name for name, _ in module.named_parameters()} <= {"weight", "bias"}


def _own_gradient(rule: LayerRule[Any], parameter: str, a: Tensor, g: Tensor) -> Tensor:
    is_weight = parameter.rpartition(".")[2] == "weight"
    return rule.weight_gradient(a, g) if is_weight else rule.bias_gradient(g)
