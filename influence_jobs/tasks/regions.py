"""What a task measures of its outputs by default: their loss, or they themselves, in a region.

Letters: B batch, C channels or classes, H and W height and width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_jobs.errors import SpecError, first_line
from influence_jobs.tasks.output_loss import IGNORED, Form, forms_of, forms_that_give
from influence_jobs.tasks.sequences import counted_tokens, span_of
from influence_jobs.terms import Region

if TYPE_CHECKING:  # which measures by this
    from influence_jobs.tasks.base import Batch, Task

CURE = (
    "regions are of outputs() and targets() that are images, (B, C, H, W), or classes of pixels, "
    "(B, H, W); else define test_size() and measure()"
)


def image_size(task: "Task", targets: Any) -> tuple[int, int] | None:
    """Height and width of the images that a loss compares; None if its targets are none.

    Args:
        targets: (B, C, H, W), or (B, H, W) for the classes of a cross-entropy.
    """
    if task.output_loss is None or not isinstance(targets, Tensor):
        return None
    own = callable(task.output_loss) and not targets.is_floating_point()
    of_classes = task.output_loss == "cross-entropy" or own
    if targets.ndim == 4 or (targets.ndim == 3 and of_classes):
        return targets.shape[-2], targets.shape[-1]
    return None


def measure_outputs(
    task: "Task",
    model: torch.nn.Module,
    batch: "Batch",
    quantity: str,
    region: Region | None,
) -> Tensor:
    """A quantity of every sample's outputs, (B,), whole or in a region of them.

    `loss` is the task's own loss of the region alone: if it is a mean over all pixels, it is the
    mean over the region's. A region of a sequence is a span of its tokens, as of an image one pixel
    high. `output` is the mean over the region of the outputs' squares where the
    loss is a squared error, of the logits for binary cross-entropy, and of the logit of each
    pixel's own class for cross-entropy.

    Raises:
        SpecError: The task defines no outputs or another quantity, or cannot be measured in the
            region.
        ModelError: Its losses are not those that it declares.
    """
    name = type(task).__name__
    outputs, targets = task.outputs(model, batch), task.targets(batch)
    form = _form(task, model, batch, outputs, targets)
    if region is not None and counted_tokens(task, targets) is not None:
        _, start, _, count = region
        outputs, targets = span_of(outputs, targets, form.classes, start, start + count)
    elif region is not None:
        outputs, targets = _cut(name, form, outputs, targets, region)
    if quantity == "loss":
        try:
            return form.losses(outputs, targets)
        except (RuntimeError, ValueError, IndexError) as error:
            assert region is not None
            raise SpecError(
                f"output_loss of {name} cannot be taken of {region[2]} x {region[3]} pixels "
                f"({first_line(error)}): choose a larger --region, or define measure()"
            ) from error
    if quantity == "output" and task.output_loss == "mse":
        return outputs.square().flatten(1).mean(1)
    if quantity == "output" and task.output_loss == "binary-cross-entropy":
        return outputs.flatten(1).mean(1)
    if quantity == "output" and task.output_loss == "cross-entropy":
        return _own_logits(outputs.movedim(form.classes, 1), targets)
    raise SpecError(f"{name} cannot measure {quantity!r}: define measure()")


@torch.no_grad()
def _form(
    task: "Task", model: torch.nn.Module, batch: "Batch", outputs: Tensor, targets: Tensor
) -> Form:
    found = forms_that_give(task.losses(model, batch), outputs, targets, forms_of(task))
    if not found:
        raise SpecError(
            f"losses of {type(task).__name__} are not what its output_loss says of outputs "
            f"{tuple(outputs.shape)} and targets, so no region of them can be measured: correct "
            "output_loss, or define measure()"
        )
    return found[0]


def _cut(
    name: str, form: Form, outputs: Tensor, targets: Tensor, region: Region
) -> tuple[Tensor, Tensor]:
    y, x, height, width = region
    rows, columns = slice(y, y + height), slice(x, x + width)
    of_outputs = outputs.shape[1:3] if form.classes == -1 else outputs.shape[2:]
    if outputs.ndim != 4 or of_outputs != targets.shape[-2:]:
        raise SpecError(
            f"outputs of {name} are {tuple(outputs.shape)} and targets {tuple(targets.shape)}: "
            f"{CURE}"
        )
    last = form.classes == -1
    cut = outputs[:, rows, columns] if last else outputs[..., rows, columns]
    return cut, targets[..., rows, columns]


def _own_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean logit of each position's class, (B,), from (B, C, ...) and (B, ...)."""
    if targets.is_floating_point():  # probabilities of classes
        return (logits * targets).sum(1).reshape(len(logits), -1).mean(1)
    counted = targets != IGNORED
    own = logits.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * counted
    counts_B = counted.reshape(len(own), -1).sum(1).clamp_min(1)
    return own.reshape(len(own), -1).sum(1) / counts_B
