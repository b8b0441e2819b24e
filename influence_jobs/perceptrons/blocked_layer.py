r"""A linear layer of M models, trained by SGD in blocks of steps.

The first layer of a perceptron holds nearly all its weights. A step of SGD touches all of them,
although its batch has only a few samples. But the layer's inputs are known in advance, and SGD is
linear in the gradients. So the weights can stay unchanged for a block of S steps. During the block
small products correct the outputs for the pending updates (`PendingOutputs`). At its end one large
product makes all the updates.

*Modes.* Take momentum m, weight decay w and learning rate h. torch's SGD is v <- m v + w W + G,
W <- W - h v. Without v this is the recurrence W_{t+1} = (1 + m - h w) W_t - m W_{t-1} - h G_t. Its
characteristic polynomial r^2 - (1 + m - h w) r + m has the roots r_1 > r_2. So W is the sum of two
independent *modes*:

    W_t = P_t + Q_t,   P_{t+1} = r_1 P_t + c_1 G_t,   Q_{t+1} = r_2 Q_t + c_2 G_t.

A single gradient changes W by -h after one step and by -h (r_1 + r_2) after two. From this follow
c_1 = -h r_1 / (r_1 - r_2) and c_2 = h r_2 / (r_1 - r_2). Momentum starts at zero: W_{-1} = W_0. So
P_0 = W_0 r_1 (1 - r_2) / (r_1 - r_2) and Q_0 = W_0 - P_0.

*A block.* Let X_t be the inputs (B, I) of step t, and D_t the gradient (B, C) of the summed loss by
the layer's outputs, so that G_t = D_t^T X_t / B. Let g_j = c_1 r_1^(j-1) + c_2 r_2^(j-1) be the
factor by which a gradient has changed W after j steps. The layer's outputs are

    Z_t = X_t W_t^T = r_1^t X_t P_0^T + r_2^t X_t Q_0^T + sum_{s<t} g_{t-s} (X_t X_s^T) D_s / B.

The first two terms come from one product of all K inputs with [P_0; Q_0] when the block begins.
The X_t X_s^T are blocks of one Gram matrix (K, K). At the end one product updates each mode:

    P_S = r_1^S P_0 + sum_s c_1 r_1^(S-1-s) D_s^T X_s / B,   Q_S likewise.

No term is left out: the result is that of SGD up to rounding.

Letters: M models, S steps of a block, B batch, K = S B samples, C outputs, I inputs (the last is
one; its weight is the bias).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from influence_jobs.perceptrons.pending import PendingOutputs
from influence_jobs.training.recipe import Recipe

MIN_GAP = 1e-3  # least difference of the modes' rates; closer modes lose digits by cancellation


@dataclass(frozen=True)
class Modes:
    """The two modes of SGD with momentum and weight decay.

    Attributes:
        rates: r_1 and r_2.
        gains: c_1 and c_2.
    """

    rates: tuple[float, float]
    gains: tuple[float, float]


def sgd_modes(recipe: Recipe) -> Modes | None:
    """The modes; None for Adam, for complex rates and for rates closer than `MIN_GAP`.

    Nor are there any of Nesterov's momentum, clipping, changing rates, and decay of some parameters
    only.
    """
    plain = Recipe(
        recipe.epochs, recipe.batch_size, "sgd", recipe.lr, recipe.momentum, recipe.weight_decay
    )
    if recipe != plain or recipe.lr is None:
        return None
    total = 1 + recipe.momentum - recipe.lr * recipe.weight_decay
    discriminant = total**2 - 4 * recipe.momentum
    if discriminant < MIN_GAP**2:
        return None
    gap = math.sqrt(discriminant)
    slow = (total + gap) / 2
    fast = recipe.momentum / slow
    return Modes((slow, fast), (-recipe.lr * slow / gap, recipe.lr * fast / gap))


class BlockedLayer:
    """The weights (M, C, I) of a layer, stored as their two modes.

    Attributes:
        modes_MCI: P and Q stacked, shape (M, 2C, I).
    """

    def __init__(self, weights_MCI: Tensor, modes: Modes):
        (slow, fast), gap = modes.rates, modes.rates[0] - modes.rates[1]
        slow_MCI = weights_MCI * (slow * (1 - fast) / gap)
        self.modes_MCI = torch.cat((slow_MCI, weights_MCI - slow_MCI), dim=1)
        self._modes = modes

    def weights(self, row: int) -> Tensor:
        """One model's weights (C, I)."""
        slow_CI, fast_CI = self.modes_MCI[row].chunk(2)
        return slow_CI + fast_CI

    def block(self, rows: slice, x_MKI: Tensor, steps: int) -> "Block":
        """Begin a block of steps of the models `rows` on inputs (M, K, I)."""
        return Block(self.modes_MCI[rows], self._modes, x_MKI, steps)


