"""Norms of the research report's networks, compared with the float64 vmap reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence_jobs.gradients import GradNorms, reduce_gradient
from influence_jobs.gradients.reference import per_sample_gradients
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.tasks.base import Batch, Draw
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask
from influence_jobs.terms import Precision, Reduction

AUTHORS = Path(__file__).parents[4] / "shared/data/checkpoints/FFDNet_rgb_e20b8_1000.pth"
FFDNET_LAYERS = ["main.0", "main.11", "main.29", "main.32"]  # layers 1, 5, 11 and 12
Losses = Callable[[nn.Module, Any], Tensor]
REDUCTIONS: tuple[Reduction, ...] = ("kernel", "channel", "layer")


def assert_norms_agree(
    model: nn.Module, layers: list[str], losses: Losses, batch: Batch, precision: Precision
) -> None:
    """Errors are relative to each sample's largest norm, as rounding in its forward pass is."""
    tolerance = 1e-10 if precision == "float64" else 1e-5
    gradients = per_sample_gradients(model, layers, losses, batch)
    for reduction in REDUCTIONS:
        with GradNorms(model, layers, losses, reduction=reduction, precision=precision) as engine:
            found = engine(batch)
        for layer in layers:
            expected = reduce_gradient(model.get_submodule(layer), gradients[layer], reduction)
            assert found[layer].shape == expected.shape
            error: Tensor = (found[layer] - expected).abs().reshape(len(expected), -1).amax(1)
            largest = expected.reshape(len(expected), -1).amax(1)
            worst = float((error / largest).max())
            assert worst < tolerance, (layer, reduction, worst)


def test_mnist_classifier_all_layers(mnist_dir: Path) -> None:
    task = MnistTask(data_dir=str(mnist_dir), limit=64)
    torch.manual_seed(0)
    batch = task.batch(torch.arange(64), Draw(0))
    layers = ["fc1", "fc2", "fc3"]
    assert_norms_agree(MnistMLP().eval(), layers, task.losses, batch, "float32")


@pytest.mark.skipif(not AUTHORS.exists(), reason="the authors' weights are not at hand")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ffdnet_with_the_published_weights(memory_format: torch.memory_format) -> None:
    task = FFDNetTask(patch_size=26, stride=26)
    model = FFDNet(color=True).to(memory_format=memory_format).eval()
    load_weights(model, AUTHORS)
    batch = task.batch(torch.arange(3), Draw(0))
    assert_norms_agree(model, FFDNET_LAYERS, task.losses, batch, "float32")


def test_ffdnet_untrained() -> None:
    """In float64: float32 may put an untrained activation on the other side of a ReLU."""
    task = FFDNetTask(patch_size=26, stride=26)
    torch.manual_seed(0)
    model = FFDNet(color=True).double().eval()
    noisy, sigma, clean = (t.double() for t in task.batch(torch.arange(3), Draw(0)))
    assert_norms_agree(model, FFDNET_LAYERS, task.losses, (noisy, sigma, clean), "float64")
