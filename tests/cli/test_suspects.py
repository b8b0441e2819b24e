"""`infl submit self-influence` and `infl suspects`, from the command line and from Python."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import influence_jobs
from influence_jobs import Task

AT = ("--checkpoint", "train-digits", "--local")


@pytest.mark.usefixtures("runs")
def test_suspects_with_their_evidence(infl: Callable[..., Any]) -> None:
    answer = infl("submit", "self-influence", *AT, "--json")
    assert answer.code == 0, answer.err
    run = answer.json["run"]
    assert answer.json["arrays"].keys() == {
        "self_influence", "losses", "labels", "predicted", "probability",
    }  # fmt: skip
    found = infl("suspects", run, "--k", 4, "--csv", "suspects.csv", "--png", "suspects.png")
    assert found.code == 0, found.err
    said, heads, *rows = found.out.splitlines()
    assert said.startswith("4 samples with the largest loss; for ")
    assert heads.split() == [
        "rank", "sample", "label", "predicted", "probability", "loss", "self_influence",
    ]  # fmt: skip
    assert Path("suspects.png").read_bytes().startswith(b"\x89PNG")
    with Path("suspects.csv").open() as lines:
        written = [*csv.DictReader(lines)]
    asked = infl("suspects", run, "--k", 4, "--json").json
    assert [int(row["sample"]) for row in written] == [row["sample"] for row in asked["suspects"]]
    assert [row.split()[1] for row in rows] == [row["sample"] for row in written]

    found = infl("suspects", run, "--k", 500, "--csv", "suspects.csv")
    assert found.err == "wrote suspects.csv\n"
    assert len(found.out.splitlines()) == 13  # what they are, heads, ten rows, and how many more
    assert found.out.splitlines()[-1] == "and 490 more rows in suspects.csv"
    with Path("suspects.csv").open() as lines:
        assert len([*csv.DictReader(lines)]) == 500
    assert len(infl("suspects", run, "--k", 500).out.splitlines()) == 502
    top = infl("top", run, "--k", 12, "--parquet", "top.parquet")
    assert top.out.splitlines()[-1] == "and 2 more rows in top.parquet"

    results = influence_jobs.submit("self-influence", checkpoint="train-digits", quiet=True)
    assert results.run.id == run
    values = np.asarray(results["self_influence"])
    best = np.argsort(-values, kind="stable")[:4].tolist()
    assert results.suspects(4, by="self-influence").column("sample").to_pylist() == best
    assert results.top_k(4).column("sample").to_pylist() == best
    by_loss = np.argsort(-np.asarray(results["losses"]), kind="stable")[:4].tolist()
    assert results.suspects(4).column("sample").to_pylist() == by_loss

    top = infl("top", run, "--k", 4)
    assert top.out.splitlines()[0].startswith("self_influence: g^T (G + lambda I)^-1 g")
    page = Path(infl("report", run).out.split()[0]).read_text()
    assert "The 20 samples with the largest self-influence" in page
    assert "The 20 samples with the largest loss" in page


def test_suspects_are_refused_where_no_label_can_be_wrong(
    infl: Callable[..., Any], runs: Any
) -> None:
    norms = infl("submit", "grad-norms", "--layer", "head", *AT, "--json").json["run"]
    refused = infl("suspects", norms)
    assert refused.code == 2
    assert "infl submit self-influence" in refused.err
    for words, said in (
        (("--solver", "identity", "--damping", "0.1"), "--damping has no meaning"),
        (("--layer", "norm"), "BatchNorm2d norm"),
    ):
        answer = infl("submit", "self-influence", *AT, *words)
        assert answer.code == 2
        assert said in answer.err


class Line(Task):
    """A regression."""

    output_loss = "mse"

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def train_data(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        return [(row, row.sum(0, keepdim=True)) for row in x]

    def outputs(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0])

    def targets(self, batch: Any) -> torch.Tensor:
        return batch[1]

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return (self.outputs(model, batch) - batch[1]).square().mean(1)


def test_a_regression_has_self_influence_and_no_suspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = influence_jobs.submit("train", task=Line, epochs=1, lr=0.01, quiet=True)
    found = influence_jobs.submit("self-influence", checkpoint=trained, quiet=True)
    assert set(found.arrays) == {"self_influence", "losses"}
    assert found.top_k(3).num_rows == 3
    with pytest.raises(influence_jobs.InflError, match="infl top"):
        found.suspects()
