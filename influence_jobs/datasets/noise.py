"""Random numbers of a sample that do not depend on the order in which samples are visited.

Each (seed, draw, sample id) has its own stream of the counter-based generator Philox: seed and draw
are the key, and the id is the highest word of the counter. So a sample's numbers never depend on
the shard, worker, batch or order in which it is computed. `draw` counts repeated draws for one
sample: the epochs, or several noise draws that are averaged.

Salmon et al.: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.random import Generator, Philox

# The lowest bit of the key separates the two kinds of numbers of one (seed, draw, id).
_GAUSSIAN, _UNIFORM = 0, 1


def gaussian_noise(
    ids: torch.Tensor, shape: Sequence[int], *, seed: int, draw: int
) -> torch.Tensor:
    """Draw standard normal noise for some samples.

    Args:
        ids: (B,) non-negative integers.
        shape: Shape of one sample's noise.
        seed: 0 to 2**64 - 1.
        draw: 0 to 2**63 - 1.

    Returns:
        (B, *shape) float32.
    """
    noise = torch.empty(len(ids), *shape)
    rows = noise.numpy()
    for row, generator in enumerate(_streams(ids, seed, 2 * draw + _GAUSSIAN)):
        generator.standard_normal(dtype=np.float32, out=rows[row])
    return noise


def uniform(ids: torch.Tensor, *, seed: int, draw: int) -> torch.Tensor:
    """Draw one uniform number in [0, 1) per sample, independent of its Gaussian noise.

    Args:
        ids: (B,) non-negative integers.
        seed: 0 to 2**64 - 1.
        draw: 0 to 2**63 - 1.

    Returns:
        (B,) float32.
    """
    streams = _streams(ids, seed, 2 * draw + _UNIFORM)
    return torch.tensor([float(g.random(dtype=np.float32)) for g in streams], dtype=torch.float32)


def _streams(ids: torch.Tensor, seed: int, stream: int) -> Iterator[Generator]:
    """Yield the same generator for each id, set to the start of that id's stream."""
    philox = Philox(key=np.array([seed, stream], dtype=np.uint64))
    generator = Generator(philox)
    start = philox.state  # setting a state takes a third of the time of constructing a Philox
    for sample_id in ids.tolist():
        start["state"]["counter"][3] = sample_id
        philox.state = start
        yield generator
