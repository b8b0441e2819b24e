"""Each check meets a task that breaks what it looks for, and says so."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

import influence_jobs
from influence_jobs import Task
from influence_jobs.contract import findings, jobs, outputs, parameters, samples
from influence_jobs.contract.trial import Said, Trial
from influence_jobs.errors import InflError, SpecError
from influence_jobs.terms import OutputLoss

SAMPLES = 25


def rows(count: int, seed: int) -> TensorDataset:
    drawn = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 6, generator=drawn), torch.randint(3, (count,), generator=drawn)
    )


class Right(Task):
    """Keeps the contract; the others change one thing each."""

    output_loss: ClassVar[OutputLoss | None] = "cross-entropy"

    def __init__(self, *, width: int = 5):
        self.width = width

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, self.width), nn.Tanh(), nn.Linear(self.width, 3))

    def train_data(self) -> Any:
        return rows(SAMPLES, 0)

    def test_data(self) -> Any:
        return rows(5, 1)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def targets(self, batch: Any) -> Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


def looked(look: Callable[[Trial], Said], task: Task) -> list[str]:
    """What one check says, as lines `mark: text`."""
    try:
        return [f"{mark}: {said}" for mark, said in look(Trial(task, torch.device("cpu")))]
    except InflError as error:
        return [f"fail: {error}"]


@pytest.mark.parametrize(
    "look",
    [
        samples.data,
        samples.repeatable,
        samples.losses,
        samples.deterministic,
        samples.independent,
        parameters.parameters,
        parameters.reached,
        parameters.layers,
        outputs.gauss_newton,
        outputs.tests,
        outputs.people,
        jobs.batch_of_one,
    ],
)
def test_what_is_right_passes(look: Callable[[Trial], Said]) -> None:
    assert [line for line in looked(look, Right()) if not line.startswith("ok: ")] == []


class Streamed(Right):
    def train_data(self) -> Any:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                data = rows(SAMPLES, 0)
                yield from (data[i] for i in range(SAMPLES))

        return Stream()


class Empty(Right):
    def train_data(self) -> Any:
        return []


class Augmented(Right):
    def batch(self, ids: Tensor, draw: Any) -> Any:
        x, y = super().batch(ids, draw)
        return x + torch.randn_like(x), y


class AugmentedInTraining(Right):
    def train_batch(self, ids: Tensor, draw: Any) -> Any:
        x, y = self.batch(ids, draw)
        return x + torch.randn_like(x), y


def test_data_without_length_and_without_samples() -> None:
    (line,) = looked(samples.data, Streamed())
    assert line.startswith("fail: train_data() is a Stream without a length and rows by position: ")
    assert looked(samples.data, Empty()) == ["fail: train_data() is empty"]


class Lists(Right):
    def train_data(self) -> Any:
        return [{"ids": [i % 3, 1], "label": i % 2} for i in range(SAMPLES)]


def test_lists_of_numbers_in_rows() -> None:
    _, line = looked(samples.data, Lists())
    assert line.startswith(
        "warn: rows hold lists of numbers, and default_collate turns each position"
    )


def test_random_data() -> None:
    first, second = looked(samples.repeatable, Augmented())
    assert first.startswith("fail: batch() gives different numbers each time the same samples are ")
    assert first.endswith("(draw.seed, draw.index, sample id) only, and augment in train_batch()")
    assert second.startswith("fail: train_batch() gives different numbers")
    (line,) = looked(samples.repeatable, AugmentedInTraining())
    assert line.startswith("fail: train_batch() gives different numbers")


class Averaged(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Divided(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, batch) / len(batch[1])


class Unreduced(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square()


class NotANumber(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        bad = (batch[0] == self.train_data()[4][0]).all(1)
        return super().losses(model, batch).masked_fill(bad, float("nan"))


class Detached(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, batch).detach()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            Averaged(),
            "fail: losses() has shape (), and one number for each sample is needed, shape (13,): ",
        ),
        (
            Unreduced(),
            "fail: losses() has shape (13, 3), and one number for each sample is needed, ",
        ),
        (NotANumber(), "fail: the loss of sample 4 is nan: correct the sample or leave it out"),
        (Detached(), "fail: losses() has no gradient: the outputs are detached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Task) else "",
)
def test_losses_that_are_not_one_number_a_sample(task: Task, expected: str) -> None:
    (line,) = looked(samples.losses, task)
    assert line.startswith(expected)


class SoftmaxOverTheBatch(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.nll_loss(F.log_softmax(model(batch[0]), dim=0), batch[1], reduction="none")


class BatchStatistics(Right):
    def model(self) -> nn.Module:
        norm = nn.BatchNorm1d(5, track_running_stats=False)
        return nn.Sequential(nn.Linear(6, 5), norm, nn.Linear(5, 3))


class Dropped(Right):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(F.dropout(batch[0], 0.5))


def test_samples_that_mix() -> None:
    (line,) = looked(samples.independent, SoftmaxOverTheBatch())
    assert line.startswith("fail: a sample's loss is 0 alone and ")
    assert "a softmax or a broadcast over the batch (dim 0)" in line
    (line,) = looked(samples.independent, BatchStatistics())
    assert line.startswith("fail: module '1' (BatchNorm1d) has no running statistics")
    (line,) = looked(samples.independent, Divided())
    assert line.startswith("fail: losses() divides by the number of samples in the batch (13): ")


def test_dropout_in_eval_mode() -> None:
    (line,) = looked(samples.deterministic, Dropped())
    assert line.startswith(
        "fail: two passes over the same samples of Dropped give different losses"
    )


class FrozenTied(Right):
    def model(self) -> nn.Module:
        first, second, head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        second.weight = first.weight
        first.bias.requires_grad_(False)
        return nn.Sequential(first, second, head, nn.Identity(), nn.Flatten())


class Spare(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Unused(Right):
    def model(self) -> nn.Module:
        return nn.Sequential(Spare(), nn.Linear(6, 3))


class Saturated(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return super().losses(model, batch) * 0


class Held(nn.Module):
    """Uses a layer's parameters past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
        self.held = list(self.b.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x)), *self.held)


