"""A task with Conv1d, GroupNorm and a layer type of its own: norms, influence and report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_jobs.gradients.rules import base
from influence_jobs.store.run import Run

Infl = Callable[..., Any]

WAVES = '''
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task
from influence_jobs.gradients import MatrixRule


class Doubled(nn.Module):
    """y = 2 W x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8) / 8)

    def forward(self, x):
        return 2 * x @ self.weight.t()


class DoubledRule(MatrixRule):
    layer = Doubled

    def input_rows(self, a):
        return 2 * a.unsqueeze(1)

    def output_rows(self, g):
        return g.unsqueeze(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Doubled()  # registered first, called last
        self.conv = nn.Conv1d(2, 8, 5, stride=2)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean(2))


class Waves(Task):
    output_loss = "cross-entropy"

    def _data(self, rows, seed):
        x = torch.randn(rows, 2, 16, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, x.mean(2).argmax(1))

    def model(self):
        return Net()

    def train_data(self):
        return self._data(60, 0)

    def test_data(self):
        return self._data(5, 1)

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
'''


def test_norms_influence_and_report(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        base, "_RULES", dict(base._RULES)
    )  # remove the rules that the task registered
    (tmp_path / "waves_of_test.py").write_text(WAVES)
    task = ("--task", "waves_of_test:Waves", "--local")
    layers = ("--layer", "all", "--layer", "norm", "--reduce", "kernel")
    normed = infl("submit", "grad-norms", *task, *layers, "--epochs", 1, "--json")
    assert normed.code == 0, normed.err
    run = Run.open(str(tmp_path / "runs"), normed.json["run"])
    stored = {
        layer: (run.array(f"norms/{layer}").shape, run.array(f"norms/{layer}").metadata)
        for layer in ("conv", "head", "norm")
    }
    image = ("sample", "channel", "kernel_y", "kernel_x")
    assert {k: (shape, meta.dimension_names) for k, (shape, meta) in stored.items()} == {
        "conv": ((60, 8, 5), ("sample", "channel", "kernel_x")),
        "head": ((60, 3, 1, 1), image),
        "norm": ((60, 8, 1, 1), image),
    }
    assert list(json.loads(infl("top", run.id, "--k", 2, "--json").out.splitlines()[-1])["top"])

    scored = infl(
        *("submit", "influence", *task, "--checkpoint", "train-waves", "--test", 0),
        *("--solver", "ek-fac", "--damping", 0.1, "--relative", "theta", "--json"),
    )
    assert scored.code == 0, scored.err
    solved = next(r for r in (tmp_path / "runs").iterdir() if r.name.startswith("s-test"))
    assert json.loads((solved / "spec.json").read_text())["modules"] == ["head", "conv"]

    told = infl("report", run.id, scored.json["run"], "--out", "report")
    assert told.code == 0, told.err
    assert (tmp_path / "report" / "report.html").exists()
