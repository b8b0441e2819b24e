"""Norms and influence of a model with tied, frozen, custom and recurrent parts, in any dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.gradients.weights import weight_named
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import to_type
from influence_jobs.tasks.registry import task_class

Infl = Callable[..., Any]

MIXED = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.first = nn.Linear(4, 6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.second = nn.Linear(6, 6, bias=False)
        self.third = nn.Linear(6, 6, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.rnn(torch.tanh(self.first(x + self.shift)))[0].mean(1)
        x = torch.tanh(self.second(self.frozen(x)))
        return self.head(torch.tanh(self.third(x)))


class Mixed(Task):
    output_loss = "cross-entropy"

    def _data(self, rows, seed):
        x = torch.randn(rows, 5, 4, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x.to(self.dtype), x[:, :, :3].mean(1).argmax(1))

    dtype = torch.DTYPE

    def model(self):
        torch.manual_seed(0)
        return Net().to(self.dtype)

    def train_data(self):
        return self._data(40, 0)

    def test_data(self):
        return self._data(5, 1)

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")
"""


def task_in(tmp_path: Path, dtype: str) -> tuple[str, Task]:
    (tmp_path / f"mixed_{dtype}.py").write_text(MIXED.replace("DTYPE", dtype))
    name = f"mixed_{dtype}:Mixed"
    return name, task_class(name)()


def trained(run: Run, task: Task) -> nn.Module:
    """The model with the weights that the norms are of."""
    model = task.model()
    (file,) = Path(run.root).glob("train-*/checkpoints/*.pt")
    model.load_state_dict(torch.load(file))
    return model.eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_norms_of_all_weights_in_another_dtype(infl: Infl, tmp_path: Path, dtype: str) -> None:
    name, task = task_in(tmp_path, dtype)
    words = ("--task", name, "--layer", "*", "--layer", "shift", "--epochs", 1, "--local", "--json")
    normed = infl("submit", "grad-norms", *words)
    assert normed.code == 0, normed.err
    assert (
        "gradients without a rule are computed mapped over the samples through the whole model"
        in normed.err
    )
    run = Run.open(str(tmp_path / "runs"), normed.json["run"])
    layers = [array.removeprefix("norms/") for array in run.array_names()]
    assert sorted(layers) == [
        *("first", "head", "rnn.weight_hh_l0", "rnn.weight_ih_l0", "second", "shift"),
    ]
    model = trained(run, task)
    batch = to_type(task.batch(torch.arange(40), Draw(0)), torch.float64)
    weights = {layer: weight_named(model, layer) for layer in layers}
    gradients = gradients_one_by_one(
        model.double(), [weight.parameter for weight in weights.values()], task.losses, batch
    )
    for layer, weight in weights.items():
        wanted = weight.norms(gradients[weight.parameter], "channel").numpy()
        found = run.read_rows(f"norms/{layer}", 0, 40)
        assert np.abs(found - wanted).max() <= 1e-5 * wanted.max(), layer
        assert run.array(f"norms/{layer}").attrs["parameter"] == weight.parameter

    numbered = infl("top", run.id, "--layer", 1, "--k", 2)
    assert "layer first: largest norms" in numbered.out
    shared = infl("top", run.id, "--layer", "third", "--k", 2)
    assert "layer second: largest norms" in shared.out
    assert infl("top", run.id, "--layer", "rnn*", "--k", 2).out.count("largest norms") == 2


def test_influence_counts_what_is_trained_once(infl: Infl, tmp_path: Path) -> None:
    name, _ = task_in(tmp_path, "float32")
    task = ("--task", name, "--test", 0, "--epochs", 1, "--solver", "identity", "--local", "--json")
    scored = infl("submit", "influence", *task, "--keep-layers")
    assert scored.code == 0, scored.err
    run = Run.open(str(tmp_path / "runs"), scored.json["run"])
    parts = [array for array in run.array_names() if array != "scores"]
    assert sorted(parts) == [f"parts/{n}" for n in ("(model)", "first", "head", "rnn", "second")]
    total = sum(run.read_rows(part, 0, 40) for part in parts)
    np.testing.assert_allclose(total, run.read_rows("scores", 0, 40), rtol=1e-4, atol=1e-6)
    by_name = infl("submit", "influence", *task, "--layer", "third", "--layer", "shift")
    assert by_name.code == 0, by_name.err
    frozen = infl("submit", "influence", *task, "--layer", "frozen")
    assert frozen.code == 2
    assert "error: layer 'frozen' is frozen (requires_grad=False)" in frozen.err


def test_what_factors_leave_out_is_said(infl: Infl, tmp_path: Path) -> None:
    name, _ = task_in(tmp_path, "float32")
    task = ("--task", name, "--test", 0, "--epochs", 1, "--local")
    solved = infl("submit", "s-test", *task, "--solver", "ek-fac")
    others = (
        "layers; these have no Kronecker factors and are left out: Net the model itself; GRU rnn\n"
    )
    assert f"--solver ek-fac takes 3 of 5 {others}" in solved.err
    relative = ("submit", "influence", *task, "--solver", "identity", "--relative", "theta")
    some = infl(*relative, "--layer", "first", "--layer", "head", "--layer", "rnn")
    assert some.code == 0, some.err
    measured = "through 2 of 3 layers; these have no Kronecker factors and do not count: GRU rnn\n"
    assert f"--relative divides by a sample's effect {measured}" in some.err
    factored = infl(*relative, "--layer", "first", "--layer", "head")
    assert "--relative divides" not in factored.err
