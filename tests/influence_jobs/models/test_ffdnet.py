from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from influence_jobs.datasets.images import ImageFolder
from influence_jobs.datasets.noise import gaussian_noise
from influence_jobs.datasets.quality import psnr
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.models.ffdnet import FFDNet

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
PUBLISHED = SHARED / "checkpoints" / "FFDNet_rgb_e20b8_1000.pth"


def conv(index: int, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"main.{index}.weight": (outputs, inputs, 3, 3),
        f"main.{index}.bias": (outputs,),
    }


def batch_norm(index: int, channels: int) -> dict[str, tuple[int, ...]]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"main.{index}.{v}": (channels,) for v in vectors} | {
        f"main.{index}.num_batches_tracked": ()
    }


@pytest.mark.parametrize(
    ("color", "width", "folded", "last"), [(True, 96, 12, 32), (False, 64, 4, 41)]
)
def test_state_dict_has_the_published_names_and_shapes(
    color: bool, width: int, folded: int, last: int
) -> None:
    expected = conv(0, width, folded + 1)
    for index in range(2, last, 3):
        expected |= conv(index, width, width) | batch_norm(index + 1, width)
    expected |= conv(last, folded, width)
    state = FFDNet(color=color).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)


class Spy(nn.Module):
    """Replaces the convolutions: keeps its input and returns the image channels of it."""

    def forward(self, folded: torch.Tensor) -> torch.Tensor:
        self.seen = folded
        return folded[:, :-1]


@pytest.mark.parametrize("color", [True, False])
def test_folding_puts_subpixels_side_by_side_and_the_noise_map_last(color: bool) -> None:
    model = FFDNet(color=color)
    spy = Spy()
    model.main = spy  # type: ignore[assignment]
    channels = 3 if color else 1
    noisy = torch.rand(2, channels, 6, 8)
    sigma = torch.tensor([0.1, 0.2])
    assert torch.equal(model(noisy, sigma), noisy)
    for c in range(channels):
        for row in range(2):
            for column in range(2):
                folded = spy.seen[:, 4 * c + 2 * row + column]
                assert torch.equal(folded, noisy[:, c, row::2, column::2])
    assert spy.seen.shape[1] == 4 * channels + 1
    assert torch.equal(spy.seen[:, -1], sigma.view(2, 1, 1).expand(2, 3, 4))


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("size", [(7, 8), (8, 7), (7, 7), (1, 1)])
def test_odd_sizes_repeat_the_edge_and_are_cropped(color: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = FFDNet(color=color).eval()
    height, width = size
    noisy = torch.rand(1, 3 if color else 1, height, width)
    rows = torch.arange(height + height % 2).clamp(max=height - 1)
    columns = torch.arange(width + width % 2).clamp(max=width - 1)
    padded = noisy[:, :, rows][..., columns]
    sigma = torch.tensor([0.1])
    with torch.no_grad():
        denoised = model(noisy, sigma)
        expected = model(padded, sigma)[..., :height, :width]
    assert denoised.shape == noisy.shape
    assert torch.equal(denoised, expected)


def test_float64_and_gradients_pass_through() -> None:
    model = FFDNet().double().eval()
    noisy = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    F.mse_loss(model(noisy, torch.full((2,), 0.1, dtype=torch.float64)), noisy).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the authors' published weights are not here")
def test_published_weights_denoise_and_want_bgr() -> None:
    model = FFDNet().eval()
    load_weights(model, PUBLISHED)
    folder = ImageFolder(SHARED / "bsds500")
    numbers = range(0, len(folder.names), 50)
    clean = torch.stack([folder.load(i)[:, :200, :200] for i in numbers]).float() / 255
    sigma = 25 / 255
    ids = torch.tensor(list(numbers))
    noisy = clean + sigma * gaussian_noise(ids, clean.shape[1:], seed=0, draw=0)
    sigma_B = torch.full((len(clean),), sigma)
    with torch.no_grad():
        as_bgr = model(noisy, sigma_B).clamp(0, 1)
        as_rgb = model(noisy.flip(1), sigma_B).flip(1).clamp(0, 1)
    before = psnr(clean, noisy).mean()
    assert before == pytest.approx(20.17, abs=0.05)  # 20 log10(255 / 25)
    assert psnr(clean, as_bgr).mean() > before + 8
    assert psnr(clean, as_bgr).mean() > psnr(clean, as_rgb).mean() + 0.1


def test_a_small_network_without_batch_normalisation_begins_by_the_rule_of_he() -> None:
    torch.manual_seed(0)
    model = FFDNet(color=False, layers=6, channels=32, batch_norm=False)
    expected = conv(0, 32, 5) | conv(10, 4, 32)
    for index in (2, 4, 6, 8):
        expected |= conv(index, 32, 32)
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert float(state["main.4.weight"].std()) == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    assert float(state["main.10.weight"].std()) == pytest.approx((1 / (32 * 9)) ** 0.5, rel=0.1)
    assert not any(state[name].any() for name in state if name.endswith("bias"))
    noisy = torch.rand(1, 1, 9, 12)
    assert model(noisy, torch.tensor([0.1])).shape == noisy.shape
