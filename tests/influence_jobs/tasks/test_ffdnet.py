import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from influence_jobs.datasets.noise import gaussian_noise
from influence_jobs.errors import DataError, SpecError
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.ffdnet import FFDNetGreyTask, FFDNetTask
from influence_jobs.terms import Region

HEIGHT, WIDTH = 87, 90  # larger than any receptive field, one side odd


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    sizes = [(HEIGHT, WIDTH), (HEIGHT, WIDTH), (64, 70)]
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: list[npt.NDArray[np.uint8]]) -> str:
    path = tmp_path_factory.mktemp("images")
    for name, image in zip("abc", images, strict=True):
        Image.fromarray(image).save(path / f"{name}.png")
    return str(path)


@pytest.fixture(scope="module", params=[FFDNetTask, FFDNetGreyTask], ids=["colour", "grey"])
def task(request: pytest.FixtureRequest, folder: str) -> FFDNetTask:
    made: FFDNetTask = request.param(images=folder, test_images=folder, patch_size=20, stride=20)
    return made


@pytest.fixture(scope="module")
def model(task: FFDNetTask) -> nn.Module:
    """In float64: a pixel that is missing from the crop must exceed the rounding error."""
    torch.manual_seed(0)
    network = task.model()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.2, 0.4)
            nn.init.uniform_(module.bias, 0.1, 0.2)
    return network.double().eval()


