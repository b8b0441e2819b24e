"""MNIST with wrong labels: docs/use-cases/mislabelled.md.

A share of the training images gets the label of another class, at random. `without` names a file
of images to leave out, `corrected` one of images that a person has looked at and that have their
right label again; `infl suspects RUN --csv FILE` writes such files.
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
    paths = frozenset({"data_dir", "without", "corrected"})

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
        corrected: Annotated[
            str | None, Doc("CSV file whose column `image` names images with their right label.")
        ] = None,
    ) -> None:
        super().__init__(data_dir=data_dir, limit=limit)
        self.share, self.flip_seed = share, flip_seed
        self.without, self.corrected = without, corrected

    @cached_property
    def images_N(self) -> npt.NDArray[np.int64]:
        """Places in MNIST of the images that are trained on."""
        return np.setdiff1d(np.arange(len(self._true)), _images(self.without))

    @cached_property
    def _true(self) -> npt.NDArray[np.int64]:
        return self._mnist.train_labels[: self.limit].numpy()

    @cached_property
    def _given(self) -> npt.NDArray[np.int64]:
        """Labels, of which some are wrong; which ones does not depend on what is left out."""
        drawn, given = np.random.default_rng(self.flip_seed), self._true.copy()
        wrong = drawn.choice(len(given), round(self.share * len(given)), replace=False)
        given[wrong] = (given[wrong] + drawn.integers(1, 10, len(wrong))) % 10
        right = _images(self.corrected)
        given[right] = self._true[right]
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
        lists = [f"{super().fingerprint()}, left out: {_hash(self.without)}"]
        if self.corrected is not None:
            lists.append(f"corrected: {_hash(self.corrected)}")
        return ", ".join(lists)


def _images(file: str | None) -> npt.NDArray[np.int64]:
    if file is None:
        return np.zeros(0, np.int64)
    return np.asarray(pyarrow.csv.read_csv(file).column("image").to_numpy(), np.int64)


def _hash(file: str | None) -> str:
    return "none" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
