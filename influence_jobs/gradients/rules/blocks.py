"""How a layer's work is cut: into blocks of samples, and through the gradient or past it."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# Numbers in one temporary: 8 MB stay in a CPU's cache; a GPU wants fewer and larger kernels.
_BLOCK_CPU, _BLOCK_GPU = 2**21, 2**26
# Multiplications that take as long as writing and reading a number (measured on a CPU: 30 to 150).
_MEMORY = 32
# Fewer samples in a block would read the vectors too often.
_FEWEST_SAMPLES = 16


def through_gradient(positions: int, vectors: int) -> bool:
    """Whether forming each sample's weight gradient first is cheaper.

    Per number of the weight and sample: T multiplications for the gradient, Q for the products with
    it and its way to memory and back, against T Q for the direct order. One position, or one
    vector, is always direct.
    """
    return positions + vectors + _MEMORY < positions * vectors


def in_blocks(
    results: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, numbers: int
) -> Tensor:
    """`results` of blocks of samples, each sample needing so many numbers of temporary memory."""
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