class HeldTask(Right):
    def model(self) -> nn.Module:
        return Held()


def test_parameters_that_count() -> None:
    trained, frozen, tied = looked(parameters.parameters, FrozenTied())
    assert trained == "ok: 63 numbers in 4 parameters are trained"
    assert frozen == "warn: 6 numbers are frozen and get no gradient: 0.bias"
    assert tied == "warn: one parameter has several names, as tied weights do: 0.weight = 1.weight"
    assert looked(parameters.parameters, Unused())[1] == (
        "warn: the losses of the samples that were tried do not depend on 0.spare.weight, "
        "0.spare.bias"
    )
    assert looked(parameters.parameters, Saturated())[1].startswith("fail: the gradient of the ")


def test_weights_past_their_modules() -> None:
    (line,) = looked(parameters.reached, HeldTask())
    assert line.startswith("warn: the model uses weights past its modules, from a plain list")
    task = HeldTask()
    trial = Trial(task, torch.device("cpu"))
    before = [p.clone() for p in trial.model.parameters()]
    list(parameters.reached(trial))
    for p, q in zip(trial.model.parameters(), before, strict=True):
        assert torch.equal(p, q)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.cell(x.reshape(len(x), 3, 2))[0][:, -1]))


class RecurrentTask(Right):
    def model(self) -> nn.Module:
        return Recurrent()


def test_layers_by_rule_on_the_slow_path_and_by_name() -> None:
    fast, slow, by_name = looked(parameters.layers, RecurrentTask())
    assert fast.startswith("ok: with a rule: norm (LayerNorm), head (Linear); norms of them take ")
    weights = "cell.weight_ih_l0 (GRU), cell.weight_hh_l0 (GRU)"
    assert slow.startswith(f"warn: without a rule: {weights}; norms of them take ")
    assert " x a forward and backward pass for one query" in slow
    assert (
        by_name
        == f"ok: --layer all leaves these layers out, so name them: {weights}, norm (LayerNorm)"
    )
    (shared,) = looked(parameters.layers, FrozenTied())
    assert shared.startswith("ok: with a rule: 0 (Linear), 2 (Linear); ")


