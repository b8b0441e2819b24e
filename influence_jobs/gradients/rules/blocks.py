"""Choose block sizes, and the cheapest of several ways to a layer's result.

Costs are counted, not timed, so the choice is the same on every machine. Letters: those of `base`;
k is the number of offsets of a kernel, J = I k.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU = torch.device("cpu")
# Numbers in one temporary tensor: 8 MB fit a CPU's cache; a GPU is faster with large kernels.
_BLOCK_CPU, _BLOCK_GPU = 2**21, 2**26
# With fewer samples in a block the vectors would be read too often.
_FEWEST_SAMPLES = 16
# In multiplications, measured on a CPU: writing and reading a number (30 to 150), only reading one
# that may be in the cache (8 to 19), a call of torch's own convolution with what it arranges first
# (3 to 5 million, in 70 to 110 microseconds).
_MEMORY, _READ, _CALL = 32, 10, 5 * 2**20
# Multiplications in float32 that take as long as one in float64. Measured on a CPU; of a GPU, the
# makers' figure for those without float64 units.
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

    Costs are per sample and number of the weight. The gradient takes T multiplications, its
    products with the vectors take Q, and it is written to memory and read back. The direct order
    takes T Q multiplications; it is always chosen for one position or one vector.
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


def through_patches(shape: SampleShape, *, own: bool, device: torch.device = CPU) -> bool:
    """Whether a convolution's gradient is cheaper from the patches under its kernel, copied out.

    Args:
        shape: Of a sample.
        own: Against torch's own convolution, whose gradient has its kernel last, so that norms over
            the inputs go through it twice; else against views of the input, offset by offset.
        device: Of the tensors. On a GPU the numbers that are written or read decide: all ways take
            the same products.
    """
    if device.type == "cuda":
        return 2 * shape.inputs < shape.outputs + shape.inputs
    t, c, k = shape.positions, shape.outputs, shape.offsets
    patches = cost(t * shape.weights, written=t * shape.columns + shape.weights)
    if own:
        return patches < cost(t * shape.weights, written=2 * shape.weights, calls=1)
    return patches < cost(t * shape.weights, written=shape.weights, read=k * t * (c + shape.inputs))


def rows_rotated_first(shape: SampleShape) -> bool:
    """Whether a quadratic form is cheaper with the rows rotated, not the gradient."""
    t, c, j = shape.positions, shape.outputs, shape.columns
    rows = cost(t * (j * j + c * c), written=shape.rows)
    return rows < cost(shape.weights * (j + c), written=2 * shape.weights)


def patches(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The patches of padded images (B, I, *pixels) under a kernel, (B, T, I k)."""
    axes, found = len(kernel), images
    for axis in range(axes):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        found = found.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    positions, offsets = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    return found.permute(0, *positions, 1, *offsets).flatten(1 + axes).flatten(1, axes)


def in_blocks(
    results: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, numbers: int
) -> Tensor:
    """Apply `results` to blocks of samples; each sample takes `numbers` of temporary memory."""
    samples = max(_FEWEST_SAMPLES, (_BLOCK_GPU if g.is_cuda else _BLOCK_CPU) // numbers)
    if samples >= len(g):
        return results(a, g)
    blocks = zip(torch.split(a, samples), torch.split(g, samples), strict=True)
    return torch.cat([results(*block) for block in blocks])


def sample_blocks(samples: int, parameters: Iterable[Tensor]) -> Iterator[slice]:
    """Blocks of samples whose gradients by these parameters may be held at once."""
    chosen = [*parameters]
    held = 2**28 if chosen[0].is_cuda else 2**24  # 64 MB in float32 on a CPU
    size = max(1, held // sum(parameter.numel() for parameter in chosen))
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
