"""A vision transformer of torchvision on small images: docs/examples/vit.md."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.models import VisionTransformer
from typing_extensions import Doc

from influence_jobs import Batch, Draw, Task

TESTS = 200


class ViT(Task):
    """Which digit is it? Training sees each image moved by up to a pixel, anew in each epoch."""

    output_loss = "cross-entropy"

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Images to train on.")] = 500,
        hidden: Annotated[int, Doc("Hidden size.")] = 32,
    ) -> None:
        self.hidden = hidden
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1).repeat(1, 3, 1, 1) / 16
        labels = torch.from_numpy(digits.target)
        self.train_set = TensorDataset(images[:samples], labels[:samples])
        self.test_set = TensorDataset(images[-TESTS:], labels[-TESTS:])

    def model(self) -> nn.Module:
        return VisionTransformer(
            image_size=8,
            patch_size=2,
            num_layers=2,
            num_heads=2,
            hidden_dim=self.hidden,
            mlp_dim=2 * self.hidden,
            num_classes=10,
        )

    def train_data(self) -> TensorDataset:
        return self.train_set

    def test_data(self) -> TensorDataset:
        return self.test_set

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        """Augmentation is for training alone, and a function of (seed, epoch, sample)."""
        images, labels = self.batch(ids, draw)
        moved = torch.stack(
            [
                torch.roll(image, tuple(_moves(draw, int(i))), (1, 2))
                for image, i in zip(images, ids, strict=True)
            ]
        )
        return moved, labels

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        images, labels = self.test_set.tensors
        return {"accuracy": float((model(images).argmax(1) == labels).float().mean())}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self.train_set.tensors[1].numpy()[ids]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"label": self.test_set.tensors[1].numpy()[ids]}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return (self.train_set.tensors[0].numpy()[ids, 0] * 255).astype(np.uint8)

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return (self.test_set.tensors[0].numpy()[test, 0] * 255).astype(np.uint8)


def _moves(draw: Draw, index: int) -> list[int]:
    drawn = np.random.default_rng([draw.seed, draw.index, index])
    return [int(step) for step in drawn.integers(-1, 2, 2)]
