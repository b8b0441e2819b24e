"""Choose block sizes, and whether dot products form the gradient first."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# Numbers in one temporary tensor: 8 MB fit a CPU's cache; a GPU is faster with large kernels.
_BLOCK_CPU, _BLOCK_GPU = 2**21, 2**26
# Multiplications in the time of writing and reading one number (measured on a CPU: 30 to 150).
_MEMORY = 32
# With fewer samples in a block the vectors would be read too often.
_FEWEST_SAMPLES = 16


def through_gradient(positions: int, vectors: int) -> bool:
    """Whether forming each sample's weight gradient first is cheaper.

    Costs are per sample and number of the weight. The gradient takes T multiplications, its
    products with the vectors take Q, and it is written to memory and read back. The direct order
    takes T Q multiplications; it is always chosen for one position or one vector.
    """
    return positions + vectors + _MEMORY < positions * vectors


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
