"""Scores of the research report's and the example's networks, within 1e-5 of float64 products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence_jobs.gradients import GradDots, ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.models.checkpoints import load_weights
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.ffdnet import FFDNetTask
from influence_jobs.tasks.mnist import MnistTask

AUTHORS = Path(__file__).parents[4] / "shared/data/checkpoints/FFDNet_rgb_e20b8_1000.pth"


def assert_scores_agree(
    model: nn.Module, task: Task, samples: int, vectors: int, modules: list[str] | None = None
) -> None:
    """Relative to each vector's largest score."""
    batch: Any = task.batch(torch.arange(samples), Draw(0))
    space = ParameterSpace(model, modules)
    v_QP = torch.randn(vectors, space.size)
    gradients = gradients_one_by_one(model, list(space.shapes), task.losses, batch)
    expected: Tensor = space.join(gradients) @ v_QP.double().t()
    with GradDots(model, space, task.losses, v_QP) as engine:
        found = engine.total(batch)
        engine.check(batch)
    assert found.shape == (samples, vectors)
    error = (found - expected).abs().amax(0) / expected.abs().amax(0)
    assert error.max() < 1e-5, error


@pytest.mark.parametrize("vectors", [1, 10])
def test_mnist_classifier(mnist_dir: Path, vectors: int) -> None:
    torch.manual_seed(0)
    task = MnistTask(data_dir=str(mnist_dir), limit=256)
    assert_scores_agree(MnistMLP().eval(), task, 256, vectors)


@pytest.mark.parametrize("modules", [None, ["main.29"]])
@pytest.mark.parametrize("weights", ["untrained", "published"])
def test_ffdnet(weights: str, modules: list[str] | None) -> None:
    task = FFDNetTask(patch_size=26, stride=26)
    torch.manual_seed(0)
    model = FFDNet(color=True).eval()
    if weights == "published":
        if not AUTHORS.exists():
            pytest.skip("the authors' weights are not at hand")
        load_weights(model, AUTHORS)
    assert_scores_agree(model, task, 3, 10, modules)


@pytest.mark.parametrize("vectors", [1, 10])
def test_digits_example(vectors: int) -> None:
    from digits import DigitsTask

    torch.manual_seed(0)
    task = DigitsTask()
    assert_scores_agree(task.model().eval(), task, 64, vectors)
