"""The report's first method: a query's activations times the training samples' gradient norms.

    score(query, i) = sum over layers l and their channels c of  a_lc(query) v_lc(i)

with a the layer's output for the query, clamped at zero, and v the L2 norm over the inputs of the gradient of
sample i's loss in the weights of channel c. All scores are >= 0: a large one says that a sample moved what the
query uses, not in which direction.

"Inner workings of a denoising network", method 1. At a point of a convolution's output the activations are those of
the feature position above it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.rules import nearest_rule
from influence_jobs.tasks.base import Batch, Draw, Task, device_of, to_device
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

    Of a layer with positions they are the mean over those that the region covers, over all without a
    region. With a map of (h, w) for an image of (H, W), pixel (y, x) lies under (y*h//H, x*w//W).

    Args:
        task: Gives the test samples.
        model: In eval mode, on any device.
        layers: Module names.
        queries: A test id each, and a region (y, x, height, width) inside `task.test_size`, or None.
        draws: Draws of the test samples' noise; one suffices for a task without noise.

    Returns:
        {layer: (Q, C)}.

    Raises:
        ModelError: A layer is not called once, returns something else, or has no positions for a region.
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
    """What layers return for a test batch of one, clamped at zero at once: later in-place operations must not show.

    Returns:
        {layer: (1, C, *positions)}, whichever axis of the layer's own output has the channels.

    Raises:
        ModelError: A layer is not called once, or returns no tensor of one sample.
    """
    calls: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, output: object) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != 1:
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(
                f"layer {layer} returns {what} for one sample, not a tensor (1, ...): leave it out"
            )
        rule = nearest_rule(model.get_submodule(layer))
        if rule is not None and rule.channel_axis is None:
            raise ModelError(
                f"layer {layer} has norms of the rows of its weight, not of its outputs: leave it out"
            )
        calls[layer].append(output.relu() if rule is None else rule.channels_first(output.relu()))

    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _args, output, layer=layer: keep(layer, output)
        )
        for layer in layers
    ]
    try:
        task.measure(model, batch, task.quantities[0], None)  # sees the whole sample
    finally:
        for hook in hooks:
            hook.remove()
    for layer, outputs in calls.items():
        if len(outputs) != 1:
            raise ModelError(
                f"layer {layer} is called {len(outputs)} times in a forward pass, not once: leave it out"
            )
    return {layer: outputs[0] for layer, outputs in calls.items()}


def pool(
    layer: str, activation: Tensor, region: Region | None, size: tuple[int, int] | None
) -> Tensor:
    """The activation of a region of an image of `size`: (C, *positions) to (C,).

    Raises:
        ModelError: The layer has no positions for the region.
    """
    if region is None:
        return activation if activation.ndim == 1 else activation.flatten(1).mean(dim=1)
    if activation.ndim != 3 or size is None:
        raise ModelError(f"layer {layer} has no positions that a region could choose: leave it out")
    y, x, height, width = region
    rows = _covered(y, height, activation.shape[1], size[0])
    columns = _covered(x, width, activation.shape[2], size[1])
    return activation[:, rows, columns].mean(dim=(1, 2))


def _covered(start: int, length: int, positions: int, pixels: int) -> slice:
    """The feature positions along one axis that lie above some pixels."""
    return slice(start * positions // pixels, (start + length - 1) * positions // pixels + 1)


def attribution_scores(
    activations: Mapping[str, FloatArray],
    norms: Mapping[str, FloatArray],
    *,
    exclude_norm_above: float | None = None,
    normalize: bool = False,
) -> dict[str, npt.NDArray[np.float32]]:
    """Score some training samples for every query, layer by layer; the method's score is the layers' sum.

    Both options look at a sample's *total norm*, the sum of its norms over all channels of all these layers:
    so a sample is in or out as a whole, and the layers' scores still add up.

    Args:
        activations: {layer: (Q, C)}, >= 0; its layers are the ones used.
        norms: {layer: (B, C)}, or (B, C, kh, kw), which is summed over the kernel.
        exclude_norm_above: Samples whose total norm is larger are left out: their scores are NaN.
        normalize: Divide a sample's norms by its total norm; a sample of total norm zero keeps its score, zero.

    Returns:
        {layer: (Q, B)}.

    Raises:
        SpecError: The norms are of whole layers, or of another number of channels than the activations.
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
            f"the norms of layer {layer} are of the whole layer, attribution needs one a channel: "
            "record them with --reduce channel or kernel"
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
