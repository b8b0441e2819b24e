"""Directional derivatives of the losses by any parameters: the dot products no rule is needed for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from influence_jobs.gradients.reference import LossModule
from influence_jobs.gradients.transforms import all_derivatives

# Vectors pushed forward together: each holds tangents of the size of its activations.
_CHUNK = 16


def directional_derivatives(
    model: nn.Module,
    losses: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    vectors: Mapping[str, Tensor],
) -> Tensor:
    """Products grad loss_b . v_q in one forward pass for all samples and a chunk of vectors.

    Forward-mode differentiation (torch.func.jvp) mapped over the vectors. It follows the parameters
    wherever the forward uses them, so they may be shared, used as functions or more than once.

    Args:
        model: In eval mode.
        losses: (model, batch) to one loss per sample (B,).
        vectors: {parameter: (Q, *shape)}; a parameter that is not named is constant.

    Returns:
        (B, Q).

    Raises:
        RuntimeError: An operation of the forward has no forward-mode derivative (NotImplementedError
            where torch says so), or cannot be mapped.
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
    """Embeddings whose padding row passes no derivative on, as in autograd but not in forward mode."""

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
