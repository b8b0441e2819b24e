"""Scores and norms of each token, kept by runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.report.viewer import make_viewer
from influence_jobs.store.layout import S_TEST, SCORES, SCORES_OF_TOKENS, token_norms_name
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.registry import task_class

Infl = Callable[..., Any]

TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from influence_jobs import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.rnn = nn.GRU(5, 5, batch_first=True)
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.rnn(self.words(ids))[0])))


def texts(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (rows,), generator=generator).tolist()
    return [torch.randint(7, (n,), generator=generator) for n in lengths]


class Words(Task):
    output_loss = "cross-entropy"

    def model(self):
        torch.manual_seed(0)
        return Net().double()

    def train_data(self):
        return texts(12, 0)

    def test_data(self):
        return texts(3, 1)

    def collate(self, rows):
        ids = pad_sequence(rows, batch_first=True)
        following = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        return ids, following

    def outputs(self, model, batch):
        return model(batch[0])[:, :-1]

    def targets(self, batch):
        return batch[1]

    def losses(self, model, batch):
        losses = F.cross_entropy(self.outputs(model, batch).mT, batch[1], reduction="none")
        return losses.sum(1) / (batch[1] != -100).sum(1)


class Counts(Words):
    output_loss = None
"""
TOKENS = 5  # of the longest text


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "words.py").write_text(TASK)
    return "--task", "words:Words", "--epochs", "1", "--local", "--json", "--per-token"


def trained(tmp_path: Path) -> nn.Module:
    model = task_class("words:Words")().model()
    (file,) = (tmp_path / "runs").glob("train-*/checkpoints/*.pt")
    model.load_state_dict(torch.load(file))
    return model.eval()


def gradients(model: nn.Module, names: list[str]) -> list[list[dict[str, Tensor]]]:
    """By training sample and token, the gradient of its part of the loss, text by text."""
    parameters, found = [model.get_parameter(name) for name in names], []
    texts: Any = task_class("words:Words")().train_data()
    for row in texts:
        logits = model(row[None])[0, :-1]
        losses = F.cross_entropy(logits, row[1:], reduction="none") / (len(row) - 1)
        of_row = []
        for loss in losses:
            parts = torch.autograd.grad(loss, parameters, retain_graph=True)
            of_row.append(dict(zip(names, parts, strict=True)))
        found.append(of_row)
    return found


def close(found: npt.NDArray[Any], expected: list[list[float]]) -> None:
    """Whether an array (N, T) has these numbers, and NaN behind them."""
    for row, numbers in zip(found, expected, strict=True):
        np.testing.assert_allclose(row[: len(numbers)], numbers, rtol=1e-5, atol=1e-9)
        assert np.isnan(row[len(numbers) :]).all()


def run_of(answer: Any, tmp_path: Path) -> Run:
    assert answer.code == 0, answer.err
    return Run.open(str(tmp_path / "runs"), answer.json["run"])


def test_scores_of_tokens_are_parts_of_the_score(
    infl: Infl, words: tuple[str, ...], tmp_path: Path
) -> None:
    asked = ("submit", "influence", *words, "--test", "0", "--test", "2", "--tokens", "0:2")
    answer = infl(*asked, "--damping", "0.1", "--batch-size", "5")
    run = run_of(answer, tmp_path)
    assert find_damage(run).damaged == {}
    scores_QN = np.asarray(run.array(SCORES))
    tokens_QNT = np.asarray(run.array(SCORES_OF_TOKENS))
    assert tokens_QNT.shape == (2, 12, TOKENS)
    np.testing.assert_allclose(np.nansum(tokens_QNT, 2), scores_QN, rtol=1e-12, atol=1e-15)
    s_test = Run(run.root, run.spec.s_tests[0])  # type: ignore[attr-defined]
    stored: Any = s_test.array(S_TEST).attrs["parameters"]
    names = [name for name, _ in stored]
    rows = gradients(trained(tmp_path), names)
    vectors_QP = torch.from_numpy(s_test.read_rows(S_TEST, 0, 2))
    for vector_P, found in zip(vectors_QP, tokens_QNT, strict=True):
        products = [
            [float(torch.cat([g.flatten() for g in of.values()]) @ vector_P) for of in row]
            for row in rows
        ]
        close(found, products)
    assert run.read_table("queries").column("region").to_pylist() == ["0:2", "0:2"]
    assert "test 0 (tokens 0:2): helpful" in infl("top", run.id, "--k", "2").out
    for row in infl("top", run.id, "--k", "3", "--json").json["top"][SCORES]:
        best = np.nanargmax if row["side"] == "helpful" else np.nanargmin
        assert row["token"] == best(tokens_QNT[{0: 0, 2: 1}[row["test"]], row["sample"]])
    assert infl("report", run.id, "--out", "report").code == 0
    assert "tokens 0:2" in (tmp_path / "report" / "report.html").read_text()
    with TestClient(make_viewer([run], "token"), "http://127.0.0.1") as client:
        assert client.get("/?token=token").status_code == 200
        assert "test 2, tokens 0:2" in client.get("/query?test=2&region=0%3A2").text


