"""What a layer type must define for the engines, and what follows from that.

A `LayerRule` gives each sample's weight and bias gradient. It computes them from the layer's input
`a` and the gradient `g` of the summed losses by the layer's output. Both have the batch as first
axis, and the weight's dtype. Norms, dot products and quadratic forms follow from these two
gradients. A rule overrides them where there is a faster way, often one that stores no gradient.

Letters: B batch, Q vectors, C outputs (rows of the weight), I inputs of one output, J columns of
the weight as a matrix, T positions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.metric import Metric
from influence_jobs.gradients.rules.blocks import (
    SampleShape,
    in_blocks,
    rows_rotated_first,
    through_gram,
)
from influence_jobs.gradients.rules.reductions import reduce_norms, reduce_read, reduced_shape
from influence_jobs.terms import Reduction

# What a subclass may define anew and still compute the same.
_CHANGE_NOTHING = {
    *vars(type("Empty", (), {})),
    "__init__",
    "extra_repr",
    "__repr__",
    "__annotations__",
}
_CHANGE_NOTHING |= {"__static_attributes__", "__firstlineno__", "__constants__", "reset_parameters"}

M = TypeVar("M", bound=nn.Module)

_RULES: dict[type[nn.Module], "type[LayerRule[Any]]"] = {}
# Rules of types from packages that are not imported here, by the type's full name.
_RULES_BY_NAME: dict[str, "type[LayerRule[Any]]"] = {}


class LayerRule(ABC, Generic[M]):
    """Per-sample gradients of one type of layer. Defining a subclass registers it.

    Args:
        module: The layer; its weights may change between calls.

    Attributes:
        layer: The type. A subclass of `LayerRule` without it is a base class and is not registered.
        layer_named: In its place the full name of a type whose package is not imported here.
        numbered: Whether `--layer 1` counts the layer and `--layer all` includes it.
        refused_options: Attributes of the layer that must be off; with them the gradient would be
            wrong.
        read_as: The axes of `kernel_shape`, as a text for the docs.
        bias_is_column: Whether the bias is one more column of the matrix of `rows`, for an input
            of one.
        channel_axis: The axis of the layer's output with the C outputs. The other axes after the
            batch are positions. None if the rows of the weight are not outputs, so that attribution
            cannot use the layer.
    """

    layer: ClassVar[type[nn.Module]]
    layer_named: ClassVar[str]
    numbered: ClassVar[bool] = False
    refused_options: ClassVar[tuple[str, ...]] = ()
    read_as: ClassVar[str] = "(C, I, 1, 1)"
    bias_is_column: ClassVar[bool] = False
    channel_axis: ClassVar[int | None] = -1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "layer_named" in vars(cls):
            _RULES_BY_NAME[cls.layer_named] = cls
        if "layer" not in vars(cls):
            return
        if cls.layer in _RULES:
            raise TypeError(
                f"{cls.layer.__name__} already has a rule: {_RULES[cls.layer].__name__}"
            )
        _RULES[cls.layer] = cls

    def __init__(self, module: M) -> None:
        self.module = module

    @classmethod
    def type_name(cls) -> str:
        """The layer's type as messages and the docs name it."""
        return cls.layer.__name__ if hasattr(cls, "layer") else cls.layer_named.rpartition(".")[2]

    @abstractmethod
    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """Each sample's gradient by the weight, (B, *weight shape)."""

    def recorded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What the rule reads of a call's arguments, the batch first; None: not such a call."""
        given: Tensor = args[0] if args else kwargs["input"]
        return given

    def bias_gradient(self, g: Tensor) -> Tensor:
        """Each sample's gradient by the bias, (B, *bias shape); called only if there is a bias."""
        raise NotImplementedError(f"{type(self).__name__} defines no bias_gradient()")

    @property
    def one_matrix(self) -> bool:
        """Whether the layer applies one matrix to every position, so that `rows` are right."""
        return False

    def rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, T, J) and g_t (B, T, C): as a matrix the weight gradient is sum_t g_t x_t^T."""
        raise NotImplementedError(f"{type(self).__name__} has no rows: its weight is no one matrix")

    def factors(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """l_t and r_t (B, T, J) with the weight gradient sum_t l_t r_t^T as a matrix.

        Returns:
            l_t are (B, T, C), or the ids (B, T) of unit vectors. None: there are none.
        """
        if not self.one_matrix:
            return None
        x_BTJ, g_BTC = self.rows(a, g)
        return g_BTC, x_BTJ

    def as_matrix(self, weights: Tensor) -> Tensor:
        """Tensors (B, *weight shape) as the matrices (B, C, J) of `rows`."""
        return self.as_read(weights).flatten(2)

    def from_matrix(self, matrices: Tensor) -> Tensor:
        """The inverse of `as_matrix`: (B, *weight shape)."""
        return matrices.reshape(len(matrices), *self.weight.shape)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape (C, I, *kernel) to which norms reshape the weight."""
        return len(self.weight), self.weight[0].numel(), 1, 1

    def as_read(self, gradient: Tensor) -> Tensor:
        """A gradient (B, *weight shape) as it is read, (B, *kernel_shape)."""
        return gradient.reshape(len(gradient), *self.kernel_shape)

    def has_batch_axis(self, output: Tensor) -> bool:
        """Whether an output of the layer has a batch axis; without it, it is of a single sample."""
        return output.ndim >= 2

    def channels_first(self, output: Tensor) -> Tensor:
        """An output of the layer, rearranged to (B, C, *positions)."""
        assert self.channel_axis is not None
        return output.movedim(self.channel_axis, 1)

    @property
    def weight(self) -> Tensor:
        """The layer's current weight."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's current bias; None if it has none."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    def norms(self, a: Tensor, g: Tensor, reduction: Reduction) -> Tensor:
        """Norms of each sample's weight gradient, as `reduce_gradient` defines them."""
        return reduce_norms(self.kernel_norms(a, g), reduction)

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """L2 norms over I of each sample's weight gradient, (B, C, *kernel)."""

        def norms(a: Tensor, g: Tensor) -> Tensor:
            gradient = self.as_read(self.weight_gradient(a, g))
            found: Tensor = torch.linalg.vector_norm(gradient, dim=2)
            return found

        return in_blocks(norms, a, g, self.weight.numel())

    def arrange(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Vectors {"weight" or "bias": (Q, *shape)} in the layout that `dots` reads, contiguous."""
        return {
            name: (self.arrange_weight(part) if name == "weight" else part).contiguous()
            for name, part in vectors.items()
        }

    def arrange_weight(self, vectors_Q: Tensor) -> Tensor:
        """Vectors (Q, *weight shape), their axes in the order that `weight_dots` reads."""
        return vectors_Q

    def dots(self, vectors: Mapping[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
        """Dot products (B, Q) of vectors from `arrange` with each sample's gradient."""
        bias_BC = self.bias_gradient(g).flatten(1) if "bias" in vectors else None
        if "weight" not in vectors:  # it is frozen
            assert bias_BC is not None
            return bias_BC @ vectors["bias"].flatten(1).t()
        dots_BQ = self.weight_dots(vectors["weight"], a, g)
        if bias_BC is not None:
            dots_BQ.addmm_(bias_BC, vectors["bias"].flatten(1).t())
        return dots_BQ

    def weight_dots(self, vectors: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """The weight's part of `dots`, (B, Q), a new tensor; vectors from `arrange_weight`."""

        def dots(a: Tensor, g: Tensor) -> Tensor:
            return self.weight_gradient(a, g).flatten(1) @ vectors.flatten(1).t()

        return in_blocks(dots, a, g, self.weight.numel())

    def projected(
        self, left_CK: Tensor | None, right_JI: Tensor | None, a: Tensor, g: Tensor
    ) -> Tensor:
        """L^T M R (B, K, I) of each sample's weight gradient as a matrix M (C, J).

        Args:
            left_CK: L; None for the unit matrix.
            right_JI: R; None for the unit matrix.
        """

        def of_rows(a: Tensor, g: Tensor) -> Tensor:
            x_BTJ, g_BTC = self.rows(a, g)
            return product_of_rows(times(x_BTJ, right_JI), times(g_BTC, left_CK))

        def of_gradient(a: Tensor, g: Tensor) -> Tensor:
            matrix_BCJ = times(self.as_matrix(self.weight_gradient(a, g)), right_JI)
            return matrix_BCJ if left_CK is None else left_CK.t() @ matrix_BCJ

        if self.one_matrix:
            patches = math.prod(self.kernel_shape[2:]) * (a[0].numel() + g[0].numel())
            return in_blocks(of_rows, a, g, patches)
        return in_blocks(of_gradient, a, g, self.weight.numel())

    def squared_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """Squared L2 norm of each sample's gradient by weight and bias, (B,)."""
        squares_B = in_blocks(self.weight_squares, a, g, self.weight.numel())
        if self.bias is not None:
            squares_B += self.bias_gradient(g).flatten(1).square().sum(1)
        return squares_B

    def weight_squares(self, a: Tensor, g: Tensor) -> Tensor:
        """The weight's part of `squared_norms`, (B,), for a block of samples."""
        return self.kernel_norms(a, g).flatten(1).square().sum(1)


class MatrixRule(LayerRule[M]):
    """The rule of a layer that applies one matrix (C, J) to every position: y_t = W x_t + b.

    A sample's weight gradient is sum_t g_t x_t^T. So a rule only has to define the rows x_t and
    g_t. The quadratic forms in a Kronecker eigenbasis and EK-FAC's factors, the second moments of
    the rows, follow from them too.

    With few positions, norms come from Gram matrices of the rows, without the gradient:
    |sum_t g_t x_t^T|^2 = sum_tu (x_t . x_u)(g_t . g_u). These sums are taken in float64, because
    cancellation would cost half of float32's digits.
    """

    numbered = True
    bias_is_column = True

    @property
    def one_matrix(self) -> bool:
        """Whether the rows are right: every output sees all inputs."""
        return True

    def rows(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.input_rows(a), self.output_rows(g)

    @abstractmethod
    def input_rows(self, a: Tensor) -> Tensor:
        """The input x_t of the matrix at every position, (B, T, J)."""

    @abstractmethod
    def output_rows(self, g: Tensor) -> Tensor:
        """The gradient g_t of the output at every position, (B, T, C)."""

    def kernel_rows(self, a: Tensor) -> Tensor:
        """The input's rows with one kernel offset after the other, (B, T, k, I)."""
        rows_BTJ = self.input_rows(a)
        return rows_BTJ.reshape(*rows_BTJ.shape[:2], self.kernel_shape[1], -1).transpose(2, 3)

    def sample_shape(self, g: Tensor) -> SampleShape:
        """The sizes of a sample, from the output's gradient."""
        outputs, inputs, *kernel = self.kernel_shape
        return SampleShape(math.prod(g.shape[1:]) // outputs, outputs, inputs, math.prod(kernel))

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        gradient_BCJ = product_of_rows(self.input_rows(a), self.output_rows(g))
        return self.from_matrix(gradient_BCJ)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return self.output_rows(g).sum(1)

    def by_gram(self, g: Tensor, *, whole: bool) -> bool:
        """Whether norms, one of all of the gradient or one a kernel, come from Gram matrices."""
        return self.one_matrix and through_gram(self.sample_shape(g), whole=whole, device=g.device)

    def norms(self, a: Tensor, g: Tensor, reduction: Reduction) -> Tensor:
        if reduction == "layer" and self.by_gram(g, whole=True):
            return self.gram_squares(a, g).sqrt().to(g.dtype)
        return super().norms(a, g, reduction)

    def kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        if self.by_gram(g, whole=False):
            return self.gram_kernel_norms(a, g)
        return super().kernel_norms(a, g)

    def weight_squares(self, a: Tensor, g: Tensor) -> Tensor:
        if self.by_gram(g, whole=True):
            return self.gram_squares(a, g).to(g.dtype)
        return super().weight_squares(a, g)

    def gram_squares(self, a: Tensor, g: Tensor) -> Tensor:
        """Squared norm of each sample's weight gradient, (B,), in float64."""

        def squares(a: Tensor, g: Tensor) -> Tensor:
            x_BTJ, g_BTC = self.kernel_rows(a).flatten(2).double(), self.output_rows(g).double()
            products_BTT = (x_BTJ @ x_BTJ.transpose(1, 2)).mul_(g_BTC @ g_BTC.transpose(1, 2))
            return products_BTT.sum((1, 2)).clamp_(min=0)

        return in_blocks(squares, a, g, 2 * self.sample_shape(g).rows)

    def gram_kernel_norms(self, a: Tensor, g: Tensor) -> Tensor:
        """The kernel norms (B, C, *kernel): of an output and offset, sqrt(g_c^T (X X^T) g_c)."""
        kernel, shape = self.kernel_shape[2:], self.sample_shape(g)

        def norms(a: Tensor, g: Tensor) -> Tensor:
            rows_BkTI = self.kernel_rows(a).transpose(1, 2)
            x_BkTI = rows_BkTI.to(torch.float64, memory_format=torch.contiguous_format)
            g_BTC = self.output_rows(g).double()
            grams_BTT = (x_BkTI @ x_BkTI.transpose(2, 3)).flatten(1, 2)  # one below the other
            products_BkTC = (grams_BTT @ g_BTC).view(*x_BkTI.shape[:3], -1).mul_(g_BTC.unsqueeze(1))
            norms_BkC = products_BkTC.sum(2).clamp_(min=0).sqrt_().to(g.dtype)
            return norms_BkC.transpose(1, 2).reshape(len(g), -1, *kernel)

        largest = shape.offsets * shape.positions * max(shape.positions, shape.outputs)
        return in_blocks(norms, a, g, 2 * max(shape.rows, largest))

    def arrange_metric(self, metric: Metric) -> Metric:
        """The metric, with the rows of V in the order of the columns of `gradient_matrix`."""
        inputs, numbers = self.kernel_shape[1], math.prod(self.kernel_shape[1:])
        weight_rows, bias_rows = metric.inputs_JJ[:numbers], metric.inputs_JJ[numbers:]
        rows_IkJ = weight_rows.reshape(inputs, -1, weight_rows.shape[1])
        ordered = torch.cat([rows_IkJ.transpose(0, 1).flatten(0, 1), bias_rows])
        return Metric(metric.outputs_CC, ordered, metric.weights_CJ)

    def gradient_matrix(self, a: Tensor, g: Tensor) -> Tensor:
        """Each sample's gradient by [weight, bias], (B, C, J), ordered by kernel offset.

        J includes the bias if any.
        """
        gradient_BCIk = self.as_read(self.weight_gradient(a, g)).flatten(3)
        columns = [gradient_BCIk.transpose(2, 3).flatten(2)]
        if self.bias is not None:
            columns.append(self.bias_gradient(g).unsqueeze(2))
        return torch.cat(columns, dim=2)

    def quadratic(self, metric: Metric, a: Tensor, g: Tensor) -> Tensor:
        """The form of each sample's gradient, (B,), in a metric from `arrange_metric`."""
        u_CC, v_JJ, d_CJ = metric.outputs_CC, metric.inputs_JJ, metric.weights_CJ

        def rotated_gradient(a: Tensor, g: Tensor) -> Tensor:
            return u_CC.t() @ (self.gradient_matrix(a, g) @ v_JJ)

        def rotated_rows(a: Tensor, g: Tensor) -> Tensor:
            rows_BTJ = self.kernel_rows(a).flatten(2)
            weight_rows = v_JJ[: rows_BTJ.shape[2]]
            inputs = F.linear(rows_BTJ, weight_rows.t(), None if self.bias is None else v_JJ[-1])
            return product_of_rows(inputs, self.output_rows(g) @ u_CC)

        shape = self.sample_shape(g)
        rows_first = self.one_matrix and rows_rotated_first(shape)
        rotated_BCJ = rotated_rows if rows_first else rotated_gradient

        def forms(a: Tensor, g: Tensor) -> Tensor:
            return rotated_BCJ(a, g).square_().flatten(1) @ d_CJ.flatten()

        return in_blocks(forms, a, g, max(d_CJ.numel(), shape.rows if rows_first else 0))


def times(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """Rows (..., J) times a matrix (J, I); None for the unit matrix."""
    return rows if matrix is None else rows @ matrix


def product_of_rows(a_BTJ: Tensor, g_BTC: Tensor) -> Tensor:
    """The gradient (B, C, J) of a matrix: sum_t g_t a_t^T."""
    return torch.bmm(g_BTC.transpose(1, 2), a_BTJ)


def registered() -> tuple[type[LayerRule[Any]], ...]:
    """All rules, sorted by the name of their layer type."""
    rules = *_RULES.values(), *_RULES_BY_NAME.values()
    return tuple(sorted(rules, key=lambda rule: rule.type_name()))


def supported_layers() -> str:
    """The layer types that have a rule, as messages list them."""
    return ", ".join(rule.type_name() for rule in registered())


def has_factors(module: nn.Module) -> bool:
    """Whether a layer applies one matrix to every position, so that EK-FAC can factor it."""
    rule = nearest_rule(module)
    return rule is not None and rule.one_matrix


def matrix_layers() -> str:
    """The layer types that apply one matrix to every position, as messages list them."""
    return ", ".join(rule.type_name() for rule in registered() if issubclass(rule, MatrixRule))


def supported(module: nn.Module) -> bool:
    """Whether a layer's type has a rule: itself, or what it inherits all that it computes from."""
    return _exact_rule(type(module)) is not None


def rule_of(module: nn.Module) -> LayerRule[Any]:
    """The rule for a layer's type, which must compute what the rule knows.

    Raises:
        ModelError: There is no such rule.
    """
    rule = _exact_rule(type(module))
    if rule is None:
        raise ModelError(
            f"no gradient rule for a layer of type {type(module).__name__}; supported: "
            f"{supported_layers()} (and subclasses that change nothing)"
        )
    return rule(module)


def nearest_rule(module: nn.Module) -> LayerRule[Any] | None:
    """The rule for a layer's type or its nearest base class with a rule; None if there is none."""
    for kind in type(module).__mro__:
        if rule := _rule_for(kind):
            return rule(module)
    return None


def _exact_rule(kind: type) -> type[LayerRule[Any]] | None:
    """The rule for a type; a subclass that overrides anything may compute something else."""
    overridden: set[str] = set()
    for base in kind.__mro__:
        if rule := _rule_for(base):
            inherited = {*dir(base)} - _CHANGE_NOTHING
            return None if overridden & inherited else rule
        overridden |= {*vars(base)}
    return None


def _rule_for(kind: type) -> type[LayerRule[Any]] | None:
    return _RULES.get(kind) or _RULES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")


def norm_shape(module: nn.Module, reduction: Reduction) -> tuple[int, ...]:
    """Shape of one sample's norms, for example (96, 3, 3), (96,) or ().

    Raises:
        ModelError: There is no rule for this type of layer.
    """
    return reduced_shape(rule_of(module).kernel_shape, reduction)


def reduce_gradient(module: nn.Module, gradient: Tensor, reduction: Reduction) -> Tensor:
    """Norms of weight gradients (B, *weight shape) of a layer with a rule."""
    return reduce_read(rule_of(module).as_read(gradient), reduction)
