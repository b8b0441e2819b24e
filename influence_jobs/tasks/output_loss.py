"""What a sample's loss is of its outputs: the losses themselves, and their Hessian in the outputs.

A task names its loss (`Task.output_loss`), or gives it as a function. Of a named loss there are
several forms: classes along the first or the last axis, mean or sum over positions. The form that
gives the task's own losses is found by `forms_that_give`.

Letters: B batch, C classes, T positions (any number of axes); u a tangent of the outputs' shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F

from influence_jobs.errors import ModelError, SpecError
from influence_jobs.terms import OutputLoss

if TYPE_CHECKING:  # tasks measure by these forms
    from influence_jobs.tasks.base import Task

SUM_ERROR = 1e-3  # of probabilities in half precision
IGNORED = -100  # a target that counts for nothing, as in torch
RELATIVE_ERROR = 1e-3  # allowed for float32 and another order of summation


@dataclass(frozen=True)
class Form:
    """One way in which losses may depend on outputs.

    Attributes:
        words: What it is, for messages.
        losses: (outputs, targets) to one loss a sample, (B,).
        hessian: (outputs, targets, u) to the Hessian of the mean loss in the outputs, times u.
        root: (outputs, targets, r) to a root of the Hessian of each sample's own loss, times r. So
            s s^T has this Hessian as its mean for random signs r. None where it is unknown.
        diagonal: Whether that Hessian is diagonal, and its root too.
        classes: The axis of the outputs with the classes, where there are classes.
        parts: (outputs, targets) to what each position brings to its sample's loss, of the shape of
            the targets: the parts add up to the losses. None where there are no positions.
    """

    words: str
    losses: Callable[[Tensor, Tensor], Tensor]
    hessian: Callable[[Tensor, Tensor, Tensor], Tensor]
    root: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    diagonal: bool = False
    classes: int = 1
    parts: Callable[[Tensor, Tensor], Tensor] | None = None

    def counted(self, targets: Tensor) -> Tensor | None:
        """Which positions of sequences of classes have a target that counts, (B, T); else None."""
        return targets != IGNORED if self.parts is not None and targets.ndim == 2 else None


def _of_function(losses: Callable[[Tensor, Tensor], Tensor]) -> Form:
    """A loss of the task's own, differentiated twice."""

    def hessian(outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        slope = grad(lambda outputs: losses(outputs, targets).mean())
        # The matrix is symmetric, and torch lacks more derivatives in forward mode than in reverse.
        result: Tensor = vjp(slope, outputs)[1](tangents)[0]
        return result

    return Form("output_loss", losses, hessian)


# -- cross-entropy ---------------------------------------------------------------------------------


def cross_entropy(outputs_BC: Tensor, classes_B: Tensor) -> Tensor:
    """Cross-entropy (B,) of logits, or of log-probabilities, which log-softmax does not change.

    They are NaN where the targets are weights of classes that do not sum to one: the Hessian has
    another scale with them.
    """
    losses_B = _of_classes(outputs_BC, classes_B)
    if classes_B.is_floating_point():
        losses_B = losses_B.masked_fill((classes_B.sum(1) - 1).abs() > SUM_ERROR, torch.nan)
    return losses_B


def _of_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies of the targets' shape, classes along axis 1; NaN where a target is no class.

    There a CPU raises an error, and a GPU ends the process.
    """
    if targets.is_floating_point():
        return F.cross_entropy(outputs, targets, reduction="none")
    unknown = (targets != IGNORED) & ((targets < 0) | (targets >= outputs.shape[1]))
    known = targets.masked_fill(unknown, 0)
    losses = F.cross_entropy(outputs, known, ignore_index=IGNORED, reduction="none")
    return losses.masked_fill(unknown, torch.nan)


def _cross_entropy_hessian(outputs_BC: Tensor, targets: Tensor, tangents_BC: Tensor) -> Tensor:
    """(diag(p) - p p^T) u / B, p the probabilities: the same for logits and log-probabilities."""
    weighted_BC = outputs_BC.softmax(1)
    weighted_BC = weighted_BC * (tangents_BC - (weighted_BC * tangents_BC).sum(1, keepdim=True))
    if not targets.is_floating_point():  # classes, not probabilities of them
        weighted_BC = weighted_BC * (targets != IGNORED).unsqueeze(1)
    return weighted_BC / len(outputs_BC)


def _cross_entropy_root(outputs_BC: Tensor, targets: Tensor, r_BC: Tensor) -> Tensor:
    root_BC = _root_of_softmax(outputs_BC, 1, r_BC)
    if not targets.is_floating_point():
        root_BC = root_BC * (targets != IGNORED).unsqueeze(1)
    return root_BC


def _root_of_softmax(outputs: Tensor, classes: int, r: Tensor) -> Tensor:
    """R r with R R^T = diag(p) - p p^T: R = diag(q) - p q^T, q the roots of the probabilities p."""
    p = outputs.softmax(classes)
    scaled = p.sqrt() * r
    return scaled - p * scaled.sum(classes, keepdim=True)


def _of_positions(classes: int, reduction: str) -> Form:
    """Cross-entropies of every position, classes along axis 1 or -1, put together by sample."""

    def weights(targets_BT: Tensor, like: Tensor) -> Tensor:
        """What each position's loss counts in its sample's."""
        counted_BT = (targets_BT != IGNORED).to(like.dtype)
        if reduction == "sum":
            return counted_BT
        if reduction == "mean over all":
            return counted_BT / counted_BT[0].numel()
        counts_B = counted_BT.flatten(1).sum(1).clamp_min(1)
        return counted_BT / counts_B.view(-1, *(1,) * (targets_BT.ndim - 1))

    def parts(outputs: Tensor, targets_BT: Tensor) -> Tensor:
        losses_BT = _of_classes(outputs.movedim(classes, 1), targets_BT)
        return losses_BT * weights(targets_BT, losses_BT)

    def losses(outputs: Tensor, targets_BT: Tensor) -> Tensor:
        return parts(outputs, targets_BT).flatten(1).sum(1)

    def hessian(outputs: Tensor, targets_BT: Tensor, tangents: Tensor) -> Tensor:
        p = outputs.softmax(classes)
        product = p * (tangents - (p * tangents).sum(classes, keepdim=True))
        return product * weights(targets_BT, product).unsqueeze(classes) / len(outputs)

    def root(outputs: Tensor, targets_BT: Tensor, r: Tensor) -> Tensor:
        roots = weights(targets_BT, outputs).sqrt().unsqueeze(classes)
        return _root_of_softmax(outputs, classes, r) * roots

    axis = "last" if classes == -1 else "second"
    words = f"cross-entropy, classes on the {axis} axis, {reduction} positions"
    return Form(words, losses, hessian, root, classes=classes, parts=parts)


# -- squared error and binary cross-entropy --------------------------------------------------------


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Over all outputs (B, ...) of a sample; shape (B,)."""
    return _by_sample((outputs - targets).square()).mean(1)


def _squared_error(words: str, factor: float, *, mean: bool) -> Form:
    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        squares = _by_sample((outputs - targets.reshape(outputs.shape)).square())
        return factor * (squares.mean(1) if mean else squares.sum(1))

    def hessian(outputs: Tensor, _targets: Tensor, tangents: Tensor) -> Tensor:
        return tangents * (2 * factor / (outputs.numel() if mean else len(outputs)))

    return _diagonal(words, losses, hessian)


def _binary_cross_entropy(words: str, *, mean: bool) -> Form:
    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.reshape(outputs.shape).to(outputs.dtype)
        found = _by_sample(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))
        return found.mean(1) if mean else found.sum(1)

    def hessian(outputs: Tensor, _targets: Tensor, tangents: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * tangents / (outputs.numel() if mean else len(outputs))

    return _diagonal(words, losses, hessian)


def _diagonal(
    words: str,
    losses: Callable[[Tensor, Tensor], Tensor],
    hessian: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Form:
    """A loss that is convex in each output by itself."""

    def root(outputs: Tensor, targets: Tensor, r: Tensor) -> Tensor:
        diagonal = hessian(outputs, targets, torch.ones_like(outputs)) * len(outputs)
        return diagonal.clamp(min=0).sqrt() * r

    return Form(words, losses, hessian, root, diagonal=True)


def _by_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


#: The forms of each named loss, the plainest first.
FORMS: Final[dict[OutputLoss, tuple[Form, ...]]] = {
    "cross-entropy": (
        Form(
            "cross-entropy of logits (B, C)",
            cross_entropy,
            _cross_entropy_hessian,
            _cross_entropy_root,
        ),
        *(
            _of_positions(classes, reduction)
            for reduction in ("mean over counted", "mean over all", "sum")
            for classes in (-1, 1)
        ),
    ),
    "mse": (
        _squared_error("squared error, mean over outputs", 1.0, mean=True),
        _squared_error("squared error, sum over outputs", 1.0, mean=False),
        _squared_error("half the squared error, mean over outputs", 0.5, mean=True),
        _squared_error("half the squared error, sum over outputs", 0.5, mean=False),
    ),
    "binary-cross-entropy": (
        _binary_cross_entropy("binary cross-entropy of logits, mean over outputs", mean=True),
        _binary_cross_entropy("binary cross-entropy of logits, sum over outputs", mean=False),
    ),
}


def require_outputs_of_loss(kind: type["Task"]) -> None:
    """Refuse a class of tasks that names its loss, but not what it is the loss of.

    Raises:
        SpecError: It has `output_loss`, and no outputs() or no targets().
    """
    from influence_jobs.tasks.base import defines

    undefined = [f"{name}()" for name in ("outputs", "targets") if not defines(kind, name)]
    if undefined and kind.output_loss is not None:
        raise SpecError(
            f"{kind.__name__} sets output_loss, but defines no {' and no '.join(undefined)}: "
            "define what is missing, or leave output_loss out"
        )


def forms_of(task: "Task") -> tuple[Form, ...]:
    """The forms that a task's losses may have.

    Raises:
        ModelError: It declares no `output_loss`, or one that there is not.
    """
    declared = task.output_loss
    if callable(declared):
        return (_of_function(declared),)
    names = ", ".join(map(repr, FORMS))
    if declared is None:
        raise ModelError(
            f"{type(task).__name__} declares no output_loss, which the Gauss-Newton matrix needs: "
            f"set it to {names}, define it as a method (self, outputs, targets) -> losses, or use "
            "--operator hessian"
        )
    if declared not in FORMS:
        raise ModelError(
            f"output_loss of {type(task).__name__} is {declared!r}: set it to {names}, or "
            "define it as a method (self, outputs, targets) -> losses"
        )
    return FORMS[declared]


def forms_that_give(
    losses_B: Tensor,
    outputs: Tensor,
    targets: Tensor,
    forms: Sequence[Form],
) -> tuple[Form, ...]:
    """Those of some forms that give the losses of a few samples."""
    right = which_forms_give(losses_B, outputs, targets, forms).tolist()
    return tuple(form for form, gives in zip(forms, right, strict=True) if gives)


def which_forms_give(
    losses_B: Tensor,
    outputs: Tensor,
    targets: Tensor,
    forms: Sequence[Form],
) -> Tensor:
    """Which of F forms give the losses of a few samples, (F,), where the losses are."""
    never, found = losses_B.new_zeros((), dtype=torch.bool), []
    for form in forms:
        try:
            declared_B = form.losses(outputs, targets)
        except (RuntimeError, ValueError, IndexError):  # it is of other shapes
            found.append(never)
            continue
        fits = declared_B.shape == losses_B.shape
        found.append(alike(losses_B, declared_B) if fits else never)
    return torch.stack(found) if found else never.view(1)[:0]


def alike(a_B: Tensor, b_B: Tensor) -> Tensor:
    """Whether losses differ by rounding only, where the losses are."""
    # Relative to the largest loss, since a loss near zero may be a difference of large numbers.
    difference = (a_B - b_B).abs().max()
    return difference <= RELATIVE_ERROR * torch.maximum(a_B.abs().max(), b_B.abs().max())


def has_one_class_each(task: "Task") -> bool:
    """Whether a sample has one class, whose cross-entropy is its loss; no sequence of them."""
    from influence_jobs.tasks.base import Draw

    if task.output_loss != "cross-entropy":
        return False
    targets = task.targets(task.batch(torch.tensor([0]), Draw(0)))
    return not targets.is_floating_point() and targets.shape == (1,)
