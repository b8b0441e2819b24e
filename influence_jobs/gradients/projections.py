"""Seeded random projections of gradients: two-sided for matrices, so that they are cheap to apply.

A parameter's gradient is a matrix M (C, J); its projection is L^T M R, with random L (C, K) and
R (J, I), whose entries are independent with mean 0. Rows have a mean square norm of 1. Then the
projection keeps dot products in expectation: E<Pu, Pv> = <u, v>. It is linear, so the gradient
sum_t g_t x_t^T of a layer is projected without being formed: sum_t (L^T g_t)(R^T x_t)^T (Choe et
al.: "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions", arXiv
2405.13954).

The parameters of a group (a layer) have independent projections, which are added. The sum is a
projection of all of the group's parameters, with the same property. A group that has no more than
D numbers can be kept as it is; then its dot products are exact.

Letters: B batch, C outputs, J columns of the weight as a matrix, K and I what is kept of both, and
D = K I.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.rules import LayerRule, rule_of, supported
from influence_jobs.terms import Distribution
from influence_jobs.transfers import on_device

# In a row of a sparse projection, one in each block of columns. Kane and Nelson: "Sparser
# Johnson-Lindenstrauss Transforms", J. ACM 2014.
NONZEROS = 4
WHOLE = "all"  # the name of the group of all parameters


class Projection:
    """The projection of one parameter's gradients.

    Args:
        shape: The parameter's.
        rule: Of the layer whose weight it is, if the layer reads it as a matrix; else the gradient
            is read by its own first axis, and a vector as a nearly square matrix.
        left_CK: L; None keeps this side as it is.
        right_JI: R; None keeps this side as it is.
    """

    def __init__(
        self,
        shape: torch.Size,
        rule: LayerRule[Any] | None,
        left_CK: Tensor | None,
        right_JI: Tensor | None,
    ) -> None:
        self._shape, self.rule = shape, rule
        self.left_CK, self.right_JI = left_CK, right_JI

    def __call__(self, gradients: Tensor) -> Tensor:
        """The projections (B, K, I) of gradients (B, *shape)."""
        matrices_BCJ = as_matrices(gradients, self.rule)
        if self.left_CK is not None:
            matrices_BCJ = self.left_CK.t() @ matrices_BCJ
        return matrices_BCJ if self.right_JI is None else matrices_BCJ @ self.right_JI

    @property
    def keeps(self) -> bool:
        """Whether it leaves the gradient as it is."""
        return self.left_CK is None and self.right_JI is None

    @property
    def size(self) -> int:
        """K x I."""
        # Not that of a projected meta tensor: torch would load its compiler for it, in a second.
        rows, columns = matrix_shape(self._shape, self.rule)
        rows = rows if self.left_CK is None else self.left_CK.shape[1]
        return rows * (columns if self.right_JI is None else self.right_JI.shape[1])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Projection":
        """The same projection on a device and of a dtype."""
        sides = [
            side if side is None else on_device(side, device).to(dtype)
            for side in (self.left_CK, self.right_JI)
        ]
        return Projection(self._shape, self.rule, *sides)


def projections(
    model: nn.Module,
    space: ParameterSpace,
    *,
    outputs: int,
    inputs: int,
    distribution: Distribution,
    seed: int,
    whole: bool,
    keeps_small: bool = False,
) -> dict[str, dict[str, Projection]]:
    """The projection of every parameter, by group and full name.

    They depend on the seed, and on the parameter's name and shape, and on nothing else.

    Args:
        space: The parameters.
        outputs: K, of every group; of a group whose largest parameter has fewer rows, as many.
        inputs: I, likewise for columns. A side that is not made smaller stays as it is.
        whole: All parameters are one group, `WHOLE`, of exactly `outputs` x `inputs`.
        keeps_small: A group of at most `outputs` x `inputs` numbers is kept as it is.

    Raises:
        ModelError: No group has parameters.
    """
    groups = {WHOLE: [*space.shapes]} if whole else space.groups
    found: dict[str, dict[str, Projection]] = {}
    for group, names in groups.items():
        if not names:
            continue
        rules = {name: matrix_rule(model, name) for name in names}
        sizes = {name: matrix_shape(space.shapes[name], rules[name]) for name in names}
        main = max(names, key=lambda name: math.prod(sizes[name]))
        kept = outputs, inputs
        if not whole:
            rows, columns = sizes[main]
            kept = min(outputs, rows), min(inputs, columns)
        if keeps_small and sum(math.prod(size) for size in sizes.values()) <= outputs * inputs:
            found[group] = {n: Projection(space.shapes[n], rules[n], None, None) for n in names}
            continue
        found[group] = {}
        for name in names:
            # Only one parameter may stay as it is: two that do would add up to their sum.
            keeps = name == main and not whole
            sides = [
                None if keeps and of == to else _side(of, to, distribution, (seed, name, which))
                for which, (of, to) in enumerate(zip(sizes[name], kept, strict=True))
            ]
            found[group][name] = Projection(space.shapes[name], rules[name], *sides)
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameters to project")
    return found


def together(of_group: Mapping[str, Projection], projected: Mapping[str, Tensor]) -> Tensor:
    """The numbers (B, D) of a group, of its parameters' projections (B, K, I) by name."""
    parts = [projected[name].flatten(1) for name in of_group]
    if _side_by_side(of_group):
        return torch.cat(parts, dim=1)
    return torch.stack(parts).sum(0)


