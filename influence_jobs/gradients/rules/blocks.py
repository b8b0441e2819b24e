"""How a layer's work is cut into blocks of samples, and which of several ways to a result is cheapest.

Costs are counted, not timed, so the choice is the same on every machine. Letters: those of `base`;
k offsets of a kernel, J = I k.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers in one temporary: 8 MB stay in a CPU's cache; a GPU wants fewer and larger kernels.
_BLOCK_CPU, _BLOCK_GPU = 2**21, 2**26
# Fewer samples in a block would read the vectors too often.
_FEWEST_SAMPLES = 16
# Multiplications that take as long as writing and reading a number (measured on a CPU: 30 to 150),
# as only reading one that may be in the cache (8 to 19), as a call of torch's own convolution, with
# what it arranges first (70 to 110 microseconds, 3 to 5 million).
_MEMORY, _READ, _CALL = 32, 10, 5 * 2**20
# Multiplications in float32 that take as long as one in float64: measured on a CPU; of a GPU what the
# makers say of those without units for it.
_DOUBLE = {"cpu": 2, "cuda": 64}


@dataclass(frozen=True)
class SampleShape:
    """The sizes of one sample at a layer that applies one matrix (C, J) to every position.

    Attributes:
        positions: T.
        outputs: C.
        inputs: I.
        offsets: k, 1 for a layer without a kernel.
    """

    positions: int
    outputs: int
    inputs: int
    offsets: int

    @property
    def columns(self) -> int:
        """J."""
        return self.inputs * self.offsets

    @property
    def weights(self) -> int:
        """C J."""
        return self.outputs * self.columns

    @property
    def rows(self) -> int:
        """T (J + C), the numbers that determine the gradient."""
        return self.positions * (self.columns + self.outputs)


def cost(multiplications: int, written: int, read: int = 0, calls: int = 0) -> int:
    """Of a way to a sample's result, in multiplications of float32.

    Args:
        multiplications: Those of matrix products.
        written: Numbers written to memory and read again.
        read: Numbers only read, beyond once.
        calls: Of torch's own convolution.
    """
    return multiplications + _MEMORY * written + _READ * read + _CALL * calls


def through_gradient(positions: int, vectors: int) -> bool:
    """Whether dot products are cheaper with each sample's weight gradient formed first.

    Per number of the weight and sample: T multiplications for the gradient, Q for the products with
    it and its way to memory and back, against T Q for the direct order. One position, or one
    vector, is always direct.
    """
    return cost(positions + vectors, written=1) < cost(positions * vectors, written=0)


def through_gram(shape: SampleShape, *, whole: bool, device: torch.device) -> bool:
    """Whether norms are cheaper from T x T Gram matrices in float64 than from the gradient.

    Args:
        shape: Of a sample.
        whole: One norm of all of the gradient; else of each output and offset.
        device: Of the tensors.
    """
    if device.type not in _DOUBLE:
        return False
    t, c, k = shape.positions, shape.outputs, shape.offsets
    products = t * shape.rows if whole else t * t * (shape.columns + k * c)
    found = 2 * t * t if whole else k * (t * t + 2 * t * c)
    gram = cost(_DOUBLE[device.type] * products, written=2 * (shape.rows + found))
    return gram < cost(t * shape.weights, written=shape.weights)


def through_patches(shape: SampleShape, *, own: bool) -> bool:
    """Whether a convolution's gradient is cheaper from the patches under its kernel, copied out.

    Args:
        shape: Of a sample.
        own: Against torch's own convolution, whose gradient has its kernel last, so that norms over
            the inputs go through it twice; else against views of the input, offset by offset.
    """
    t, c, k = shape.positions, shape.outputs, shape.offsets
    patches = cost(t * shape.weights, written=t * shape.columns + shape.weights)
    if own:
        return patches < cost(t * shape.weights, written=2 * shape.weights, calls=1)
    return patches < cost(t * shape.weights, written=shape.weights, read=k * t * (c + shape.inputs))


def rows_rotated_first(shape: SampleShape) -> bool:
    """Whether a quadratic form is cheaper with inputs and output gradients rotated, not the gradient."""
    t, c, j = shape.positions, shape.outputs, shape.columns
    rows = cost(t * (j * j + c * c), written=shape.rows)
    return rows < cost(shape.weights * (j + c), written=2 * shape.weights)


def in_blocks(
    results: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, numbers: int
) -> Tensor:
    """`results` of blocks of samples, each sample needing so many numbers of temporary memory."""
    samples = max(_FEWEST_SAMPLES, (_BLOCK_GPU if g.is_cuda else _BLOCK_CPU) // numbers)
    if samples >= len(g):
        return results(a, g)
    blocks = zip(torch.split(a, samples), torch.split(g, samples), strict=True)
    return torch.cat([results(*block) for block in blocks])
