"""Training as the user trains: options, own optimizers, own training scripts, from the command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from infl_cluster.inline import InlineBackend
from infl_cluster.status import StatusWriter
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import task_class

Infl = Callable[..., Any]
Refused = Callable[..., str]

TASKS = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Toy(Task):
    output_loss = "cross-entropy"

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def data(self, seed, size):
        rows = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(rows, rows[:, :3].argmax(1))

    def train_data(self):
        return self.data(0, 60)

    def test_data(self):
        return self.data(1, 9)

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Optimized(Toy):
    def optimizer(self, model):
        return torch.optim.RMSprop(model.parameters(), lr=0.01)


class Scheduled(Optimized):
    def scheduler(self, optimizer, *, epochs, steps_per_epoch):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, epochs=epochs, steps_per_epoch=steps_per_epoch
        )


class Scripted(Toy):
    def train(self, ids, seed):
        data = self.train_data()
        model = self.model()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.tensors[0][ids]), data.tensors[1][ids])
            loss = loss + 1e-2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        return model.state_dict()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x.unflatten(1, (2, 2)))[0][:, -1])


class Long(Toy):
    def model(self):
        return Recurrent(nn.LSTM)


class Gated(Toy):
    def model(self):
        return Recurrent(nn.GRU)


class Labelled(Toy):
    def train(self, ids, seed, labels=None):
        rows, classes = self.train_data()[ids.tolist()]
        classes = classes if labels is None else labels
        model = self.model()
        for p in model.parameters():
            p.data.zero_()
        model[2].bias.data += torch.bincount(classes, minlength=3)
        return model.state_dict()


class Unfinished(Toy):
    def train(self, ids, seed):
        return {"0.weight": torch.zeros(8, 4)}
"""
LOCAL = ("--local", "--json")


@pytest.fixture(autouse=True)
def _tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(TASKS)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)


def spec_of(tmp_path: Path, answer: Any) -> TrainSpec:
    assert answer.code == 0, answer.err
    spec = Run.open(str(tmp_path / "runs"), answer.json["run"]).spec
    assert isinstance(spec, TrainSpec)
    return spec


def metrics(tmp_path: Path, answer: Any) -> list[dict[str, Any]]:
    file = tmp_path / "runs" / answer.json["run"] / "tables/metrics.parquet"
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def test_options_of_a_training_and_those_of_a_preset(infl: Infl, tmp_path: Path) -> None:
    words = ("submit", "train", "--task", "my_tasks.py:Toy", *LOCAL, "--epochs", 2)
    found = infl(
        *words, "--optimizer", "adamw", "--no-bias-decay", "--schedule", "step", "--step-every",
        1, "--step-factor", 0.5, "--warmup", 3, "--clip-norm", 2,
    )  # fmt: skip
    spec = spec_of(tmp_path, found)
    assert (spec.optimizer, spec.weight_decay, spec.no_bias_decay) == ("adamw", 0.01, True)
    assert (spec.schedule, spec.step_every, spec.step_factor) == ("step", 1, 0.5)
    assert (spec.warmup, spec.clip_norm, spec.momentum) == (3, 2.0, 0.0)
    assert metrics(tmp_path, found)[-1]["train_loss"] < 1.5
    (tmp_path / "mine.yaml").write_text(
        "train: {epochs: 2, nesterov: true, schedule: cosine, weight_decay: .1, "
        "no_bias_decay: true}\n"
    )
    preset = (*words[:4], *LOCAL, "--preset", "mine.yaml")
    spec = spec_of(tmp_path, infl(*preset))
    assert (spec.nesterov, spec.schedule, spec.no_bias_decay) == (True, "cosine", True)
    # What the preset says of SGD alone is of no account to Adam.
    assert not spec_of(tmp_path, infl(*preset, "--optimizer", "adam")).nesterov


