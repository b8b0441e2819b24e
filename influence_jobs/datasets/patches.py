"""Square patches of the images in a folder, numbered from 0 and cut only when needed."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.errors import DataError, SpecError


class PatchIndex:
    """The position of every patch, computed from image sizes alone.

    In each image the grid starts at (0, 0) and continues in steps of `stride` as long as the whole
    patch lies inside. Ids ascend image by image, and row by row within an image.

    Args:
        sizes: (height, width) of each image.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
        names: Name of each image, for error messages.

    Raises:
        SpecError: Patch size or stride is below 1.
        DataError: An image is smaller than the patch.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        patch_size: int,
        stride: int,
        names: Sequence[str],
    ) -> None:
        if patch_size < 1 or stride < 1:
            raise SpecError(
                f"patch size {patch_size} and stride {stride} must both be at least 1 pixel"
            )
        for (height, width), name in zip(sizes, names, strict=True):
            if min(height, width) < patch_size:
                raise DataError(
                    f"image {name} ({width}x{height}) is smaller than the patch size {patch_size}; "
                    "choose a smaller patch or remove the image"
                )
        self.patch_size = patch_size
        self._stride = stride
        grids = (np.array(sizes, dtype=np.int64).reshape(-1, 2) - patch_size) // stride + 1
        self._columns = grids[:, 1]
        self._ends = np.cumsum(grids.prod(axis=1))  # one past the last id of each image

    def __len__(self) -> int:
        """Number of patches of all images."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(
        self, ids: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions of patches.

        Args:
            ids: (B,) patch ids.

        Returns:
            The number of the image, and row and column of the patch's upper left pixel, (B,) each.

        Raises:
            IndexError: An id is out of range.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"patch ids must be in [0, {len(self)})")
        image = np.searchsorted(self._ends, ids, side="right")
        within = ids - np.concatenate(([0], self._ends))[image]
        columns = self._columns[image]
        return image, within // columns * self._stride, within % columns * self._stride


class Patches:
    """The patches of the images in a folder.

    An image is decoded when one of its patches is needed. The latest images are cached up to a
    memory limit, so ascending ids decode each image once. The default limit holds 500 images of
    481x321. Not thread-safe.

    Args:
        folder: The images.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
        cache_bytes: Limit for cached images; the image in use is kept even if it is larger.

    Attributes:
        index: Where each patch lies.

    Raises:
        SpecError: Patch size or stride is below 1.
        DataError: A header cannot be read, or an image is smaller than the patch.
    """

    def __init__(
        self, folder: ImageFolder, patch_size: int, stride: int, *, cache_bytes: int = 256 << 20
    ) -> None:
        self.index = PatchIndex(folder.sizes, patch_size, stride, folder.names)
        self._folder = folder
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        """Number of patches of all images."""
        return len(self.index)

    def get(self, ids: torch.Tensor) -> torch.Tensor:
        """Cut patches.

        Args:
            ids: (B,) int64 patch ids, in any order.

        Returns:
            (B, C, patch_size, patch_size) uint8.

        Raises:
            IndexError: An id is out of range.
            DataError: An image cannot be decoded.
        """
        side = self.index.patch_size
        image_B, row_B, column_B = self.index.locate(ids.numpy())
        patches = torch.empty(len(ids), self._folder.channels, side, side, dtype=torch.uint8)
        for k in np.argsort(image_B).tolist():  # image by image, so that none is decoded twice
            row, column = row_B[k], column_B[k]
            image = self._image(int(image_B[k]))
            patches[k] = image[:, row : row + side, column : column + side]
        return patches

    def _image(self, number: int) -> torch.Tensor:
        if number in self._cached:
            self._cached.move_to_end(number)
            return self._cached[number]
        image = self._folder.load(number)
        self._cached[number] = image
        self._cached_bytes += image.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cached) > 1:
            _, dropped = self._cached.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return image