class WideTargets(Right):
    def targets(self, batch: Any) -> Tensor:
        return batch[1].unsqueeze(1)


class FloatTargets(Right):
    def targets(self, batch: Any) -> Tensor:
        return batch[1].float()


class Broadcast(Right):
    """Outputs (B, 1) against targets (B,), in the loss too: a matrix of differences."""

    output_loss = "mse"

    def model(self) -> nn.Module:
        return nn.Linear(6, 1)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(1)


class OtherLoss(Right):
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return 2 * super().losses(model, batch)


class NoOutputs(Right):
    output_loss = None


def test_outputs_targets_and_loss() -> None:
    (line,) = looked(outputs.gauss_newton, WideTargets())
    assert line == "fail: targets() has shape (13, 1), not (13,): give each sample its class"
    (line,) = looked(outputs.gauss_newton, FloatTargets())
    assert line.startswith("fail: targets() is torch.float32: classes are whole numbers")
    (line,) = looked(outputs.gauss_newton, Broadcast())
    assert line.startswith("fail: targets() has shape (13,), outputs() (13, 1): give both the same")
    (line,) = looked(outputs.gauss_newton, OtherLoss())
    assert line.startswith("fail: losses() of OtherLoss does not give the cross-entropy of outputs")
    (line,) = looked(outputs.gauss_newton, NoOutputs())
    assert line.startswith("warn: the task has no output_loss, so there is no Gauss-Newton matrix")


class Untested(Right):
    def test_data(self) -> Any:
        return ()


class Flat(Right):
    def measure(self, model: nn.Module, batch: Any, quantity: str, region: Any) -> Tensor:
        return super().measure(model, batch, quantity, region) * 0


class OneMeasure(Right):
    def measure(self, model: nn.Module, batch: Any, quantity: str, region: Any) -> Tensor:
        return super().measure(model, batch, quantity, region).mean()


class OutOfRegion(Right):
    def test_size(self, test: int) -> tuple[int, int]:
        return 4, 5

    def measure(self, model: nn.Module, batch: Any, quantity: str, region: Any) -> Tensor:
        values = super().measure(model, batch, quantity, None)
        return values if region is None else values / 0


class Regions(OutOfRegion):
    def measure(self, model: nn.Module, batch: Any, quantity: str, region: Any) -> Tensor:
        return super().measure(model, batch, quantity, None)


class WholeImages(Right):
    """Images, and a loss that is of no single pixel."""

    output_loss = staticmethod(  # type: ignore[assignment]
        lambda o, t: F.avg_pool2d((o - t) ** 2, 3).flatten(1).sum(1)
    )

    def train_data(self) -> Any:
        return [(torch.rand(1, 4, 4), torch.rand(1, 4, 4)) for _ in range(6)]

    def test_data(self) -> Any:
        return self.train_data()

    def model(self) -> nn.Module:
        return nn.Conv2d(1, 1, 1)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return type(self).output_loss(self.outputs(model, batch), batch[1])


def test_a_loss_that_is_of_no_pixel_is_a_warning() -> None:
    found = looked(outputs.tests, WholeImages())
    assert found[0].startswith("warn: output_loss of WholeImages cannot be taken of 1 x 1 pixels")
    assert found[1].endswith("regions of 4 x 4 pixels")


def test_test_samples_and_regions() -> None:
    assert looked(outputs.tests, Untested())[0].startswith("warn: the task has no test_data()")
    assert looked(outputs.tests, Flat())[0].startswith("fail: the gradient of the loss of test ")
    assert "one finite number each is needed" in looked(outputs.tests, OneMeasure())[0]
    assert looked(outputs.tests, OutOfRegion())[0].startswith("fail: measure() of loss at one ")
    assert looked(outputs.tests, Regions())[0].endswith("regions of 4 x 5 pixels")


class Pictured(Right):
    def describe(self, ids: Any) -> Any:
        return {"label": np.zeros(3)}

    def pictures(self, ids: Any) -> Any:
        return np.zeros((len(ids), 3, 8, 8), dtype=np.float32)

    def test_picture(self, test: int) -> Any:
        return np.zeros((8, 8), dtype=np.uint8)


