"""The report's denoiser: FFDNet on patches of photographs with Gaussian noise."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.datasets.noise import gaussian_noise, uniform
from influence_jobs.datasets.patches import Patches
from influence_jobs.datasets.quality import psnr
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.tasks.base import Batch, Draw, Task, device_of

MAX_TRAIN_SIGMA = 75.0
EVAL_SIGMA = 25.0
TRAINING_DRAWS = 2**32  # number of the first epoch's noise draw


class FFDNetTask(Task):
    """Patches cut lazily from a folder of images; noise fixed by (seed, patch, draw).

    Args:
        images: Folder of training images, or `samples`.
        test_images: Folder of images for validation, or `samples-test`.
        patch_size: Side of a patch, in pixels.
        stride: Step between patches, in pixels.
        sigma: Noise level in attribution, in grey levels of 255. Training draws it from [0, 75].
        skip: Names of unreadable images to leave out.
        limit: Only the first so many patches.
    """

    batch_size = 32
    paths = frozenset({"images", "test_images"})
    attribution_options = frozenset({"sigma"})
    color: ClassVar[bool] = True  # the 12-layer colour network

    def __init__(
        self,
        *,
        images: str = "samples",
        test_images: str = "samples-test",
        patch_size: int = 50,
        stride: int = 25,
        sigma: float = 25.0,
        skip: tuple[str, ...] = (),
        limit: int | None = None,
    ):
        self.folder = ImageFolder(images, color=self.color, skip=frozenset(skip))
        self.patches = Patches(self.folder, patch_size, stride)
        self._test_images = test_images
        self.sigma = sigma
        self.limit = limit

    @classmethod
    def network(cls) -> FFDNet:
        """The untrained denoiser, which needs no data."""
        return FFDNet(color=cls.color)

    def model(self) -> nn.Module:
        return self.network()

    def train_data(self) -> range:
        return range(len(self.patches))[: self.limit]

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        sigma_B = torch.full((len(ids),), self.sigma / 255)
        return self._noised(ids, sigma_B, draw)

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        # Attribution must not meet the very noise that was trained on.
        draw = Draw(draw.seed, TRAINING_DRAWS + draw.index)
        sigma_B = uniform(ids, seed=draw.seed, draw=draw.index) * (MAX_TRAIN_SIGMA / 255)
        return self._noised(ids, sigma_B, draw)

    def _noised(self, ids: Tensor, sigma_B: Tensor, draw: Draw) -> Batch:
        clean = self.patches.get(ids).float().div_(255)
        noise = gaussian_noise(ids, clean.shape[1:], seed=draw.seed, draw=draw.index)
        noisy = noise.mul_(sigma_B[:, None, None, None]).add_(clean)
        return noisy, sigma_B, clean

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy, sigma_B, clean = batch
        losses_B: Tensor = (model(noisy, sigma_B) - clean).square().mean(dim=(1, 2, 3))
        return losses_B

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        folder = ImageFolder(self._test_images, color=self.color)
        results = list(denoise(model, folder, sigma=EVAL_SIGMA))
        return {"psnr": float(np.mean([result.psnr for result in results]))}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        image, row, column = self.patches.index.locate(ids)
        return {"file": np.array(self.folder.names)[image], "row": row, "column": column}

    def prepare(self, say: Callable[[str], None]) -> None:
        self.folder.check(skip_unreadable=False)

    def fingerprint(self) -> str:
        # The test images too: they decide the PSNR that a train run records.
        test = ImageFolder(self._test_images, color=self.color)
        return f"images {self.folder.digest()} test {test.digest()}"


class Denoised(NamedTuple):
    """One denoised image: its name, pixels (C,H,W) in [0, 1], and PSNR in dB before and after."""

    name: str
    image: Tensor
    noisy_psnr: float
    psnr: float


@torch.no_grad()
def denoise(
    model: nn.Module, folder: ImageFolder, *, sigma: float, seed: int = 0
) -> Iterator[Denoised]:
    """Add noise of level `sigma` (grey levels of 255) to every image of a folder and denoise it."""
    model.eval()
    device = device_of(model)
    for i, name in enumerate(folder.names):
        clean = folder.load(i)[None].float() / 255
        noise = gaussian_noise(torch.tensor([i]), clean.shape[1:], seed=seed, draw=0)
        noisy = clean + noise * (sigma / 255)
        sigma_B = torch.tensor([sigma / 255], device=device)
        image = model(noisy.to(device), sigma_B).cpu().clamp(0, 1)
        yield Denoised(name, image[0], float(psnr(clean, noisy)), float(psnr(clean, image)))


class FFDNetGreyTask(FFDNetTask):
    """The 15-layer grey network."""

    color = False
