"""Long and short samples: batches of one length, results at their own places."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from influence_jobs.jobs.base import Shard
from influence_jobs.jobs.rows import Rows
from influence_jobs.kinds import open_job
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint, TrainSpec
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import ConjugateGradientSettings
from influence_jobs.store.run import Run
from influence_jobs.tasks import lengths
from influence_jobs.tasks.base import Task

WORDS, N = 30, 300
PADDING = 0


class Bag(nn.Module):
    """The mean over a text's words, of which padding is none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, texts: Tensor) -> Tensor:
        real = (texts != PADDING).unsqueeze(2)
        hidden = self.head(self.words(texts)).tanh()
        return (hidden * real).sum(1) / real.sum(1)


class Texts(Task):
    """Texts of 1 to 40 words; a batch is padded to its longest."""

    output_loss = "cross-entropy"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        many = torch.randint(1, 40, (N,), generator=generator)
        self.rows = [
            (torch.randint(1, WORDS, (int(n),), generator=generator), int(n) % 3) for n in many
        ]

    def model(self) -> nn.Module:
        return Bag()

    def train_data(self) -> Any:
        return self.rows

    def test_data(self) -> Any:
        return self.rows[:3]

    def collate(self, rows: list[Any]) -> Any:
        texts = pad_sequence([row[0] for row in rows], batch_first=True, padding_value=PADDING)
        return texts, torch.tensor([row[1] for row in rows])

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def targets(self, batch: Any) -> Tensor:
        out: Tensor = batch[1]
        return out

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


class Counted(Texts):
    """Counts the places of its batches that are padding."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) > 2:  # not the checks
            Counted.padded += int((batch[0] == PADDING).sum())
            Counted.words += int((batch[0] != PADDING).sum())
        return super().outputs(model, batch)

    padded = words = 0


class Alike(Texts):
    """All texts are padded to 40 words by the data themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = [(F.pad(text, (0, 40 - len(text))), label) for text, label in self.rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def job_of(root: Path, kind: str, task_class: type[Task] = Counted, size: int = 16) -> Any:
    task = TaskSpec(name=f"{task_class.__module__}:{task_class.__name__}", data="")
    train = make_spec(TrainSpec, task=task, epochs=1, batch_size=64, lr=0.05)
    checkpoint = TrainedCheckpoint(train=train, epoch=1)
    queries = Queries(items=tuple(Query(test=i) for i in range(3)))
    common = {"task": task, "queries": queries}
    cg = make_spec(
        STestSpec,
        **common,
        checkpoint=checkpoint,
        modules=("words", "head"),
        solver=ConjugateGradientSettings(damping=0.1),
    )
    specs = {
        "norms": lambda: make_spec(
            GradNormsSpec, task=task, checkpoints=(checkpoint,), layers=("words", "head")
        ),
        "loss": lambda: make_spec(BaselineSpec, **common, method="loss", checkpoint=checkpoint),
        "cg": lambda: cg,
        "influence": lambda: make_spec(InfluenceSpec, task=task, s_tests=(cg,)),
    }
    torch.manual_seed(0)
    job = open_job(Run(str(root), specs[kind]()), batch_size=size)
    if hasattr(job, "load"):
        job.load = lambda checkpoint: None  # untrained weights will do
    job.task  # noqa: B018
    return job


@pytest.mark.parametrize("kind", ["norms", "loss"])
def test_results_are_at_their_own_places_and_less_is_padded(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard("", 0, N)

    def found() -> tuple[dict[str, np.ndarray], int]:
        Counted.padded = 0
        arrays = dict(job_of(root, kind).run(shard, lambda done: None).arrays)
        return arrays, Counted.padded

    ours, padded = found()
    with monkeypatch.context() as patch:
        patch.setattr("influence_jobs.jobs.samples.pads", lambda task: False)
        plain, as_they_come = found()
    assert ours.keys() == plain.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, plain[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert padded < as_they_come / 3


def test_batches_have_all_ids_of_their_chunk_once_and_similar_lengths(root: Path) -> None:
    job = job_of(root, "norms")
    chunks = list(job.chunks(Shard("", 0, N)))
    bounds = [0, *np.cumsum([len(ids) for ids in chunks])]
    assert len(chunks) == 2  # of 256 rows
    for ids, start, stop in zip(chunks, bounds[:-1], bounds[1:], strict=True):
        assert sorted(ids.tolist()) == list(range(start, stop))
        many = [len(job.task.rows[i][0]) for i in ids]
        assert many == sorted(many, reverse=True)
    # A chunk's batches do not depend on the shard.
    (second,) = job.chunks(Shard("", 256, N))
    assert torch.equal(second, chunks[1])


def test_samples_of_one_size_stay_in_their_order(root: Path) -> None:
    job = job_of(root, "norms", Alike)
    assert torch.cat(list(job.chunks(Shard("", 0, N)))).tolist() == list(range(N))
    assert not lengths.pads(job.task)


def test_products_with_the_curvature_pad_less_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product() -> tuple[Tensor, int]:
        torch.manual_seed(0)
        operator = job_of(root, "cg")._operator
        operator.look()
        Counted.padded = 0
        vectors = torch.randn(2, operator.size, generator=torch.Generator().manual_seed(1))
        return operator @ vectors, Counted.padded

    ours, padded = product()
    monkeypatch.setattr("influence_jobs.curvature.operators.pads", lambda task: False)
    plain, as_they_come = product()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
    assert padded < as_they_come / 3


def test_a_probe_has_long_and_short_batches(root: Path) -> None:
    def of_batches() -> Iterator[int]:
        job = job_of(root, "norms")
        for ids in job.all_batches():
            yield max(len(job.task.rows[i][0]) for i in ids)

    batches = of_batches()
    first, second = next(batches), next(batches)
    assert first >= 38
    assert second <= 3


def test_rows_add_up_at_their_places() -> None:
    rows = Rows(Shard("", 10, 13), axis=1)
    rows.add(torch.tensor([12, 10]), {"a": np.array([[1.0, 2.0]], np.float32)})
    rows.add(torch.tensor([11]), {"a": np.array([[3.0]], np.float32)})
    rows.add(torch.tensor([10, 11, 12]), {"a": np.array([[1.0, 1.0, 1.0]], np.float32)})
    assert rows.arrays()["a"].tolist() == [[3.0, 4.0, 2.0]]
    assert rows.arrays()["a"].dtype == np.float64
