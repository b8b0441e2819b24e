"""Influence by SOURCE, compared with a training of linear regression that is unrolled by hand."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_jobs.errors import SpecError
from influence_jobs.kinds import view_of
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.s_test.terms import stretches_of, terms_of
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import SourceSettings
from influence_jobs.tasks.fingerprints import fingerprinted
from influence_jobs.tasks.registry import make_task
from influence_jobs.training.train import initial_model

N, EPOCHS, LR, MOMENTUM, DECAY = 12, 48, 0.02, 0.5, 0.4

LINES = """
import torch
from torch import nn
from influence_jobs import Task

class Lines(Task):
    output_loss = "mse"
    batch_size = 12

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, generator=generator).double()
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]).double()
        self.y += torch.randn(16, 1, generator=generator).double()

    def model(self):
        return nn.Linear(3, 1).double()

    def train_data(self):
        return torch.utils.data.TensorDataset(self.x[:12], self.y[:12])

    def test_data(self):
        return torch.utils.data.TensorDataset(self.x[12:], self.y[12:])

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().mean(1)
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The task of linear regression."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "lines_task.py").write_text(LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        spec = TaskSpec(name="lines_task:Lines", data="", folder=str(folder))
        data, code = fingerprinted(spec.name, make_task(spec))
        yield spec.model_copy(update={"data": data, "code": code})


def s_test_of(
    task: Any, *, every: int, segments: int, exponential: str, seed: int = 0
) -> STestSpec:
    train = make_spec(
        TrainSpec,
        task=task,
        seed=seed,
        epochs=EPOCHS,
        batch_size=N,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        save_epochs=range(every, EPOCHS, every),
    )
    return make_spec(
        STestSpec,
        task=task,
        checkpoint=TrainedCheckpoint(train=train, epoch=EPOCHS),
        modules=("",),
        queries=Queries(items=(Query(test=0), Query(test=3))),
        solver=SourceSettings(segments=segments, exponential=exponential),
        precision="float64",
    )


def rise_without(task: Any, sample: int, test: int, amount: float) -> float:
    """N x the rise of a test loss by SGD with a sample of less weight, per weight."""
    made: Any = make_task(task)
    losses = []
    for weight in (1 - amount, 1 + amount):
        model = initial_model(made, 0, torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
        weights_N = torch.ones(N).double()
        weights_N[sample] = weight
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            batch = made.train_data().tensors
            ((made.losses(model, batch) * weights_N).sum() / N).backward()
            optimizer.step()
        x, y = (tensor[test : test + 1] for tensor in made.test_data().tensors)
        losses.append(float(made.losses(model, (x, y)).detach()))
    return N * (losses[0] - losses[1]) / (2 * amount)


@pytest.mark.parametrize(
    "exponential", ["chebyshev", pytest.param("ek-fac", marks=pytest.mark.slow)]
)
def test_with_fine_segments_it_is_the_unrolled_training(
    carry_out: Any, lines: Any, exponential: str, tmp_path: Path
) -> None:
    exact = np.array(
        [[rise_without(lines, sample, test, 1e-4) for sample in range(N)] for test in (0, 3)]
    )
    errors = []
    for every, segments in ((12, 2), (2, 8), (1, EPOCHS)):
        s_test = s_test_of(lines, every=every, segments=segments, exponential=exponential)
        run = carry_out(make_spec(InfluenceSpec, task=lines, s_tests=(s_test,)), root=tmp_path)
        found = run.read_rows("scores", 0, N)
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    # Gradient flow is not quite SGD with momentum: an error of the order of the learning rate.
    assert errors[2] < 0.05, errors
    assert errors[0] < 0.2, errors
    assert errors[2] < errors[1] < errors[0]
    assert np.abs(np.corrcoef(found.ravel(), exact.ravel())[0, 1]) > 0.998


def test_segments_share_the_checkpoints_and_say_so(
    carry_out: Any, lines: Any, tmp_path: Path
) -> None:
    spec = s_test_of(lines, every=9, segments=3, exponential="ek-fac")
    stretches = stretches_of(spec)
    assert [(s.begin, s.end) for s in stretches] == [(0, 18), (18, 36), (36, 48)]
    assert [[c.epoch for c in s.checkpoints] for s in stretches] == [[9, 18], [27, 36], [45, 48]]
    assert stretches[0].time(N) == pytest.approx(18 * LR / (1 - MOMENTUM))
    assert [(t.checkpoint.epoch, t.array, t.weight) for t in terms_of(spec)][1:3] == [
        (18, "segments/1", 0.5),
        (27, "segments/2", 0.5),
    ]
    run = carry_out(spec, root=tmp_path)
    (said,) = view_of(run).certainty()
    assert said.startswith("segments: epochs 0 to 18: 2 checkpoints, time 0.72; epochs 18 to 36")
    (table,) = view_of(run).tables()
    assert [row[:3] for row in table.rows[:4]] == [
        (0, 1, "0 to 18"),
        (0, 2, "18 to 36"),
        (0, 3, "36 to 48"),
        (1, 1, "0 to 18"),
    ]
    assert run.array("segments/3").shape == (2, 4)


def test_of_several_trainings_it_is_the_mean_of_each(
    carry_out: Any, lines: Any, tmp_path: Path
) -> None:
    s_tests = tuple(
        s_test_of(lines, every=12, segments=2, exponential="ek-fac", seed=seed) for seed in (0, 1)
    )

    def scores(*some: STestSpec) -> np.ndarray:
        spec = make_spec(InfluenceSpec, task=lines, s_tests=some, combine="mean")
        found: np.ndarray = carry_out(spec, root=tmp_path).read_rows("scores", 0, N)
        return found

    one, other = (scores(s_test) for s_test in s_tests)
    assert np.linalg.norm(one - other) > 0.01 * np.linalg.norm(one)  # two trainings
    np.testing.assert_allclose(scores(*s_tests), (one + other) / 2, rtol=1e-9)


def test_what_has_no_segments_is_refused(lines: Any) -> None:
    spec = s_test_of(lines, every=24, segments=2, exponential="ek-fac")

    def refused(**fields: Any) -> str:
        given = {name: getattr(spec, name) for name in STestSpec.model_fields if name != "kind"}
        with pytest.raises(SpecError) as error:
            make_spec(STestSpec, **(given | fields))
        return str(error.value)

    few = refused(solver=SourceSettings(segments=4))
    assert "keeps 24, 48: train with --save-epoch 6 --save-epoch 12 --save-epoch 18" in few
    assert "--save-epoch 48" not in few
    early = make_spec(TrainSpec, task=lines, epochs=2, batch_size=N)
    checkpoint = TrainedCheckpoint(train=early, epoch=2)
    assert "use --segments 2, or train longer" in refused(
        checkpoint=checkpoint, solver=SourceSettings()
    )
    for values, said in (
        ({"optimizer": "adam"}, "48 epochs of adam"),
        ({"clip_norm": 1.0}, "with a clipped norm: use another --solver"),
    ):
        train = make_spec(TrainSpec, task=lines, epochs=48, batch_size=N, **values)
        assert said in refused(checkpoint=TrainedCheckpoint(train=train, epoch=48))
    assert "name a train run" in refused(checkpoint=FileCheckpoint(path="/w.pt", sha256="ab"))
    with pytest.raises(SpecError, match="leave --relative out"):
        make_spec(InfluenceSpec, task=lines, s_tests=(spec,), relative="theta")
