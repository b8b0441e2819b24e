"""Dot products with loss gradients by any parameters, as forward-mode directional derivatives."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from influence_jobs.gradients.functional import functional_call
from influence_jobs.gradients.reference import LossModule
from influence_jobs.gradients.transforms import all_derivatives

# Vectors in one forward pass. Each needs memory for tangents of all activations.
_CHUNK = 16


def directional_derivatives(
    model: nn.Module,
    losses: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    vectors: Mapping[str, Tensor],
) -> Tensor:
    """Products grad loss_b . v_q, in one forward pass per chunk of vectors, for all samples.

    This is forward-mode differentiation (torch.func.jvp), mapped over the vectors. It covers every
    use of a parameter: parameters may be shared, used more than once, or used outside a layer.

    Args:
        model: In eval mode.
        losses: (model, batch) to one loss per sample (B,).
        vectors: {parameter: (Q, *shape)}; all other parameters are constant.

    Returns:
        (B, Q).

    Raises:
        RuntimeError: An operation has no forward-mode derivative (torch may raise
            NotImplementedError, a subclass), or vmap does not support it.
    """
    wrapped = LossModule(model, losses)
    names = list(vectors)
    primals = tuple(model.get_parameter(name).detach() for name in names)

    def forward(*parameters: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in zip(names, parameters, strict=True)}
        result: Tensor = functional_call(wrapped, named, (batch,))
        return result

    def along(*tangents: Tensor) -> Tensor:
        derivatives: Tensor = jvp(forward, primals, tangents)[1]
        return derivatives

    with (
        all_derivatives(model),
        _constant_padding(model),
    ):
        dots_QB: Tensor = vmap(along, chunk_size=_CHUNK)(*vectors.values())
    return dots_QB.t()


@contextmanager
def _constant_padding(model: nn.Module) -> Iterator[None]:
    """Treat the padding row of embeddings as constant: autograd does so, forward mode does not."""

    def put_back(
        row_D: Tensor, module: nn.Embedding, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        ids = args[0] if args else kwargs["input"]
        return torch.where((ids == module.padding_idx).unsqueeze(-1), row_D, output)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                hook = module.register_forward_hook(
                    partial(put_back, module.weight[module.padding_idx].detach()),
                    prepend=True,
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
        yield
