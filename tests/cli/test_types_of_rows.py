"""Rows of another floating-point type than the weights: the message names the line and the cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

TASK = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from influence_jobs import Task


class Rows:
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"x": np.full(6, i / 40), "y": i % 3}  # float64


class Float64Rows(Task):
    output_loss = "cross-entropy"

    def model(self):
        return nn.Linear(6, 3)

    def train_data(self):
        return Rows()

    def test_data(self):
        return Rows()

    def outputs(self, model, batch):
        return model(CAST)

    def targets(self, batch):
        return batch["y"]

    def losses(self, model, batch):
        return F.cross_entropy(self.outputs(model, batch), batch["y"], reduction="none")
"""
HERE = ("--local", "--epochs", 1)
CURE = "cast samples to the type of the weights, x.to(next(model.parameters()).dtype)"


def test_the_cure_is_told_and_works(infl: Callable[..., Any], tmp_path: Path) -> None:
    line = TASK.splitlines().index("        return model(CAST)") + 1
    (tmp_path / "rows_as_they_are.py").write_text(TASK.replace("CAST", 'batch["x"]'))
    task = "rows_as_they_are.py:Float64Rows"
    refused = infl("submit", "grad-norms", "--task", task, "--layer", "all", *HERE)
    assert refused.code == 2, refused.err
    assert f"rows_as_they_are.py, line {line}): {CURE}" in refused.err
    assert f"rows_as_they_are.py, line {line}): {CURE}" in infl("check", task).out

    cast = 'batch["x"].to(next(model.parameters()).dtype)'
    (tmp_path / "rows_cast.py").write_text(TASK.replace("CAST", cast))
    for words in (("grad-norms", "--layer", "all"), ("unrolled", "--test", 0)):
        done = infl("submit", *words, "--task", "rows_cast.py:Float64Rows", *HERE)
        assert done.code == 0, done.err