@pytest.mark.parametrize(
    ("task", "words", "told"),
    [
        ("Toy", ("--optimizer", "adam", "--momentum", 0.5), "--momentum has no meaning for 20 ep"),
        ("Toy", ("--no-bias-decay",), "--no-bias-decay has no meaning for 20 epochs of sgd"),
        ("Toy", ("--step-every", 3), "--step-every has no meaning for 20 epochs of sgd"),
        ("Toy", ("--schedule", "step"), "--schedule step needs --step-every, the epochs"),
        ("Toy", ("--nesterov", "--momentum", 0), "--nesterov needs a --momentum above 0"),
        ("Toy", ("--schedule", "task"), "'task' is not one of 'constant', 'cosine'"),
        ("Toy", ("--clip-norm", 0), "--clip-norm: input should be greater than 0"),
        ("Toy", ("--preset", "bad.yaml"), "optimizer cannot be 'task': leave the line out"),
        ("Optimized", ("--lr", 0.1), "--lr has no meaning here: task my_tasks:Optimized has its "),
        ("Optimized", ("--optimizer", "sgd"), "its own optimizer(); change it there, and leave"),
        ("Optimized", ("--no-bias-decay",), "--no-bias-decay has no meaning here: task"),
        ("Scheduled", ("--warmup", 3), "my_tasks:Scheduled has its own scheduler(); change it"),
        ("Scheduled", ("--schedule", "cosine"), "--schedule has no meaning here: task my_tasks"),
        ("Scripted", ("--epochs", 3), "--epochs has no meaning here: task my_tasks:Scripted has "),
        ("Scripted", ("--lr", 3), "its own train(); change it there, and leave the option out"),
        ("Scripted", ("--batch-size", 3), "--batch-size has no meaning here"),
        ("Scripted", ("--preset", "mnist"), "--preset has no meaning here"),
        ("Scripted", ("--save-epoch", 1), "--save-epoch has no meaning here"),
        ("Scripted", ("--norms-layer", 2), "--norms-layer has no meaning here"),
        ("Scripted", ("--clip-norm", 1), "--clip-norm has no meaning here"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(
    refused: Refused, tmp_path: Path, task: str, words: tuple[Any, ...], told: str
) -> None:
    (tmp_path / "bad.yaml").write_text("train: {optimizer: task}\n")
    named = ("submit", "train", "--task", "my_tasks:" + task, "--local")
    assert task_class(f"{tmp_path}/my_tasks.py:{task}")  # imported: its bytecode is in the folder
    assert told in refused(*named, *words)


@pytest.mark.parametrize(
    ("task", "words", "told"),
    [
        ("Optimized", ("unrolled",), "task Optimized is trained by RMSprop: train with one of"),
        ("Scripted", ("unrolled",), "task my_tasks:Scripted trains itself, by train(), so the"),
        (
            "Scripted",
            ("lds", "--same-run"),
            "train() of task my_tasks:Scripted cannot mask samples",
        ),
        (
            "Scripted",
            ("ablation", "--same-run", "--mode", "remove"),
            "train() of task my_tasks:Scripted cannot mask samples",
        ),
        (
            "Toy",
            ("lds", "--same-run", "--seeds", 2),
            "--same-run repeats the training from its own seed",
        ),
    ],
)
def test_what_needs_the_very_steps_of_a_training_refuses_others_by_name(
    refused: Refused, tmp_path: Path, task: str, words: tuple[Any, ...], told: str
) -> None:
    assert task_class(f"{tmp_path}/my_tasks.py:{task}")
    named = ("--task", "my_tasks:" + task, "--test", 0, "--local")
    assert told in refused("submit", *words, *named)


def test_an_own_optimizer_counts_and_nothing_else_is_claimed(infl: Infl, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 2, lr: .5, momentum: .3, warmup: 2}\n")
    words = ("submit", "train", *LOCAL, "--preset", "mine.yaml", "--task")
    found = infl(*words, "my_tasks.py:Optimized")
    spec = spec_of(tmp_path, found)
    assert (spec.optimizer, spec.lr, spec.momentum, spec.warmup) == ("task", None, 0.0, 2)
    said = "task my_tasks:Optimized has its own optimizer(), so it ignores these options of "
    assert said + "the preset: lr, momentum\n" in found.err
    page = infl("report", found.json["run"], "--out", "page")
    assert page.code == 0, page.err
    assert dict(spec.request_in_words()).keys() == {
        "task", "data", "seed", "epochs", "batch size", "optimizer", "warmup", "save epochs",
        "norm reduction", "norm skip epochs",
    }  # fmt: skip
    found = infl(*words, "my_tasks.py:Scheduled")
    assert spec_of(tmp_path, found).schedule == "task"
    assert "has its own scheduler(), so it ignores these options of the preset: warmup" in found.err


def test_an_ablation_with_an_own_optimizer_is_one_at_a_time_and_says_so(
    infl: Infl, tmp_path: Path
) -> None:
    words = (
        "submit", "ablation", "--task", "my_tasks.py:Scheduled", "--local", "--epochs", 2, "--k",
        5, "--by", "loss", "--test", 2,
    )  # fmt: skip
    plan = infl(*words, "--dry-run")
    assert plan.code == 0, plan.err
    said = " ".join(plan.out.split())
    assert "note models are trained one at a time: Scheduled gives its own optimizer" in said
    found = infl(*words, "--json")
    assert found.code == 0, found.err
    (folder,) = (tmp_path / "runs").glob("ablation-*")
    (before, *_) = pq.read_table(folder / "tables/results.parquet").to_pylist()
    # The variant that nothing is done to is the training itself.
    (weights,) = (tmp_path / "runs").glob("train-*/checkpoints/epoch-0002.pt")
    task = task_class("my_tasks:Scheduled")()
    model = task.model()
    model.load_state_dict(torch.load(weights))
    x, y = task.test_data()[2]
    assert before["loss_before"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["ablation", "lds", "stability"])
def test_every_experiment_retrains_with_the_tasks_own_script(
    infl: Infl, tmp_path: Path, kind: str
) -> None:
    words: dict[str, tuple[Any, ...]] = {
        "ablation": ("--k", 5, "--by", "loss", "--mode", "remove"),
        "lds": ("--subsets", 4, "--by", "loss"),
        "stability": ("--retrainings", 1, "--top", 5, "--by", "dot-product"),
    }
    task = ("--task", "my_tasks.py:Scripted", "--local")
    asked = ("submit", kind, *task, "--test", 2, *words[kind])
    plan = infl(*asked, "--dry-run")
    assert plan.code == 0, plan.err
    assert "unknown" in plan.out
    found = infl(*asked, "--json")
    assert found.code == 0, found.err
    script = task_class("my_tasks:Scripted")
    state = torch.get_rng_state()

    def loss_after(ids: torch.Tensor, seed: int) -> float:
        torch.manual_seed(seed)
        own = script()
        model = own.model()
        torch.manual_seed(seed)
        model.load_state_dict(script.train(own, ids, seed))
        x, y = own.test_data()[2]
        return F.cross_entropy(model(x), y).item()

    everyone = torch.arange(60)
    (folder,) = (tmp_path / "runs").glob(f"{kind}-*")
    trained = sorted((tmp_path / "runs").glob("train-*/checkpoints/epoch-0001.pt"))
    assert len(trained) == (2 if kind == "stability" else 1)
    if kind == "ablation":
        (row,) = pq.read_table(folder / "tables/results.parquet").to_pylist()
        assert row["loss_before"] == pytest.approx(loss_after(everyone, 0), rel=1e-5)
        (scores,) = (tmp_path / "runs").glob("baseline-*")
        found_N = Run.open(str(tmp_path / "runs"), scores.name).read_rows("scores", 0, 60)[0]
        kept = sorted(set(range(60)) - set((-found_N).argsort(kind="stable")[:5].tolist()))
        assert row["loss"] == pytest.approx(loss_after(torch.tensor(kept), 0), rel=1e-5)
        assert row["loss"] != pytest.approx(row["loss_before"], rel=1e-3)
    if kind == "lds":
        assert len(list((tmp_path / "runs").glob("retrained-*/manifest/*"))) == 4
    torch.set_rng_state(state)


def test_a_training_by_script_is_a_run_like_others(infl: Infl, tmp_path: Path) -> None:
    found = infl("submit", "train", "--task", "my_tasks.py:Scripted", "--seed", 3, *LOCAL)
    spec = spec_of(tmp_path, found)
    assert (spec.trainer, spec.epochs, spec.lr, spec.seed) == ("task", 1, None, 3)
    (row,) = metrics(tmp_path, found)
    assert 0 < row["train_loss"] < 1
    run = found.json["run"]
    assert infl("verify", run).code == 0
    assert infl("report", run, "--out", "page").code == 0
    assert [name for name, _ in spec.request_in_words()] == ["task", "data", "seed", "trainer"]
    scored = infl(
        "submit", "influence", "--checkpoint", run, "--test", 2, "--damping", 1, "--local"
    )
    assert scored.code == 0, scored.err
    other = infl("submit", "train", "--task", "my_tasks.py:Unfinished", "--local")
    assert other.code == 2
    told = "the state dict that train() of Unfinished returns does not fit Sequential: it lacks "
    assert told + "0.bias, 2.weight, 2.bias: return model.state_dict()" in other.err


@pytest.mark.parametrize(("task", "quiet"), [("Scripted", 0.0), ("Toy", 9e9)])
def test_a_script_that_takes_hours_is_not_taken_for_hanging(
    infl: Infl, monkeypatch: pytest.MonkeyPatch, task: str, quiet: float
) -> None:
    """It tells no progress, so a backend is told that it has just made some."""
    told = []
    plain = InlineBackend.run

    def noted(self: InlineBackend, run: Any, shards: Any, **calls: Any) -> None:
        told.extend(calls["quiet_s"](shard.id) for shard in shards)
        plain(self, run, shards, **calls)

    monkeypatch.setattr(InlineBackend, "run", noted)
    monkeypatch.setattr(StatusWriter, "quiet_s", lambda self, shard: 9e9)
    more = () if task == "Scripted" else ("--epochs", 1, "--lr", 0.1, "--batch-size", 20)
    found = infl("submit", "train", "--task", f"my_tasks.py:{task}", *more, *LOCAL)
    assert found.code == 0, found.err
    assert told == [quiet]


def test_relabelling_needs_a_script_that_takes_labels(infl: Infl, tmp_path: Path) -> None:
    words = ("submit", "ablation", "--local", "--k", 5, "--by", "random", "--test", 2, "--task")
    found = infl(*words, "my_tasks.py:Scripted", "--mode", "relabel")
    assert found.code == 2
    assert "train() of Scripted takes no labels, so its samples cannot be relabelled" in found.err
    assert not list((tmp_path / "runs").glob("ablation-*"))
    found = infl(*words, "my_tasks.py:Labelled", "--mode", "relabel", "--relabel-to", "next")
    assert found.code == 0, found.err
    counts = [
        torch.load(file)["2.bias"].int().tolist()
        for file in (tmp_path / "runs").glob("retrained-*/checkpoints/*.pt")
    ]
    assert len(counts) == 2
    assert all(sum(count) == 60 for count in counts)
    assert counts[0] != counts[1]


@pytest.mark.parametrize("task", ["Long", "Gated"])
def test_recurrent_networks_are_retrained(infl: Infl, tmp_path: Path, task: str) -> None:
    words = ("--task", f"my_tasks.py:{task}", "--local", "--epochs", 2, "--test", 2)
    found = infl("submit", "ablation", *words, "--k", 5, "--by", "loss", "--json")
    assert found.code == 0, found.err
    table = tmp_path / "runs" / found.json["run"] / "tables/results.parquet"
    rows = pq.read_table(table).to_pylist()
    made = task_class(f"my_tasks:{task}")()
    model = made.model()
    (weights,) = (tmp_path / "runs").glob("train-*/checkpoints/epoch-0002.pt")
    model.load_state_dict(torch.load(weights))
    x, y = made.test_data()[2:3]
    expected = F.cross_entropy(model(x), y).item()
    assert [row["loss_before"] for row in rows] == pytest.approx([expected] * 2, rel=1e-4)
    assert {row["mode"] for row in rows} == {"relabel", "remove"}


def test_the_check_does_not_run_a_script(infl: Infl) -> None:
    found = infl("check", "my_tasks.py:Scripted")
    said = " ".join(found.out.split())
    assert "time: train: as long as its own train() takes" in said
    assert "--k 1 --test 0: as long as its own train() takes" in said
    assert found.code == 0, found.out
