"""Simple scores without gradients. A useful method must be better than these."""

import numpy as np
import numpy.typing as npt
from numpy.random import Philox
from torch import Tensor

from influence_jobs.errors import SpecError
from influence_jobs.terms import Region

_WORDS = 4  # random words per value of Philox's counter


def random_scores(
    query_ids: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64], *, seed: int
) -> npt.NDArray[np.float32]:
    """Uniform numbers in [0, 1); each depends on (seed, query, sample) only.

    Each query has its own stream of the counter-based generator Philox. A sample's number is the
    word of this stream at the sample's id.

    Salmon et al.: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        query_ids: (Q,), >= 0. Queries with the same id get the same scores.
        sample_ids: (B,), >= 0. All words from the smallest to the largest id are drawn.
        seed: 0 to 2**64 - 1.

    Returns:
        (Q, B).
    """
    scores = np.empty((len(query_ids), len(sample_ids)), dtype=np.float32)
    if not scores.size:
        return scores
    block = int(sample_ids.min()) // _WORDS
    first = block * _WORDS
    count = int(sample_ids.max()) - first + 1
    for row, query in enumerate(query_ids):
        # The 1 keeps this stream apart from `datasets.noise`, whose counter has a 0 there.
        counter = np.array([block, 0, 1, 0], dtype=np.uint64)
        stream = Philox(key=np.array([seed, query], dtype=np.uint64), counter=counter)
        words = stream.random_raw(count)[sample_ids - first]
        scores[row] = (words >> np.uint64(40)) * 2.0**-24  # the 24 bits that a float32 holds
    return scores


def own_scores(values_B: Tensor, num_queries: int) -> Tensor:
    """A sample's own loss or gradient norm, the same for every query: (Q, B), float32."""
    return values_B.float().expand(num_queries, -1)


def nearest_scores(
    queries_QD: npt.NDArray[np.number], samples_BD: npt.NDArray[np.number]
) -> npt.NDArray[np.float32]:
    """Minus the Euclidean distance of pixels, in grey levels of 255, or of embeddings: (Q, B)."""
    # Imported late: the other methods need only numpy and torch.
    from sklearn.metrics.pairwise import euclidean_distances

    # scikit-learn computes in float64 blocks, in which sums of squared bytes are exact.
    distances = euclidean_distances(queries_QD.astype(np.float32), samples_BD.astype(np.float32))
    return -np.asarray(distances, dtype=np.float32)


def query_pixels(
    picture: npt.NDArray[np.uint8], region: Region | None, shape: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """Cut a test picture to the size of the training pictures, around the centre of a region.

    Args:
        picture: (H, W) or (H, W, 3).
        region: (y, x, height, width); None for the whole picture. Near an edge the cut is moved
            inside.
        shape: Shape of one training picture.

    Returns:
        (D,), where D is the number of values of a training picture.

    Raises:
        SpecError: The test picture is smaller than training pictures, or only one of them is grey.
    """
    sides, size = picture.shape[:2], shape[:2]
    if picture.shape[2:] != shape[2:] or sides[0] < size[0] or sides[1] < size[1]:
        raise SpecError(
            f"a test picture of {picture.shape} cannot be compared with training pictures of "
            f"{shape}: choose a larger test image or smaller patches"
        )
    y, x, height, width = region or (0, 0, *sides)
    top = min(max(y + height // 2 - size[0] // 2, 0), sides[0] - size[0])
    left = min(max(x + width // 2 - size[1] // 2, 0), sides[1] - size[1])
    return picture[top : top + size[0], left : left + size[1]].ravel()
