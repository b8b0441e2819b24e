"""Attribution: a query's activations times the training samples' gradient norms.

    score(query, i) = sum over layers l and their channels c of  a_lc(query) v_lc(i)

Here a is the layer's output for the query, clamped at zero. v is the L2 norm, over the inputs of
channel c, of the gradient of sample i's loss by the channel's weights. All scores are >= 0: a large
score says that a sample changed the channels that the query uses, not in which direction.

This is method 1 of the research report, "Inner workings of a denoising network".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.rules import nearest_rule
from influence_jobs.gradients.weights import own_weights, weight_named
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.placement import device_of, out_of_half, to_device
from influence_jobs.terms import Region

FloatArray = npt.NDArray[np.floating[Any]]


@torch.no_grad()
def query_activations(
    task: Task,
    model: nn.Module,
    layers: Sequence[str],
    queries: Sequence[tuple[int, Region | None]],
    draws: Sequence[Draw],
) -> dict[str, npt.NDArray[np.float32]]:
    """Activations of some layers for every query, averaged over noise draws.

    If a layer's output has positions, its activations are averaged over the positions that the
    query's region covers, or over all without a region. If the layer's map has the size (h, w) and
    the image (H, W), pixel (y, x) belongs to position (y*h//H, x*w//W).

    Args:
        task: Gives the test samples.
        model: In eval mode, on any device.
        layers: Module names.
        queries: For each query a test id, and None or a region (y, x, height, width) inside
            `task.test_size`.
        draws: Draws of the test samples' noise; one is enough for a task without noise.

    Returns:
        {layer: (Q, C)}.

    Raises:
        ModelError: A layer is not called exactly once, does not return a tensor (1, ...), or has no
            positions for a region.
        DataError: Activations are not finite.
    """
    rows_by_test: dict[int, list[int]] = {}
    for row, (test, _) in enumerate(queries):
        rows_by_test.setdefault(test, []).append(row)
    means: dict[str, dict[int, FloatArray]] = {layer: {} for layer in layers}
    for test, rows in rows_by_test.items():
        size = task.test_size(test)
        for draw in draws:
            batch = to_device(task.test_batch(torch.tensor([test]), draw), device_of(model))
            batch = out_of_half(batch, model)
            for layer, output in clamped_outputs(task, model, layers, batch).items():
                if not output.isfinite().all():
                    raise DataError(
                        f"activations of layer {layer} are not finite for test {test}: "
                        "check the sample and the checkpoint"
                    )
                for row in rows:
                    a_C = pool(layer, output[0], queries[row][1], size)
                    share = a_C.double().cpu().numpy() / len(draws)
                    means[layer][row] = means[layer].get(row, 0.0) + share
    return {
        layer: np.stack([by_row[row] for row in range(len(queries))]).astype(np.float32)
        for layer, by_row in means.items()
    }


def clamped_outputs(
    task: Task, model: nn.Module, layers: Sequence[str], batch: Batch
) -> dict[str, Tensor]:
    """Outputs of layers for a test batch of one sample, clamped at zero.

    They are copied at once, so that later in-place operations do not change them.

    Returns:
        {layer: (1, C, *positions)}, whichever axis of the layer's own output has the channels.

    Raises:
        ModelError: A layer is not called exactly once, or does not return a tensor (1, ...), alone
            or first of several, with an axis of channels.
    """
    calls: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, output: object) -> None:
        if isinstance(output, tuple) and output:  # such as an output and a state
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != 1:
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(
                f"layer {layer} returns {what} for one sample, not a tensor (1, ...): leave it out"
            )
        calls[layer].append(_channels_first(model, layer, output.relu()))

    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _args, output, layer=layer: keep(layer, output)
        )
        for layer in layers
    ]
    try:
        task.measure(model, batch, task.quantities[0], None)  # passes the whole sample through
    finally:
        for hook in hooks:
            hook.remove()
    for layer, outputs in calls.items():
        if len(outputs) != 1:
            raise ModelError(
                f"layer {layer} is called {len(outputs)} times in a forward pass, not once: "
                "leave it out"
            )
    return {layer: outputs[0] for layer, outputs in calls.items()}


def _channels_first(model: nn.Module, layer: str, output: Tensor) -> Tensor:
    """A layer's output (1, ...) as (1, C, *positions), C being the rows of its weight."""
    rule = nearest_rule(model.get_submodule(layer))
    if rule is not None:
        if rule.channel_axis is None:
            raise ModelError(
                f"layer {layer} has norms of its weight's rows, not of its outputs: leave it out"
            )
        return rule.channels_first(output)
    if (several := len(own_weights(model.get_submodule(layer)))) != 1:
        raise ModelError(
            f"layer {layer} has {several} weights, and their rows may not be its outputs: leave it "
            "out"
        )
    rows = weight_named(model, layer).read_as[0]
    axes = [axis for axis in range(1, output.ndim) if output.shape[axis] == rows]
    if len(axes) != 1:
        which = "several axes are" if axes else "no axis is"
        raise ModelError(
            f"layer {layer} returns shape {tuple(output.shape)}, where {which} as long as its "
            f"weight has rows ({rows}), so its channels are unknown: leave it out"
        )
    return output.movedim(axes[0], 1)


def pool(
    layer: str, activation: Tensor, region: Region | None, size: tuple[int, int] | None
) -> Tensor:
    """Average an activation (C, *positions) over the region of an image of `size`: (C,).

    Raises:
        ModelError: The layer has no positions for the region.
    """
    if region is None:
        return activation if activation.ndim == 1 else activation.flatten(1).mean(dim=1)
    if activation.ndim != 3 or size is None:
        if activation.ndim == 2 and (size is None or size[0] == 1):
            raise ModelError("attribution explains whole sequences: leave --tokens out")
        raise ModelError(f"layer {layer} has no positions to select by region: leave it out")
    y, x, height, width = region
    rows = _covered(y, height, activation.shape[1], size[0])
    columns = _covered(x, width, activation.shape[2], size[1])
    return activation[:, rows, columns].mean(dim=(1, 2))


def _covered(start: int, length: int, positions: int, pixels: int) -> slice:
    """The positions along one axis that some pixels belong to."""
    return slice(start * positions // pixels, (start + length - 1) * positions // pixels + 1)


def attribution_scores(
    activations: Mapping[str, FloatArray],
    norms: Mapping[str, FloatArray],
    *,
    exclude_norm_above: float | None = None,
    normalize: bool = False,
) -> dict[str, npt.NDArray[np.float32]]:
    """Score some training samples for every query, layer by layer.

    A sample's score is the sum over the layers. Both options use a sample's *total norm*, the sum
    of its norms over all channels of all these layers. So a sample is left out of all layers or of
    none, and the scores of the layers still add up.

    Args:
        activations: {layer: (Q, C)}, >= 0, for the layers to use.
        norms: {layer: (B, C)}, or (B, C, kh, kw), which is summed over the kernel.
        exclude_norm_above: Samples with a larger total norm are left out: their scores are NaN.
        normalize: Divide a sample's norms by its total norm. If that is zero, so is the score.

    Returns:
        {layer: (Q, B)}.

    Raises:
        SpecError: The norms are of whole layers, or of another number of channels than the
            activations.
        DataError: Norms are not finite.
    """
    norms_BC = {
        layer: _by_channel(layer, norms[layer], a_QC.shape[1])
        for layer, a_QC in activations.items()
    }
    total_B = np.sum([v_BC.sum(axis=1, dtype=np.float64) for v_BC in norms_BC.values()], axis=0)
    divisor_B = np.where(total_B > 0, total_B, 1.0) if normalize else np.ones_like(total_B)
    left_out_B = total_B > (np.inf if exclude_norm_above is None else exclude_norm_above)
    scores: dict[str, npt.NDArray[np.float32]] = {}
    for layer, a_QC in activations.items():
        scores[layer] = (a_QC @ norms_BC[layer].T / divisor_B).astype(np.float32)
        scores[layer][:, left_out_B] = np.nan
    return scores


def _by_channel(layer: str, norms: FloatArray, channels: int) -> FloatArray:
    if norms.ndim == 1:
        raise SpecError(
            f"the norms of layer {layer} are of the whole layer, but attribution needs one per "
            "channel: record them with --reduce channel or kernel"
        )
    if norms.shape[1] != channels:
        raise SpecError(
            f"layer {layer} has {channels} activations but norms of {norms.shape[1]} channels: "
            "take norms and activations of the same layer of the same model"
        )
    if not np.isfinite(norms).all():
        raise DataError(f"norms of layer {layer} are not finite: verify the run that has them")
    v_BC: FloatArray = norms.sum(axis=tuple(range(2, norms.ndim)))
    return v_BC
