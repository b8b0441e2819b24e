"""Regions of a network of one's own without pictures, and nearest by vectors of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from influence_jobs.report.viewer import make_viewer
from influence_jobs.store.layout import SCORES
from influence_jobs.store.run import Run

Infl = Callable[..., Any]

TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(1, 3, 3, padding=1)
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.leave = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        skipped = F.silu(self.enter(x))
        return self.leave(torch.cat([skipped, F.silu(self.up(F.silu(self.down(skipped))))], 1))


def images(rows, seed):
    y = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(F.avg_pool2d(y, 3, 1, 1), y)


class Deblur(Task):
    output_loss = "mse"

    def model(self):
        return UNet()

    def train_data(self):
        return images(20, 0)

    def test_data(self):
        return images(4, 1)

    def outputs(self, model, batch):
        return model(batch[0])

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().mean((1, 2, 3))


class Embedded(Deblur):
    def embed(self, batch):
        return batch[0].flatten(1)[:, :5]


class Flat(Deblur):
    def embed(self, batch):
        return batch[0]
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "deblur.py").write_text(TASK)
    return "deblur:Deblur"


def of(name: str, *words: str) -> tuple[str, ...]:
    return "submit", name, "--local", "--epochs", "1", *words


def test_points_are_explained_reported_and_viewed_without_pictures_of_ones_own(
    infl: Infl, task: str, tmp_path: Path
) -> None:
    asked = ("--task", task, "--test", "1", "--point", "2,3", "--region", "0,0,4,8")
    found = [infl(*of(kind, *asked, "--json")) for kind in ("influence", "attribution")]
    assert [answer.code for answer in found] == [0, 0]
    names = [answer.json["run"] for answer in found]
    runs = [Run.open(str(tmp_path / "runs"), name) for name in names]
    assert all(np.isfinite(np.asarray(run.array(SCORES))).all() for run in runs)
    regions = runs[0].read_table("queries").column("region").to_pylist()
    assert regions == ["2,3,1,1", "0,0,4,8"]
    top = infl("top", names[0], "--k", "2", "--png", "top.png")
    assert top.code == 0
    assert "test 1 (region 2,3,1,1): helpful" in top.out
    assert infl("report", *names, "--out", "report").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "The mark shows" in page  # in the image that a batch begins with
    with TestClient(make_viewer(runs, "token"), "http://127.0.0.1") as client:
        assert client.get("/?token=token").status_code == 200
        assert "region=2%2C3%2C1%2C1" in client.get("/").text
        assert '<img src="/picture/1.png" width="8" height="8"' in client.get("/image/1").text
        assert client.get("/picture/1.png").status_code == 200
        point = client.get("/image/1?y=2&x=3")
        assert point.status_code == 200
        assert "sample/" in point.text


def test_nearest_compares_vectors_of_the_task_and_is_refused_without_any(
    infl: Infl, refused: Callable[..., str], task: str, tmp_path: Path
) -> None:
    nearest = of("baseline", "--method", "nearest", "--test", "1", "--test", "0")
    assert (
        "defines no pictures(), and --method nearest compares pixels, or vectors (B, D) if the "
        in (refused(*nearest, "--task", task))
    )
    assert "--method nearest compares whole samples by embed(): leave --point, --region and" in (
        refused(*nearest, "--task", "deblur:Embedded", "--point", "1,1")
    )
    answer = infl(*nearest, "--task", "deblur:Flat")
    assert answer.code == 2
    assert "embed() of Flat gives (20, 1, 8, 8) for 20 samples: a vector for each" in answer.err
    answer = infl(*nearest, "--task", "deblur:Embedded", "--json")
    run = Run.open(str(tmp_path / "runs"), answer.json["run"])
    module: dict[str, Any] = {}
    exec(TASK, module)  # noqa: S102  (the task's own data)
    x, queries = (module["images"](*which).tensors[0] for which in ((20, 0), (4, 1)))
    vectors, wanted = (part.flatten(1)[:, :5] for part in (x, queries[[1, 0]]))
    expected = -(wanted[:, None] - vectors).square().sum(2).sqrt()
    scores = torch.from_numpy(np.asarray(run.array(SCORES)))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert run.array(SCORES).attrs["quantity"] == "minus the Euclidean distance of embed()"
    assert run.array(SCORES).attrs["unit"] == "none"


def test_the_check_says_which_regions_there_are(infl: Infl, task: str) -> None:
    answer = infl("check", task)
    assert "4 test samples; measured is loss; regions of 8 x 8 pixels" in answer.out


def test_a_file_of_ids_says_where_in_each_image(
    infl: Infl, refused: Callable[..., str], task: str, tmp_path: Path
) -> None:
    (tmp_path / "where.txt").write_text("1 0,0,4,8\n\n1 2,3\n0\n")
    asked = ("--task", task, "--test-set", "where.txt", "--method", "loss")
    answer = infl(*of("baseline", *asked, "--json"))
    run = Run.open(str(tmp_path / "runs"), answer.json["run"])
    queries = run.read_table("queries").to_pylist()
    assert [(row["test"], row["region"]) for row in queries] == [
        (1, "0,0,4,8"),
        (1, "2,3,1,1"),
        (0, None),
    ]
    assert "--test-set where.txt has regions of its own: leave --point, --region and --tokens" in (
        refused(*of("baseline", *asked, "--point", "1,1"))
    )
    for bad, said in (
        ("1 2,3,4", "--test-set where.txt: 2,3,4: write Y,X or Y,X,H,W"),
        ("1 2,3 4", "--test-set where.txt: '1 2,3 4' is not a test id, nor one with a point"),
        ("1 2,3,7,7", "region 2,3,7,7 is outside test image 1"),
    ):
        (tmp_path / "where.txt").write_text(bad)
        assert said in refused(*of("baseline", *asked))


def test_an_ablation_tells_the_psnr_of_a_region_and_of_its_image_elsewhere(
    infl: Infl, task: str, tmp_path: Path
) -> None:
    (tmp_path / "where.txt").write_text("1 0,0,4,8\n1 4,0,4,8\n0 0,0,4,4\n")
    asked = ("--test-set", "where.txt", "--by", "loss", "--mode", "remove", "--k", "5")
    answer = infl(*of("ablation", "--task", task, *asked, "--json"))
    run = Run.open(str(tmp_path / "runs"), answer.json["run"])
    upper, lower, alone = run.read_table("results").to_pylist()
    # The loss ranks alike for all queries: one model without the five samples is measured thrice.
    for one, other in ((upper, lower), (lower, upper)):
        assert one["loss"] != one["loss_before"]
        fall = 10 * np.log10(one["loss"] / one["loss_before"])
        assert one["psnr_fall"] == pytest.approx(fall)
        assert one["psnr_fall_elsewhere"] == pytest.approx(other["psnr_fall"])
        assert one["loss_elsewhere"] == pytest.approx(other["loss"])
        assert one["loss_elsewhere_before"] == pytest.approx(other["loss_before"])
    assert alone["psnr_fall"] is not None
    assert alone["psnr_fall_elsewhere"] is None
    assert infl("report", answer.json["run"], "--out", "report").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Fall of the PSNR in dB, of the query and of the other queries of its image" in page