def test_what_people_see() -> None:
    columns, _, pictures, picture = looked(outputs.people, Pictured())
    assert columns == "fail: describe() has 3 values of label for 13 samples"
    assert pictures.startswith("fail: pictures() gives (13, 3, 8, 8) float32 for 13 samples")
    assert picture == "ok: test_picture() gives 8 x 8 pixels"


class Seen(Right):
    def show(self, sample: int) -> Any:
        return 3

    def show_test(self, test: int) -> Any:
        return np.zeros(8), 4


def test_what_a_task_shows() -> None:
    lines = looked(outputs.people, Seen())
    assert lines[2].startswith("fail: show() gives a int, which cannot be shown: give an image")
    assert lines[3] == "ok: show_test() gives a sound of 2 s"
    assert lines[4].endswith("defines no pictures(): show() says what pages show")


class Normed(Right):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_an_epoch_that_ends_in_a_batch_of_one() -> None:
    (line,) = looked(jobs.batch_of_one, Normed())
    assert line.startswith("fail: an epoch of 25 samples in batches of 8 ends in a batch of one")
    assert line.endswith("train with --batch-size 9")


class Raising(Right):
    def targets(self, batch: Any) -> Tensor:
        return batch[7]

    def __init__(self, *, file: str = ""):
        super().__init__()
        if file:
            raise ValueError(f"no {file}")


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.0)


@pytest.mark.usefixtures("_short")
def test_all_of_it_from_python() -> None:
    found = influence_jobs.check(Right, width=3)
    assert {finding.mark for finding in found} == {"ok"}
    assert next(f for f in found if f.check == "parameters").said.startswith("33 numbers in 4 ")
    times = [f.said.partition(":")[0] for f in found if f.check == "time"]
    assert [said.partition(" ")[0] for said in times] == [*jobs.ASKED]
    assert str(found[0]).startswith("ok    data: 25 training samples; a batch of 13 is (13, 6) ")
    with pytest.raises(SpecError, match=r"there is no option depth= here, and task .* has width="):
        influence_jobs.check(Right, depth=3)


@pytest.mark.usefixtures("_short")
def test_errors_of_the_users_own_are_lines_with_a_place() -> None:
    found = {finding.check: finding for finding in influence_jobs.check(Raising)}
    line = found["gauss-newton"].said
    assert line.startswith("IndexError: list index out of range (")
    assert "test_checks.py, line " in line
    (only,) = findings(Raising, {"file": "x"})
    assert str(only).startswith("fail  task: ValueError: no x (")


@pytest.mark.usefixtures("_short")
def test_nothing_is_built_on_what_failed() -> None:
    assert [f.check for f in influence_jobs.check(Streamed)] == ["data"]
    assert [f.check for f in influence_jobs.check(Averaged)] == ["data", "repeatable", "losses"]


@pytest.mark.usefixtures("_short")
def test_kinds_that_cannot_be_are_named() -> None:
    found = [f for f in influence_jobs.check(Untested) if f.check == "time"]
    assert [f.said.split(" ")[0].rstrip(":") for f in found] == ["train", "grad-norms", "gradients"]
    found = [f for f in influence_jobs.check(NoOutputs) if f.check == "time"]
    assert {f.mark for f in found} == {"ok"}
    assert "s-test --test 0 --operator hessian" in str(found)


class HasHook(Right):
    def model(self) -> nn.Module:
        model = super().model()
        model.get_parameter("0.weight").register_hook(lambda gradient: gradient / 2)
        return model


@pytest.mark.usefixtures("_short")
def test_what_needs_a_refused_run_is_refused_for_the_same_reason() -> None:
    (refused,) = (
        f.said for f in influence_jobs.check(HasHook) if f.check == "time" and f.mark == "warn"
    )
    assert refused.startswith(
        "refused: grad-norms --layer all, s-test --test 0, influence --test 0, unrolled --test 0, "
        "attribution --layer all --test 0, gradients: parameter '0.weight' has a gradient hook"
    )
