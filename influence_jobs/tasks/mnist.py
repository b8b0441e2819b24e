"""The MNIST classifier of the research report: 784-128-64-10, log-likelihood, 60,000 images."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Doc

from influence_jobs.datasets.mnist import Mnist, default_data_dir, fetch_mnist, load_mnist
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.tasks.base import Batch, Draw, Task, require_at_least
from influence_jobs.tasks.placement import device_of, to_device
from influence_jobs.tasks.published import MNIST, Published
from influence_jobs.terms import OutputLoss


class MnistTask(Task):
    """MNIST in its canonical order, pixels scaled to [-1, 1]."""

    batch_size = 1024
    paths = frozenset({"data_dir"})
    output_loss: ClassVar[OutputLoss] = "cross-entropy"
    # The ten test images of the research report, section 4.1.
    query_sets: ClassVar[Mapping[str, tuple[int, ...]]] = {"paper": MNIST.tests}
    published: ClassVar[Published | None] = MNIST
    pixels: ClassVar[tuple[float, float]] = (0.5, 0.5)  # subtracted, then divided by

    def __init__(
        self,
        *,
        data_dir: Annotated[
            str | None,
            Doc("Folder of downloaded data; by default INFL_DATA, else your cache folder."),
        ] = None,
        limit: Annotated[int | None, Doc("Use only this many training images.")] = None,
    ):
        require_at_least(1, limit=limit)
        self.data_dir = Path(data_dir) if data_dir else default_data_dir()
        self.limit = limit

    @classmethod
    def settle(cls, options: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        # Stored as a path, since workers do not have the environment variables of the submitter.
        return {"data_dir": str(default_data_dir()), **options}

    @cached_property
    def _mnist(self) -> Mnist:
        return load_mnist(self.data_dir)

    @cached_property
    def _labels_N(self) -> Tensor:
        return self._mnist.train_labels[: self.limit]

    def model(self) -> nn.Module:
        return MnistMLP()

    def train_data(self) -> Tensor:
        return self._labels_N

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        # Images are kept as bytes: scaling a batch costs less than reading four times the memory.
        images = self._mnist.train_images[: self.limit].index_select(0, ids)
        return self._scaled(images), self._labels_N[ids]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        # On log-probabilities this equals the cross-entropy, but its Hessian in them is zero.
        return F.nll_loss(self.outputs(model, batch), self.targets(batch), reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probabilities (B, 10). They are also logits: their softmax is the probabilities."""
        log_probs_BC: Tensor = model(batch[0])
        return log_probs_BC

    def targets(self, batch: Batch) -> Tensor:
        labels_B: Tensor = batch[1]
        return labels_B

    def test_data(self) -> Tensor:
        return self._mnist.test_labels

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        return self._scaled(self._mnist.test_images[ids]), self._mnist.test_labels[ids]

    def test_images(self) -> Tensor:
        """The 10,000 test images as inputs of the model, (10000, 784)."""
        return self._scaled(self._mnist.test_images)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        images, labels = to_device((self.test_images(), self._mnist.test_labels), device_of(model))
        log_probs = model(images)
        return {
            "accuracy": float((log_probs.argmax(1) == labels).double().mean()),
            "test_loss": float(F.nll_loss(log_probs, labels)),
        }

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._labels_N.numpy()[ids]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self._mnist.test_labels.numpy()[ids]}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        images_BHW: npt.NDArray[np.uint8] = self._mnist.train_images.numpy()[ids]
        return images_BHW

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        image_HW: npt.NDArray[np.uint8] = self._mnist.test_images.numpy()[test]
        return image_HW

    def prepare(self, say: Callable[[str], None]) -> None:
        fetch_mnist(self.data_dir, say=say)

    def fingerprint(self) -> str:
        # The content is known: load_mnist has checked the MD5 of every file.
        return f"MNIST, {len(self._labels_N)} samples"

    def _scaled(self, images: Tensor) -> Tensor:
        mean, deviation = self.pixels
        return images.flatten(1).float().div_(255).sub_(mean).div_(deviation)


class MnistDropoutTask(MnistTask):
    """The same network with dropout of .1."""

    published = None

    def model(self) -> nn.Module:
        return MnistMLP(dropout=0.1)


class MnistLdsTask(MnistDropoutTask):
    """The protocol of published linear datamodeling scores: dropout, standardised pixels, 5,000.

    Deng et al.: "dattri: A Library for Efficient Data Attribution", 2024.
    """

    pixels = (0.1307, 0.3081)

    def __init__(
        self,
        *,
        data_dir: Annotated[
            str | None,
            Doc("Folder of downloaded data; by default INFL_DATA, else your cache folder."),
        ] = None,
        limit: Annotated[int | None, Doc("Use only this many training images.")] = 5000,
    ):
        super().__init__(data_dir=data_dir, limit=limit)
