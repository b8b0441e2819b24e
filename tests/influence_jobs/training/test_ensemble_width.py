import time

import pytest
import torch
from torch import nn

from influence_jobs.tasks.base import Draw, Task
from influence_jobs.training import ensemble_width
from influence_jobs.training.ensemble_norms import NormsWanted
from influence_jobs.training.ensemble_width import bytes_per_variant, faster_alone, measure_widths
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer

CPU = torch.device("cpu")
ADAM = Recipe(epochs=1, batch_size=16, optimizer="adam", lr=1e-3)
SGD = Recipe(epochs=1, batch_size=16, optimizer="sgd", lr=1e-3)


def test_a_variant_takes_weights_optimizer_activations_and_norms(digits_task: Task) -> None:
    weights = 4 * sum(p.numel() for p in digits_task.model().parameters())
    adam = bytes_per_variant(digits_task, ADAM, device=CPU)
    sgd = bytes_per_variant(digits_task, SGD, device=CPU)
    assert adam - sgd == weights
    wide = Recipe(epochs=1, batch_size=32, optimizer="sgd", lr=1e-3)
    # Activations of 8 x 8 pixels, 8 channels: outputs of convolution, BatchNorm and ReLU; then
    # the smaller ones.
    assert bytes_per_variant(digits_task, wide, device=CPU) - sgd > 16 * 3 * 4 * 8 * 64
    norms = NormsWanted(("conv2",), "channel", 0)
    assert bytes_per_variant(digits_task, SGD, device=CPU, norms=norms) - sgd == 1500 * 16 * 4


def test_widths_are_tried_as_memory_allows(digits_task: Task) -> None:
    each = bytes_per_variant(digits_task, SGD, device=CPU)
    rates = measure_widths(
        digits_task, SGD, device=CPU, widths=(1, 2, 4), seconds=0.05, memory=3 * each
    )
    assert list(rates) == [1, 2]
    assert all(rate > 0 for rate in rates.values())
    assert list(
        measure_widths(digits_task, SGD, device=CPU, widths=(2, 4), seconds=0.01, memory=1)
    ) == [2]


@pytest.mark.gpu
def test_it_counts_what_a_gpu_takes(digits_task: Task) -> None:
    rates = measure_widths(digits_task, SGD, device=torch.device("cuda"), widths=(2,), seconds=0.1)
    assert rates[2] > 0


class Convolved(Task):
    """Samples of 3 channels, and a network that may have a convolution."""

    output_loss = "mse"

    def __init__(self, convolution: bool):
        self._convolution = convolution

    def model(self) -> nn.Module:
        if self._convolution:
            return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Flatten())
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 48))

    def train_data(self) -> range:
        return range(64)

    def batch(self, ids: torch.Tensor, draw: Draw) -> torch.Tensor:
        return ids.view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 64

    def losses(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch.flatten(1)).square().mean(1)


@pytest.mark.parametrize(("alone", "faster"), [(300, True), (210, False), (100, False)])
def test_only_a_convolution_that_is_clearly_slower_in_company_is_trained_alone(
    alone: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = []

    def rate(trainer: object, seconds: float, batch_size: int, clock: object) -> float:
        clocks.append(clock)
        return alone if isinstance(trainer, Trainer) else 200

    monkeypatch.setattr(ensemble_width, "_rate", rate)
    assert faster_alone(Convolved(True), ADAM, device=CPU) == faster
    assert not faster_alone(Convolved(False), ADAM, device=CPU)
    assert clocks == [time.process_time] * 2


def test_a_gpu_is_measured_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = []

    def rate(trainer: object, seconds: float, batch_size: int, clock: object) -> float:
        clocks.append(clock)
        return 1.0

    monkeypatch.setattr(ensemble_width, "_rate", rate)
    monkeypatch.setattr(ensemble_width, "initial_model", lambda task, *_: task.model())
    for kind in ("EnsembleTrainer", "Trainer"):
        monkeypatch.setattr(ensemble_width, kind, lambda *_, **__: None)
    faster_alone(Convolved(True), ADAM, device=torch.device("cuda"))
    assert clocks == [time.perf_counter] * 2
