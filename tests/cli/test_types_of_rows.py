"""Rows of another floating-point type than the weights: the message names the line and the cure."""

import subprocess
import sys
from pathlib import Path

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
CURE = "cast samples to the type of the weights, x.to(next(model.parameters()).dtype)"


def infl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from infl_cli.entry import main; main()", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_cure_is_told_and_works(tmp_path: Path) -> None:
    line = TASK.splitlines().index("        return model(CAST)") + 1
    (tmp_path / "rows.py").write_text(TASK.replace("CAST", 'batch["x"]'))
    norms = ("submit", "grad-norms", "--task", "rows.py:Float64Rows", "--layer", "all", "--local")
    refused = infl(tmp_path, *norms, "--epochs", "1")
    assert refused.returncode == 2, refused.stderr
    assert f"rows.py, line {line}): {CURE}" in refused.stderr
    assert "Traceback" not in refused.stderr
    checked = infl(tmp_path, "check", "rows.py:Float64Rows")
    assert f"rows.py, line {line}): {CURE}" in checked.stdout

    cast = 'batch["x"].to(next(model.parameters()).dtype)'
    (tmp_path / "rows.py").write_text(TASK.replace("CAST", cast))
    assert infl(tmp_path, *norms, "--epochs", "1").returncode == 0
    unrolled = ("submit", "unrolled", "--task", "rows.py:Float64Rows", "--test", "0", "--local")
    done = infl(tmp_path, *unrolled, "--epochs", "1")
    assert done.returncode == 0, done.stderr