def projected_size(of_group: Mapping[str, Projection]) -> int:
    """D of a group."""
    sizes = [projection.size for projection in of_group.values()]
    return sum(sizes) if _side_by_side(of_group) else sizes[0]


def _side_by_side(of_group: Mapping[str, Projection]) -> bool:
    """Whether the numbers of a group's parameters are kept apart, not added."""
    return all(projection.keeps for projection in of_group.values())


def matrix_rule(model: nn.Module, parameter: str) -> LayerRule[Any] | None:
    """The rule by which a parameter is read as a matrix; None: by its own axes."""
    owner, _, own = parameter.rpartition(".")
    module = model.get_submodule(owner)
    if own != "weight" or not supported(module):
        return None
    rule = rule_of(module)
    rows, columns = rule.as_matrix(torch.empty(1, *rule.weight.shape, device="meta")).shape[1:]
    return rule if min(rows, columns) > 1 else None


def as_matrices(gradients: Tensor, rule: LayerRule[Any] | None) -> Tensor:
    """Gradients (B, *shape) as matrices (B, C, J)."""
    if rule is not None:
        return rule.as_matrix(gradients)
    rows, columns = matrix_shape(gradients.shape[1:], None)
    flat_BP = gradients.reshape(len(gradients), -1)
    missing = rows * columns - flat_BP.shape[1]
    return F.pad(flat_BP, (0, missing)).view(len(flat_BP), rows, columns)


def matrix_shape(shape: torch.Size, rule: LayerRule[Any] | None) -> tuple[int, int]:
    """(C, J) of a parameter's gradient."""
    if rule is not None:
        rows, columns = rule.as_matrix(torch.empty(1, *shape, device="meta")).shape[1:]
        return rows, columns
    axes = [length for length in shape if length > 1]
    if len(axes) > 1:
        return axes[0], math.prod(axes[1:])
    length = axes[0] if axes else 1
    rows = math.isqrt(length)
    return rows, math.ceil(length / rows)


def _side(of: int, to: int, distribution: Distribution, key: Sequence[object]) -> Tensor:
    """A random matrix (of, to) whose rows have mean square norm 1."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64))
    generator = np.random.Generator(bits)
    if distribution == "gaussian":
        return torch.from_numpy(generator.standard_normal((of, to), np.float32)) / math.sqrt(to)
    if distribution == "rademacher":
        signs = generator.integers(0, 2, (of, to), dtype=np.int8)
        return torch.from_numpy(signs * 2.0 - 1).float() / math.sqrt(to)
    blocks = min(NONZEROS, to)
    bounds = np.linspace(0, to, blocks + 1).astype(int)
    side = torch.zeros(of, to)
    for first, last in itertools.pairwise(bounds.tolist()):
        places = torch.from_numpy(generator.integers(first, last, of))
        entries = torch.from_numpy(generator.integers(0, 2, of) * 2.0 - 1).float()
        side[torch.arange(of), places] = entries / math.sqrt(blocks)
    return side
