"""Derivatives of functions of named parameters, along vectors of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from influence_jobs.gpu import in_tf32
from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.reference import LossModule
from influence_jobs.transfers import numbers

AGREEMENT = 1e-3  # allowed relative difference of two ways to a product; rounding causes 1e-6
OF_TF32 = 10  # times as much where products are rounded to TF32, which causes 1e-3

Parameters = dict[str, Tensor]


def padding_rows(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """By name, the row of an embedding's weights that torch gives no gradient: its `padding_idx`.

    The losses may depend on it all the same. So it counts as frozen: training leaves it alone. A
    weight that other modules have too is not here.
    """
    rows: dict[int, set[int | None]] = {}
    for module in model.modules():
        row: int | None = None
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            row = module.padding_idx
        for parameter in module.parameters(recurse=False):
            rows.setdefault(id(parameter), set()).add(row)
    return {
        name: row
        for name, parameter in parameters.items()
        for row in rows.get(id(parameter), ())
        if row is not None and len(rows[id(parameter)]) == 1
    }


def without_rows(vectors: Parameters, rows: Mapping[str, int]) -> Parameters:
    """Vectors {name: (..., rows, columns)} that are zero in some rows."""
    found = dict(vectors)
    for name in rows.keys() & vectors.keys():
        found[name] = vectors[name].clone()
        found[name][..., rows[name], :] = 0
    return found


def gradients_along(
    values: Parameters, by: Sequence[Tensor], along: Parameters
) -> tuple[Tensor, ...]:
    """The derivative of values along vectors, by some tensors."""
    depending = [name for name, value in values.items() if value.requires_grad]
    return torch.autograd.grad(
        [values[name] for name in depending],
        by,
        [along[name] for name in depending],
        materialize_grads=True,
    )


def agreement() -> float:
    """The allowed relative difference of two ways to a product of float32, as torch is set now."""
    return AGREEMENT * (OF_TF32 if in_tf32() else 1)


def require_alike(what: str, ours: Parameters, plain: Parameters) -> None:
    """Require the derivatives that plain autograd gives.

    Raises:
        RuntimeError: Naming the parameter that differs most.
    """
    found = numbers(
        [(ours[name] - value).detach().abs().max() for name, value in plain.items()]
        + [value.detach().abs().max() for value in plain.values()]
    )
    errors, largest = dict(zip(plain, found, strict=False)), max(found[len(plain) :])
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= agreement() * largest + torch.finfo(torch.float32).tiny:
        raise RuntimeError(
            f"the {what} by parameter '{worst}' differs through torch.func: the forward pass uses "
            "the parameter through a reference that the model keeps elsewhere, such as in a list"
        )


def mapped(function: Callable[[Parameters], Any], vectors: Parameters, at_once: int) -> Any:
    """Apply a function of one vector to all vectors, `at_once` at a time."""
    count = len(next(iter(vectors.values())))
    # A single chunk would cost a copy of the result.
    return vmap(function, chunk_size=at_once if at_once < count else None)(vectors)


def difference(
    gradient: Callable[[Parameters], Parameters],
    parameters: Parameters,
    vectors: Parameters,
    at_once: int,
) -> Parameters:
    """Central differences (g(theta + eps v) - g(theta - eps v)) / 2 eps for every vector.

    The truncation error is eps^2/6 |D^3 g [v, v, v]| and the rounding error u |g| / eps, where u is
    the unit roundoff. Their sum is smallest for a step eps |v| of u^(1/3) times the scale on which
    g changes (Nocedal and Wright: "Numerical Optimization", section 8.1). |theta| is taken as this
    scale. In float32 the step is .004 |theta|, and the relative error is about 1e-4 where the
    network is smooth. If the step crosses the kink of a ReLU, the error grows by the gradient's
    jump there.
    """
    scale = torch.stack([p.square().sum() for p in parameters.values()]).sum().sqrt()
    unit = torch.finfo(scale.dtype).eps / 2

    def product(vector: Parameters) -> Parameters:
        length = torch.stack([v.square().sum() for v in vector.values()]).sum().sqrt()
        eps = unit ** (1 / 3) * scale / length.clamp_min(torch.finfo(length.dtype).tiny)
        ahead = gradient({name: p + eps * vector[name] for name, p in parameters.items()})
        behind = gradient({name: p - eps * vector[name] for name, p in parameters.items()})
        return {name: (ahead[name] - behind[name]) / (2 * eps) for name in parameters}

    products: Parameters = mapped(product, vectors, at_once)
    return products


def function_of_parameters(
    model: nn.Module, function: Callable[[nn.Module, Any], Tensor], batch: Any
) -> Callable[[Parameters], Tensor]:
    """function(model, batch) as a function of the model's parameters by name."""
    applied = LossModule(model, function)

    def of(parameters: Parameters) -> Tensor:
        named = {f"model.{name}": p for name, p in parameters.items()}
        result: Tensor = functional_call(applied, named, (batch,))
        return result

    return of