class Block:
    """A block of steps of some models.

    For each step call `outputs` and fill in its row of `d_MSBC`; then call `finish`.

    Attributes:
        outputs: Gives the layer's outputs (M, B, C) in a step, after all steps before it.
        d_MSBC: Gradients of the summed loss by the layer's outputs.
    """

    def __init__(self, modes_MCI: Tensor, modes: Modes, x_MKI: Tensor, steps: int):
        self._modes_MCI, self._modes, self._x_MKI, self._steps = modes_MCI, modes, x_MKI, steps
        self._width = modes_MCI.shape[1] // 2
        self._batch = batch = x_MKI.shape[1] // steps
        responses_KK, self._slow_K1, self._fast_K1 = _responses(
            modes, steps, batch, x_MKI.device, x_MKI.dtype
        )
        z_MKC = x_MKI @ modes_MCI.transpose(1, 2)
        slow_MKC, fast_MKC = torch.split(z_MKC, self._width, dim=2)
        z_MKC = slow_MKC.mul_(self._slow_K1).addcmul_(fast_MKC, self._fast_K1)
        pending = PendingOutputs(z_MKC, x_MKI, responses_KK, batch)
        self.outputs, self._d_MKC = pending.outputs, pending.d_EKC
        self.d_MSBC = torch.unflatten(self._d_MKC, 1, (steps, batch))

    def finish(self) -> None:
        """Make the updates of the whole block."""
        halves = torch.split(self._modes_MCI, self._width, dim=1)
        powers = (self._slow_K1, self._fast_K1)
        for half_MCI, powers_K1, rate, gain in zip(
            halves, powers, self._modes.rates, self._modes.gains, strict=True
        ):
            # The gradient of step s decays for S - 1 - s steps, so the powers are reversed.
            d_MKC = self._d_MKC * powers_K1.flip(0)
            half_MCI.baddbmm_(
                d_MKC.transpose(1, 2), self._x_MKI, beta=rate**self._steps, alpha=gain / self._batch
            )
        flush_(halves[1])


def flush_(values: Tensor) -> None:
    """Set values below 1e-30 to zero, in place.

    The momentum of a unit that no sample activates decays to subnormal numbers, with which CPUs are
    tens of times slower.
    """
    torch.ops.aten.hardshrink.out(values, 1e-30, out=values)


@lru_cache(maxsize=16)
def _responses(
    modes: Modes, steps: int, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of `Block`, by sample.

    Returns:
        g_{t-s} / B for samples of steps t and s < t, else 0, shape (K, K); and r_1^t and r_2^t for
        samples of step t, shapes (K, 1).
    """
    step_K = torch.arange(steps, dtype=torch.float64).repeat_interleave(batch)
    lag_KK = step_K[:, None] - step_K - 1
    responses_KK = sum(
        gain * rate ** lag_KK.clamp(min=0)
        for gain, rate in zip(modes.gains, modes.rates, strict=True)
    )
    responses_KK = torch.where(lag_KK < 0, 0.0, responses_KK / batch)
    powers = [(rate**step_K)[:, None] for rate in modes.rates]
    responses_KK, slow_K1, fast_K1 = (t.to(device, dtype) for t in (responses_KK, *powers))
    return responses_KK, slow_K1, fast_K1
