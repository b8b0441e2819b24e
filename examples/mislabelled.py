"""MNIST with wrong labels, and MNIST without chosen images: docs/use-cases/mislabelled.md.

A share of the training images gets the label of another class, at random. `without` names a file
of images to leave out, such as `infl suspects RUN --csv FILE` writes.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow.csv
import torch
from torch import Tensor
from typing_extensions import Doc

from influence_jobs import Batch, Draw
from influence_jobs.tasks.mnist import MnistTask


class Mislabelled(MnistTask):
    """Which labels are wrong?"""

    published = None
    paths = frozenset({"data_dir", "without"})

    def __init__(
        self,
        *,
        data_dir: Annotated[str | None, Doc("Folder of downloaded data.")] = None,
        limit: Annotated[int | None, Doc("Use only the first images, so many.")] = 5000,
        share: Annotated[float, Doc("Of the labels, that are wrong.")] = 0.05,
        flip_seed: Annotated[int, Doc("Decides which labels are wrong.")] = 0,
        without: Annotated[
            str | None, Doc("CSV file whose column `image` names images to leave out.")
        ] = None,
    ) -> None:
        super().__init__(data_dir=data_dir, limit=limit)
        self.share, self.flip_seed, self.without = share, flip_seed, without

    @cached_property
    def images_N(self) -> npt.NDArray[np.int64]:
        """Places in MNIST of the images that are trained on."""
        images = np.arange(len(self._true))
        if self.without is None:
            return images
        left_out = pyarrow.csv.read_csv(self.without).column("image").to_numpy()
        return np.setdiff1d(images, left_out)

    @cached_property
    def _true(self) -> npt.NDArray[np.int64]:
        return self._mnist.train_labels[: self.limit].numpy()

    @cached_property
    def _given(self) -> npt.NDArray[np.int64]:
        """Labels, of which some are wrong; which ones does not depend on what is left out."""
        drawn, given = np.random.default_rng(self.flip_seed), self._true.copy()
        wrong = drawn.choice(len(given), round(self.share * len(given)), replace=False)
        given[wrong] = (given[wrong] + drawn.integers(1, 10, len(wrong))) % 10
        return given

    @cached_property
    def _labels_N(self) -> Tensor:
        return torch.from_numpy(self._given[self.images_N])

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        images = self._mnist.train_images[torch.from_numpy(self.images_N)[ids]]
        return self._scaled(images), self._labels_N[ids]

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        images = self.images_N[ids]
        return {"label": self._given[images], "true": self._true[images], "image": images}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self._mnist.train_images.numpy()[self.images_N[ids]]

    def fingerprint(self) -> str:
        left_out = "none"
        if self.without is not None:
            left_out = hashlib.sha256(Path(self.without).read_bytes()).hexdigest()[:16]
        return f"{super().fingerprint()}, left out: {left_out}"
