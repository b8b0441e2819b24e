"""The arrays of gradient norms, replayed or recorded during training."""

import math

import torch

from influence_jobs.gradients.weights import weight_named
from influence_jobs.jobs.tokens import MEANING as OF_TOKENS
from influence_jobs.store.layout import ArrayLayout, chunk_rows, norms_name, token_norms_name
from influence_jobs.terms import Reduction

KERNEL_DIMS = ("kernel_z", "kernel_y", "kernel_x")
MEANING = {
    "kernel": "L2 norm over the input axis of the weight gradient",
    "channel": "L2 norm over the input axis of the weight gradient, summed over the kernel "
    "positions",
    "layer": "L2 norm of the whole weight gradient",
}


def norm_layouts(
    model: torch.nn.Module,
    layers: tuple[str, ...],
    *,
    num_samples: int,
    reduction: Reduction,
    checkpoints: int | None,
    source: str,
    tokens: int | None = None,
) -> tuple[ArrayLayout, ...]:
    """The layouts of the arrays of norms, one a layer, all with the same number of rows in a chunk.

    Args:
        checkpoints: Length of the leading checkpoint axis; None for no such axis.
        source: The loss whose gradient is measured, for the arrays' attributes.
        tokens: Length of the axis of tokens of further arrays; None for no such arrays.
    """
    weights = {layer: weight_named(model, layer) for layer in layers}
    trailing = {layer: weight.norm_shape(reduction) for layer, weight in weights.items()}
    widest = max(4 * math.prod(shape) for shape in [*trailing.values(), (tokens or 0,)])
    rows = chunk_rows(num_samples, widest)
    leading: tuple[int, ...] = () if checkpoints is None else (checkpoints,)
    of_samples = tuple(
        ArrayLayout(
            name=norms_name(layer),
            shape=(*leading, num_samples, *shape),
            row_axis=len(leading),
            chunk_rows=rows,
            dims=(*("checkpoint" for _ in leading), "sample", *_dims(len(shape))),
            attributes={
                "layer": layer,
                "parameter": weights[layer].parameter,
                "quantity": MEANING[reduction],
                "of": source,
                "unit": "loss per unit of weight",
            },
        )
        for layer, shape in trailing.items()
    )
    if tokens is None:
        return of_samples
    return of_samples + tuple(
        ArrayLayout(
            name=token_norms_name(array.attributes["layer"]),
            shape=(*leading, num_samples, tokens),
            row_axis=len(leading),
            chunk_rows=rows,
            dims=(*("checkpoint" for _ in leading), "sample", "token"),
            attributes={
                **array.attributes,
                "quantity": MEANING["layer"],
                "of": f"{source}: what each token brings to it; {OF_TOKENS}",
            },
        )
        for array in of_samples
    )


def _dims(axes: int) -> tuple[str, ...]:
    """Names of the axes of one sample's norms: none, or the channel and the kernel axes."""
    if axes == 0:
        return ()
    return "channel", *KERNEL_DIMS[len(KERNEL_DIMS) + 1 - axes :]
