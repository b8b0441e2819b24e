"""ResNet-18 on a folder of images, with a subfolder for each class: docs/examples/resnet.md.

`python resnet.py` writes such a folder, of handwritten digits. Yours has a subfolder `train` and a
subfolder `test`, and in both a folder for each class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import Compose, Resize, ToTensor
from typing_extensions import Doc

from influence_jobs import Batch, Task


class ResNet(Task):
    """A ResNet-18 of torchvision, and two ImageFolders."""

    output_loss = "cross-entropy"
    paths = frozenset({"images"})  # where data lie does not name a run; what they are does

    def __init__(
        self,
        *,
        images: Annotated[str, Doc("Folder with train/ and test/.")],
        size: Annotated[int, Doc("Pixels of a side, after resizing.")] = 64,
    ) -> None:
        transform = Compose([Resize((size, size)), ToTensor()])  # no random crops: see train_batch
        self.train_set = ImageFolder(str(Path(images, "train")), transform)
        self.test_set = ImageFolder(str(Path(images, "test")), transform)
        assert self.train_set.classes == self.test_set.classes  # they are numbered by their folders

    def model(self) -> nn.Module:
        return resnet18(weights=None, num_classes=len(self.train_set.classes))

    def train_data(self) -> ImageFolder:
        return self.train_set

    def test_data(self) -> ImageFolder:
        return self.test_set

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        images, _ = batch
        return model(images)

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), self.targets(batch), reduction="none")

    # What follows is optional: accuracy after each epoch, and what people see of a sample.

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        images, labels = self.test_batch_of_all()
        return {"accuracy": float((model(images).argmax(1) == labels).float().mean())}

    def test_batch_of_all(self) -> Batch:
        """The test images, as one batch; cut it if yours are many."""
        return self.collate([self.test_set[i] for i in range(len(self.test_set))])

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _described(self.train_set, ids)

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return _described(self.test_set, ids)

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return np.stack([_picture(self.train_set, i) for i in ids])

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return _picture(self.test_set, test)


def _described(data: ImageFolder, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    paths, labels = zip(*(data.samples[i] for i in ids), strict=True)
    names = np.array([Path(path).name for path in paths])
    return {"label": np.array([data.classes[label] for label in labels]), "file": names}


def _picture(data: ImageFolder, index: int) -> npt.NDArray[np.uint8]:
    image, _ = data[index]
    return (image.permute(1, 2, 0) * 255).byte().numpy()


def write_digits(folder: Path, *, count: int = 200, tests: int = 40, classes: int = 10) -> None:
    """Write the first digits as PNG, train/3/0013.png, and the last ones under test/."""
    digits = load_digits()
    ids = np.flatnonzero(digits.target < classes)
    chosen = {"train": ids[:count], "test": ids[-tests:]}
    for part, ids in chosen.items():
        for i in ids:
            file = folder / part / str(digits.target[i]) / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[i] * 15.9).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(file)


if __name__ == "__main__":
    write_digits(Path("images"))
