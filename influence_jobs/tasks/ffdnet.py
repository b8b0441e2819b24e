"""The denoiser of the research report: FFDNet on patches of photographs with Gaussian noise."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import Doc

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.datasets.noise import gaussian_noise, uniform
from influence_jobs.datasets.patches import Patches
from influence_jobs.datasets.quality import psnr
from influence_jobs.errors import SpecError
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.tasks.base import Batch, Draw, Task, require_at_least
from influence_jobs.tasks.placement import device_of
from influence_jobs.tasks.published import FFDNET, FFDNET_GREY, Published
from influence_jobs.terms import OutputLoss, Region

MAX_TRAIN_SIGMA = 75.0
EVAL_SIGMA = 25.0
# The first noise draw in training and of test images; for training patches in attribution it is 0.
TRAINING_DRAWS = 2**32
TEST_DRAWS = 2**33


class FFDNetTask(Task):
    """Patches of the images in a folder; the noise depends on (seed, patch, draw) only.

    Test samples are whole images. The quantities of an image, or of a region of it, are means of
    squares over pixels and channels: of the output minus the clean image (`loss`), of the output
    itself (`output`), or of the output minus the noisy input (`change`). Where the network fits
    well the gradient of `loss` vanishes; use one of the other two there.

    Training draws noise levels from [0, 75]. `skip` has the names of images to leave out.
    """

    batch_size = 32
    paths = frozenset({"images", "test_images"})
    attribution_options = frozenset({"sigma"})
    request_options: ClassVar[Mapping[str, Any]] = {
        "skip_unreadable": Annotated[bool, Doc("Leave out images that cannot be decoded.")]
    }
    output_loss: ClassVar[OutputLoss] = "mse"
    quantities = ("loss", "output", "change")
    color: ClassVar[bool] = True  # the colour network of 12 layers
    published: ClassVar[Published | None] = FFDNET

    def __init__(
        self,
        *,
        images: Annotated[
            str,
            Doc(
                "Folder of training images (jpg, png, bmp, tif); by default the photographs that "
                "ship with scikit-image and scikit-learn."
            ),
        ] = "samples",
        test_images: Annotated[
            str, Doc("Folder of test images, for validation and as queries.")
        ] = "samples-test",
        patch_size: Annotated[int, Doc("Side of a patch, in pixels.")] = 50,
        stride: Annotated[int, Doc("Step between patches, in pixels.")] = 25,
        sigma: Annotated[float, Doc("Noise level in attribution, in grey levels of 255.")] = 25.0,
        skip: tuple[str, ...] = (),
        limit: Annotated[int | None, Doc("Use only this many patches.")] = None,
    ):
        require_at_least(1, patch_size=patch_size, stride=stride, limit=limit)
        require_at_least(0, sigma=sigma)
        self.folder = ImageFolder(images, color=self.color, skip=frozenset(skip))
        self.patches = Patches(self.folder, patch_size, stride)
        self._test_images = test_images
        self.sigma = sigma
        self.limit = limit

    @classmethod
    def inherit(cls, trained: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        kept = dict(trained)
        if "images" in given and Path(given["images"]).absolute() != Path(trained["images"]):
            kept.pop("skip", None)  # it names files in the folder used in training
        return {**kept, **given}

    @classmethod
    def settle(cls, options: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        if options.pop("skip_unreadable", False):
            if "images" not in options:
                raise SpecError("--skip-unreadable needs --images")
            unreadable = ImageFolder(options["images"]).check(skip_unreadable=True)
            options["skip"] = tuple(unreadable)
            for file in unreadable:
                say(f"left out: {file} cannot be decoded")
        return options

    @cached_property
    def test_folder(self) -> ImageFolder:
        """The test images. A missing folder raises only when they are used."""
        return ImageFolder(self._test_images, color=self.color)

    @classmethod
    def network(cls) -> FFDNet:
        """The untrained denoiser; this needs no data."""
        return FFDNet(color=cls.color)

    def model(self) -> nn.Module:
        return self.network()

    def train_data(self) -> range:
        return range(len(self.patches))[: self.limit]

    def test_data(self) -> tuple[str, ...]:
        return self.test_folder.names

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        sigma_B = torch.full((len(ids),), self.sigma / 255)
        return _noised(self.patches.get(ids), ids, sigma_B, draw)

    def train_batch(self, ids: Tensor, draw: Draw) -> Batch:
        # Other draws than in attribution, which must not use the noise that was trained on.
        draw = Draw(draw.seed, TRAINING_DRAWS + draw.index)
        sigma_B = uniform(ids, seed=draw.seed, draw=draw.index) * (MAX_TRAIN_SIGMA / 255)
        return _noised(self.patches.get(ids), ids, sigma_B, draw)

    def test_batch(self, ids: Tensor, draw: Draw) -> Batch:
        draw = Draw(draw.seed, TEST_DRAWS + draw.index)
        sigma_B = torch.full((len(ids),), self.sigma / 255)
        images = torch.stack([self.test_folder.load(i) for i in ids.tolist()])
        return _noised(images, ids, sigma_B, draw)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return _mean_square(self.outputs(model, batch) - self.targets(batch))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy, sigma_B, _ = batch
        denoised: Tensor = model(noisy, sigma_B)
        return denoised

    def targets(self, batch: Batch) -> Tensor:
        clean: Tensor = batch[2]
        return clean

    def test_size(self, test: int) -> tuple[int, int]:
        return self.test_folder.sizes[test]

    def measure(
        self, model: nn.Module, batch: Batch, quantity: str, region: Region | None
    ) -> Tensor:
        """A mean of squares over the region. Only pixels that it depends on enter the model."""
        noisy, sigma_B, clean = batch
        y, x, height, width = region or (0, 0, *noisy.shape[-2:])
        reach = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        rows = _seen(y, height, noisy.shape[-2], reach)
        columns = _seen(x, width, noisy.shape[-1], reach)
        top, left = y - rows.start, x - columns.start
        inner = (..., slice(top, top + height), slice(left, left + width))
        noisy, clean = noisy[..., rows, columns], clean[..., rows, columns]
        output = model(noisy, sigma_B)[inner]
        if quantity == "loss":
            return _mean_square(output - clean[inner])
        if quantity == "output":
            return _mean_square(output)
        if quantity == "change":
            return _mean_square(output - noisy[inner])
        raise SpecError(f"FFDNet measures {', '.join(self.quantities)}, not {quantity!r}")

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        results = list(denoise(model, self.test_folder, sigma=EVAL_SIGMA))
        return {"psnr": float(np.mean([result.psnr for result in results]))}

    def describe(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        image, row, column = self.patches.index.locate(ids)
        return {"file": np.array(self.folder.names)[image], "row": row, "column": column}

    def describe_test(self, ids: npt.NDArray[np.int64]) -> Mapping[str, npt.NDArray[Any]]:
        return {"file": np.array(self.test_folder.names)[ids]}

    def pictures(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return _picture(self.patches.get(torch.from_numpy(ids)))

    def test_picture(self, test: int) -> npt.NDArray[np.uint8]:
        return _picture(self.test_folder.load(test))

    def prepare(self, say: Callable[[str], None]) -> None:
        self.folder.check(skip_unreadable=False)

    def fingerprint(self) -> str:
        # The test images too: they decide the PSNR that a train run records.
        return f"images {self.folder.digest()} test {self.test_folder.digest()}"


def _noised(pixels: Tensor, ids: Tensor, sigma_B: Tensor, draw: Draw) -> Batch:
    """Pixels (B, C, H, W) in bytes as (noisy, sigma, clean), where white is 1."""
    clean = pixels.float().div_(255)
    noise = gaussian_noise(ids, clean.shape[1:], seed=draw.seed, draw=draw.index)
    noisy = noise.mul_(sigma_B[:, None, None, None]).add_(clean)
    return noisy, sigma_B, clean


def _mean_square(values_BCHW: Tensor) -> Tensor:
    means_B: Tensor = values_BCHW.square().mean(dim=(1, 2, 3))
    return means_B


def _seen(start: int, length: int, size: int, reach: int) -> slice:
    """The input pixels along one axis that outputs `start` to `start + length` depend on.

    The network works on cells of 2 x 2 pixels, and each 3x3 convolution reaches one cell further.
    The slice has whole cells and ends at the image's edge, so that only real edges are padded.
    """
    first = start // 2 - reach
    last = (start + length - 1) // 2 + reach
    return slice(max(0, 2 * first), min(size, 2 * (last + 1)))


def _picture(pixels: Tensor) -> npt.NDArray[np.uint8]:
    """From BGR or grey bytes (..., C, H, W) to RGB (..., H, W, 3) or grey (..., H, W)."""
    picture = pixels.flip(-3).movedim(-3, -1) if pixels.shape[-3] == 3 else pixels.squeeze(-3)
    array: npt.NDArray[np.uint8] = picture.contiguous().numpy()
    return array


class Denoised(NamedTuple):
    """One denoised image: its name, pixels (C, H, W) in [0, 1], and PSNR in dB before and after."""

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
    """The grey network of 15 layers."""

    color = False
    published = FFDNET_GREY


class FFDNetSmallTask(FFDNetTask):
    """A grey network of 6 layers with 32 channels, without batch normalisation.

    One core trains it on some hundred patches in seconds, so that hundreds of retrainings can test
    scores. Batch normalisation would add noise: with few small batches its running means differ
    from seed to seed, which moves the error of even areas by decibels.
    """

    color = False
    published = None

    @classmethod
    def network(cls) -> FFDNet:
        return FFDNet(color=False, layers=6, channels=32, batch_norm=False)
