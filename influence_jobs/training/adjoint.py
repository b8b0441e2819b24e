"""Updates of torch's SGD, Adam and AdamW, backwards: from a derivative after a step to before it.

A step maps a parameter, the optimizer's state and a gradient to a new parameter and a new state.
Its transposed Jacobian maps the derivatives of a number by the latter (*cotangents*, written with a
bar) to those by the former. All of these optimizers work entry by entry, so this one does, too.

Q cotangents have a leading axis. Letters of `torch.optim`: theta parameter, g gradient, lr learning
rate, lambda weight decay, mu momentum, b its buffer, m and v Adam's moments.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from influence_jobs.errors import ModelError

_REFUSED = ("dampening", "maximize", "amsgrad")


@dataclass(frozen=True)
class Update:
    """One parameter's part in one step.

    Attributes:
        settings: Of its group in the optimizer, as the step used them: lr, weight_decay, ...
        gradient: As the optimizer got it, that is clipped.
        weight: The parameter before the step.
        state: Its state in the optimizer after the step.
    """

    settings: Mapping[str, Any]
    gradient: Tensor
    weight: Tensor
    state: Mapping[str, Tensor]


class Cotangents(ABC):
    """Q cotangents of one parameter and of its optimizer's state, before the next step to undo.

    Args:
        weight_Q: By the parameter, (Q, *shape); changed in place.

    Attributes:
        parts: The cotangents by name; "weight" is that of the parameter.
    """

    state: ClassVar[tuple[str, ...]]
    kept: ClassVar[tuple[str, ...]] = ()  # of the optimizer's state, what `back` needs

    def __init__(self, weight_Q: Tensor):
        zeros = {name: torch.zeros_like(weight_Q) for name in self.state}
        self.parts: dict[str, Tensor] = {"weight": weight_Q, **zeros}

    @abstractmethod
    def back(self, update: Update) -> Tensor:
        """Go back through an update, all but the gradient's own dependence on the parameter.

        Returns:
            The cotangents of the gradient, (Q, *shape).
        """


class OfSGD(Cotangents):
    """b' = mu b + h with h = g + lambda theta; theta' = theta - lr b', Nesterov - lr (h + mu b').

    Torch begins with b' = h, which is the same as b = 0.
    """

    state = ("buffer",)

    def back(self, update: Update) -> Tensor:
        lr, decay, momentum = (
            float(update.settings[name]) for name in ("lr", "weight_decay", "momentum")
        )
        weight_Q, buffer_Q = self.parts["weight"], self.parts["buffer"]
        direction_Q = -lr * weight_Q
        if not momentum:
            gradient_Q = direction_Q
        elif update.settings["nesterov"]:
            buffer_Q.add_(direction_Q, alpha=momentum)
            gradient_Q = direction_Q + buffer_Q
        else:
            gradient_Q = buffer_Q.add_(direction_Q).clone()
        buffer_Q.mul_(momentum)
        weight_Q.add_(gradient_Q, alpha=decay)
        return gradient_Q


class OfAdam(Cotangents):
    """m' = b1 m + (1 - b1) g; v' = b2 v + (1 - b2) g^2; theta' = theta - c m' / (s sqrt(v') + eps).

    The root has no derivative at v' = 0. There all gradients so far were zero, so m' is zero too
    and the term with it vanishes: what is left is c / eps, the derivative that the update has.
    """

    state = ("first", "second")
    kept = ("exp_avg", "exp_avg_sq", "step")

    def back(self, update: Update) -> Tensor:
        lr, decay, eps = (float(update.settings[name]) for name in ("lr", "weight_decay", "eps"))
        beta1, beta2 = (float(beta) for beta in update.settings["betas"])
        weight_Q, first_Q, second_Q = (self.parts[n] for n in ("weight", "first", "second"))
        m, v = (update.state[name].to(weight_Q) for name in ("exp_avg", "exp_avg_sq"))
        steps = float(update.state["step"])  # on the CPU
        rate, scale = lr / (1 - beta1**steps), 1 / math.sqrt(1 - beta2**steps)
        root = v.sqrt()
        below = scale * root + eps
        first_Q.sub_(weight_Q / below, alpha=rate)
        by_v = torch.where(v > 0, rate * scale * m / (2 * root * below.square()), 0)
        second_Q.addcmul_(weight_Q, by_v)
        gradient = update.gradient
        decoupled = bool(update.settings["decoupled_weight_decay"])
        if decay and not decoupled:
            gradient = gradient + decay * update.weight
        gradient_Q = (1 - beta1) * first_Q + 2 * (1 - beta2) * gradient * second_Q
        first_Q.mul_(beta1)
        second_Q.mul_(beta2)
        if decoupled:
            weight_Q.mul_(1 - lr * decay)
        else:
            weight_Q.add_(gradient_Q, alpha=decay)
        return gradient_Q


_KNOWN: Mapping[type[Optimizer], type[Cotangents]] = {SGD: OfSGD, Adam: OfAdam, AdamW: OfAdam}


def cotangents_of(optimizer: Optimizer, task: str) -> type[Cotangents]:
    """The class for an optimizer.

    Args:
        task: Name of the task, which may have made it.

    Raises:
        ModelError: It is another than those above, or has an option that changes its updates.
    """
    known = _KNOWN.get(type(optimizer))
    cure = "train with one of these, or use infl submit influence"
    if known is None:
        raise ModelError(
            "unrolled knows the updates of torch.optim's SGD, Adam and AdamW only, and task "
            f"{task} is trained by {type(optimizer).__name__}: {cure}"
        )
    for group in optimizer.param_groups:
        for option in _REFUSED:
            if group.get(option):
                raise ModelError(
                    "unrolled knows plain SGD, Adam and AdamW only, and the optimizer of task "
                    f"{task} has {option}={group[option]}: leave it out, or use infl submit "
                    "influence"
                )
    return known


def clipped(
    gradients: Mapping[str, Tensor], limit: float | None
) -> tuple[dict[str, Tensor], float]:
    """Gradients scaled down to a norm, as `clip_grad_norm_` does, and the factor."""
    if limit is None:
        return dict(gradients), 1.0
    factor = min(1.0, limit / (_norm(gradients) + 1e-6))
    return {name: factor * gradient for name, gradient in gradients.items()}, factor


def back_through_clipping(
    gradients: Mapping[str, Tensor], cotangents: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """The cotangents (Q, *shape) of gradients, from those of the clipped gradients.

    g' = f g with f = limit / (|g| + 1e-6), so
    g_bar = f (g'_bar - (g . g'_bar) g / (|g| (|g| + 1e-6))).
    """
    if factor == 1:
        return dict(cotangents)
    norm = _norm(gradients)
    along_Q = sum(
        cotangents[name].flatten(1) @ gradient.flatten() for name, gradient in gradients.items()
    )
    assert isinstance(along_Q, Tensor)
    along_Q = along_Q / (norm * (norm + 1e-6))
    return {
        name: factor * (cotangents[name] - along_Q.view(-1, *[1] * gradient.ndim) * gradient)
        for name, gradient in gradients.items()
    }


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
