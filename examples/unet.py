"""A U-Net that removes noise, with queries of single pixels and regions: docs/examples/unet.md."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from typing_extensions import Doc

from influence_jobs import Batch, Region, Task

SIZE = 16  # pixels of a side
SHAPES = ("disc", "cross")


class Block(nn.Module):
    """A convolution and a normalisation over groups of channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class UNetwork(nn.Module):
    """Down by two and up again, with a path past it; images (B, 1, H, W) to images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = Block(1, width)
        self.middle = Block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = self.up(self.middle(F.max_pool2d(fine, 2)))
        return self.out(torch.cat([fine, coarse], 1))


def drawings(count: int, seed: int) -> TensorDataset:
    """Noisy images, the images without noise, and the shape drawn: 0 a disc, 1 a cross."""
    drawn = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2, (count,), generator=drawn)
    centres = torch.randint(4, SIZE - 4, (count, 2, 1, 1), generator=drawn)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    dy, dx = (y - centres[:, 0]).abs(), (x - centres[:, 1]).abs()
    disc, cross = dy**2 + dx**2 <= 9, (dy <= 3) & (dx <= 3) & ((dy == 0) | (dx == 0))
    clean = torch.where(kinds[:, None, None] == 0, disc, cross).float().unsqueeze(1)
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=drawn)
    return TensorDataset(noisy, clean, kinds)


class UNet(Task):
    """Take the noise out of drawings of discs and crosses."""

    output_loss = "mse"
    batch_size = 32  # samples a pass, unless --batch says otherwise

    def __init__(
        self,
        *,
        samples: Annotated[int, Doc("Images to train on.")] = 200,
        width: Annotated[int, Doc("Channels of the first layer.")] = 8,
    ) -> None:
        self.width = width
        self.train_set, self.test_set = drawings(samples, 0), drawings(20, 1)

    def model(self) -> nn.Module:
        return UNetwork(self.width)

    def train_data(self) -> TensorDataset:
        return self.train_set

    def test_data(self) -> TensorDataset:
        return self.test_set

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.outputs(model, batch) - batch[1]).square().mean((1, 2, 3))

    # Regions: how large a test image is, and what is measured of a part of it.

    quantities = ("loss", "output")

    def test_size(self, test: int) -> tuple[int, int]:
        return SIZE, SIZE

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str, region: Region | None
    ) -> Tensor:
        y, x, height, width = region or (0, 0, SIZE, SIZE)
        values = self.outputs(model, batch)
        if quantity == "loss":
            values = (values - batch[1]).square()
        return values[:, :, y : y + height, x : x + width].mean((1, 2, 3))

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"shape": np.array(SHAPES)[self.train_set.tensors[2].numpy()[ids]]}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"shape": np.array(SHAPES)[self.test_set.tensors[2].numpy()[ids]]}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return _bytes(self.train_set.tensors[0])[ids]

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return _bytes(self.test_set.tensors[0])[test]


def _bytes(images: Tensor) -> npt.NDArray[np.uint8]:
    return (images[:, 0].clamp(0, 1) * 255).byte().numpy()