def double(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    noisy, sigma, clean = batch
    return noisy.double(), sigma.double(), clean.double()


def by_hand(model: nn.Module, batch: Batch, quantity: str, region: Region) -> Tensor:
    """The measure computed from the whole image, pixel by pixel."""
    noisy, sigma, clean = batch
    output = model(noisy, sigma)
    base = {"loss": clean, "output": torch.zeros_like(clean), "change": noisy}[quantity]
    y, x, height, width = region
    squares = [
        (output[:, :, row, column] - base[:, :, row, column]) ** 2
        for row in range(y, y + height)
        for column in range(x, x + width)
    ]
    return torch.stack(squares).mean(dim=(0, 2))


REGIONS: list[Region] = [
    (0, 0, 1, 1),
    (HEIGHT - 1, WIDTH - 1, 1, 1),  # the odd row is padded by repeating the edge
    (41, 44, 1, 1),
    (42, 43, 3, 2),
    (0, 51, 4, 9),
    (60, 2, 27, 5),
]


@pytest.mark.parametrize("quantity", ["loss", "output", "change"])
def test_a_region_is_measured_as_in_the_whole_image(
    task: FFDNetTask, model: nn.Module, quantity: str
) -> None:
    batch = double(task.test_batch(torch.tensor([1]), Draw(3)))
    assert quantity in task.quantities
    with torch.no_grad():
        for region in REGIONS:
            found = task.measure(model, batch, quantity, region)
            expected = by_hand(model, batch, quantity, region)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        whole = task.measure(model, batch, quantity, None)
        output, base = model(*batch[:2]), {"loss": batch[2], "change": batch[0]}.get(quantity, 0)
        torch.testing.assert_close(whole, (output - base).square().flatten(1).mean(1))


def test_the_gradient_at_a_point_is_that_of_the_whole_image(
    task: FFDNetTask, model: nn.Module
) -> None:
    batch = double(task.test_batch(torch.tensor([0]), Draw(0)))
    parameters = list(model.parameters())
    region = (43, 40, 1, 1)
    found = torch.autograd.grad(task.measure(model, batch, "output", region).sum(), parameters)
    expected = torch.autograd.grad(by_hand(model, batch, "output", region).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
        assert ours.abs().max() > 0


def test_a_point_shows_the_model_no_more_than_its_receptive_field(task: FFDNetTask) -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(1, 1, 3) for _ in range(12))

        def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
            seen.append(noisy)
            return noisy

    batch = task.test_batch(torch.tensor([0]), Draw(0))
    task.measure(Spy(), batch, "output", (43, 44, 1, 1))
    assert torch.equal(seen[0], batch[0][..., 18:68, 20:70])


def test_two_images_of_one_size_are_measured_as_each_alone(
    task: FFDNetTask, model: nn.Module
) -> None:
    with torch.no_grad():
        both = task.measure(
            model, double(task.test_batch(torch.tensor([1, 0]), Draw(0))), "loss", (9, 9, 5, 5)
        )
        for row, test in enumerate((1, 0)):
            alone = double(task.test_batch(torch.tensor([test]), Draw(0)))
            torch.testing.assert_close(
                task.measure(model, alone, "loss", (9, 9, 5, 5))[0], both[row]
            )
    assert both[0] != both[1]


def test_training_loss_is_the_mean_square_of_a_patch(task: FFDNetTask, model: nn.Module) -> None:
    batch = double(task.batch(torch.tensor([4, 1]), Draw(0)))
    assert task.output_loss == "mse"
    with torch.no_grad():
        outputs = model(*batch[:2])
        assert torch.equal(task.outputs(model, batch), outputs)
        losses = task.losses(model, batch)
    assert torch.equal(task.targets(batch), batch[2])
    for row in range(2):
        expected = np.mean((outputs[row].numpy() - batch[2][row].numpy()) ** 2)
        assert float(losses[row]) == pytest.approx(expected, rel=1e-12)


def test_test_noise_belongs_to_the_image_and_is_no_training_noise(task: FFDNetTask) -> None:
    ids = torch.tensor([1])
    noisy, sigma, clean = task.test_batch(ids, Draw(7, 2))
    assert float(sigma) == pytest.approx(25 / 255)
    expected = gaussian_noise(ids, clean.shape[1:], seed=7, draw=2**33 + 2)
    torch.testing.assert_close((noisy - clean) / sigma, expected, rtol=0, atol=1e-5)
    both = task.test_batch(torch.tensor([0, 1]), Draw(7, 2))
    assert torch.equal(both[0][1], noisy[0])
    # A patch of the same id: the first pixels of each stream tell them apart.
    first = ((noisy - clean) / sigma).flatten()[:100]
    for patches in (task.batch(ids, Draw(7, 2)), task.train_batch(ids, Draw(7, 2))):
        other = ((patches[0] - patches[2]) / patches[1]).flatten()[:100]
        assert (first - other).abs().mean() > 0.5


def test_pictures_are_what_the_files_hold(
    task: FFDNetTask, images: list[npt.NDArray[np.uint8]]
) -> None:
    def seen(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(Image.fromarray(image).convert("RGB" if task.color else "L"))

    assert task.test_data() == ("a.png", "b.png", "c.png")
    assert task.describe_test(np.array([2, 0]))["file"].tolist() == ["c.png", "a.png"]
    assert task.test_size(2) == (64, 70)
    for test, image in enumerate(images):
        assert np.array_equal(task.test_picture(test), seen(image))
    ids = np.array([30, 0, 17])
    where = task.describe(ids)
    pictures = task.pictures(ids)
    assert pictures.dtype == np.uint8
    for k in range(3):
        image = seen(images["abc".index(where["file"][k][0])])
        row, column = where["row"][k], where["column"][k]
        assert np.array_equal(pictures[k], image[row : row + 20, column : column + 20])


def test_bad_requests(folder: str, task: FFDNetTask, model: nn.Module) -> None:
    batch = double(task.test_batch(torch.tensor([2]), Draw(0)))
    with pytest.raises(SpecError, match="measures loss, output, change, not 'psnr'"):
        task.measure(model, batch, "psnr", (0, 0, 1, 1))
    missing = FFDNetTask(images=folder, test_images=f"{folder}/none", patch_size=20)
    with pytest.raises(DataError, match="is not a folder"):
        missing.test_data()