@pytest.mark.slow
def test_another_batch_pads_otherwise_and_gives_the_same_numbers(
    infl: Infl, words: tuple[str, ...], tmp_path: Path
) -> None:
    found = []
    for size in ("1", "12"):
        asked = ("submit", "influence", *words, "--test", "0", "--solver", "ek-fac")
        more = ("--relative", "theta", "--layer", "inner", "--models", "2")
        folder = ("--runs", f"runs-{size}")
        answer = infl(*asked, *more, "--damping", "0.1", "--batch-size", size, *folder)
        assert answer.code == 0, answer.err
        run = Run.open(str(tmp_path / f"runs-{size}"), answer.json["run"])
        found.append([np.asarray(run.array(name)) for name in (SCORES, SCORES_OF_TOKENS)])
        np.testing.assert_allclose(np.nansum(found[-1][1], 2), found[-1][0], rtol=1e-10)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)


def test_norms_of_tokens(infl: Infl, words: tuple[str, ...], tmp_path: Path) -> None:
    layers = ("--layer", "words", "--layer", "inner", "--layer", "rnn.weight_hh_l0")
    run = run_of(infl("submit", "grad-norms", *words, *layers, "--batch-size", "5"), tmp_path)
    assert find_damage(run).damaged == {}
    names = {
        "words": "words.weight",
        "inner": "inner.weight",
        "rnn.weight_hh_l0": "rnn.weight_hh_l0",
    }
    rows = gradients(trained(tmp_path), [*names.values()])
    for layer, name in names.items():
        found_NT = np.asarray(run.array(token_norms_name(layer)))
        assert found_NT.shape == (12, TOKENS)
        close(found_NT, [[float(of[name].norm()) for of in row] for row in rows])
    assert infl("top", run.id, "--k", "1").code == 0  # of whole samples, as without tokens
    assert infl("report", run.id, "--out", "report").code == 0


def test_norms_of_tokens_at_several_checkpoints(
    infl: Infl, words: tuple[str, ...], tmp_path: Path
) -> None:
    training = ("--task", "words:Words", "--epochs", "2", "--save-epoch", "1", "--local")
    assert infl("submit", "train", *training).code == 0
    of = ("--task", "words:Words", "--checkpoint", "train-words@all", "--layer", "inner")
    asked = ("submit", "grad-norms", *of, "--local", "--per-token", "--json")
    kept, summed = (run_of(infl(*asked, "--combine", how), tmp_path) for how in ("keep", "sum"))
    name = token_norms_name("inner")
    kept_KNT = np.asarray(kept.array(name))
    assert kept_KNT.shape == (2, 12, TOKENS)
    np.testing.assert_allclose(kept_KNT.sum(0), np.asarray(summed.array(name)), rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("grad-norms", "--layer", "inner", "--precision", "bfloat16-weights"), "leave one of"),
        (("influence", "--test", "0", "--solver", "identity", "--noise-draws", "2"), "one draw of"),
        (("influence", "--test", "0", "--precision", "bfloat16"), "too coarse for: leave one of"),
    ],
)
def test_what_tokens_do_not_go_with_is_refused(
    infl: Infl, words: tuple[str, ...], asked: tuple[str, ...], said: str
) -> None:
    answer = infl("submit", *asked, *words)
    assert answer.code == 2
    assert said in answer.err


def test_what_has_no_tokens_is_refused(infl: Infl, words: tuple[str, ...]) -> None:
    asked = ("submit", "grad-norms", "--task", "words:Counts", "--layer", "inner", "--per-token")
    answer = infl(*asked, "--epochs", "1", "--local")
    assert answer.code == 2
    assert "Counts has no tokens: leave --per-token out" in answer.err
    span = ("submit", "attribution", "--layer", "inner", "--test", "0", "--tokens", "0:1")
    answer = infl(*span, "--task", "words:Words", "--epochs", "1", "--local")
    assert answer.code == 2
    assert "attribution explains whole sequences: leave --tokens out" in answer.err
