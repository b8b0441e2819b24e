"""Scores of models in any dtype, against a dense solve in float64 of the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import S_TEST, SCORES
from influence_jobs.store.run import Run
from influence_jobs.tasks.registry import task_class

Infl = Callable[..., Any]
DAMPING = 0.01

TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs import Task


class Classes(Task):
    output_loss = "cross-entropy"
    dtype = torch.DTYPE

    def _data(self, rows, seed):
        x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x.to(self.dtype), x[:, :3].argmax(1))

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(self.dtype)

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


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], str]:
    def make(dtype: str) -> str:
        (tmp_path / f"classes_{dtype}.py").write_text(TASK.replace("DTYPE", dtype))
        return f"classes_{dtype}:Classes"

    return make


def dense(name: str, run: Run, tests: list[int]) -> Tensor:
    """The influence of every training sample, in float64, by matrices."""
    task: Any = task_class(name)()
    assert isinstance(run.spec, InfluenceSpec)
    model = task.model()
    load_checkpoint(model, run.root, run.spec.s_tests[0].checkpoint)
    model = model.double().eval()
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    (x, y), (x_test, y_test) = task.train_data().tensors, task.test_data().tensors

    def flat(parts: dict[str, Tensor], leading: int) -> Tensor:
        return torch.cat([part.flatten(leading) for part in parts.values()], dim=-1)

    def losses(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="none")

    x, x_test = x.double(), x_test[tests].double()
    gradients_NP = flat(jacrev(losses)(parameters, x, y), 1)
    queries_QP = flat(jacrev(losses)(parameters, x_test, y_test[tests]), 1)
    jacobian_NCP = flat(jacrev(lambda p: functional_call(model, p, (x,)))(parameters), 2)
    p_NC = model(x).softmax(1).detach()
    inner_NCC = torch.diag_embed(p_NC) - p_NC[:, :, None] * p_NC[:, None]
    curvature = torch.einsum("ncp,ncd,ndq->pq", jacobian_NCP, inner_NCC, jacobian_NCP) / len(x)
    damped = curvature + DAMPING * torch.eye(len(curvature), dtype=torch.float64)
    return queries_QP @ torch.linalg.solve(damped, gradients_NP.T)


@pytest.mark.parametrize(
    ("dtype", "words", "stored", "limit"),
    [
        ("bfloat16", (), "float32", 1e-5),
        ("float16", (), "float32", 1e-5),
        ("float32", (), "float32", 1e-5),
        ("float64", (), "float64", 1e-9),
        ("float32", ("--precision", "float64"), "float64", 1e-9),
        ("float16", ("--precision", "float64"), "float64", 1e-9),
        ("float64", ("--precision", "float32"), "float32", 1e-5),
    ],
)
def test_scores_are_those_of_the_weights_whatever_their_dtype(
    infl: Infl,
    made: Callable[[str], str],
    tmp_path: Path,
    dtype: str,
    words: tuple[str, ...],
    stored: str,
    limit: float,
) -> None:
    name, tests = made(dtype), [3, 0]
    asked = ("submit", "influence", "--local", "--epochs", "1", "--task", name)
    solver = ("--damping", DAMPING, "--tolerance", "1e-12" if stored == "float64" else "1e-6")
    answer = infl(*asked, "--test", "3", "--test", "0", *solver, *words, "--json")
    assert answer.code == 0, answer.err
    run = Run.open(str(tmp_path / "runs"), answer.json["run"])
    scores = run.array(SCORES)
    assert scores.dtype == stored
    assert isinstance(run.spec, InfluenceSpec)
    assert Run(run.root, run.spec.s_tests[0]).array(S_TEST).dtype == stored
    expected = dense(name, run, tests)
    error = (torch.from_numpy(np.asarray(scores)).double() - expected).abs().max()
    assert error <= limit * expected.abs().max()
    assert infl("verify", answer.json["run"]).code == 0


@pytest.mark.parametrize("words", [(), ("--relative", "theta", "--solver", "ek-fac")])
def test_samples_in_bfloat16_meet_vectors_of_float32(
    infl: Infl, made: Callable[[str], str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    local = ("submit", "influence", "--local", "--epochs", "1", "--task", made("float32"))
    asked = (*local, "--test", "3", "--damping", DAMPING, "--json", *words)
    both = [infl(*asked), infl(*asked, "--precision", "bfloat16")]
    assert [answer.code for answer in both] == [0, 0], both[1].err
    runs = [Run.open(str(tmp_path / "runs"), answer.json["run"]) for answer in both]
    specs = [run.spec for run in runs if isinstance(run.spec, InfluenceSpec)]
    assert specs[0].s_tests == specs[1].s_tests  # nothing is solved in bfloat16
    assert specs[0].run_id != specs[1].run_id
    full, rough = (np.asarray(run.array(SCORES)) for run in runs)
    error = np.abs(full - rough).max() / np.abs(full).max()
    assert 1e-5 < error < 0.02
    found = infl(
        "submit", "influence", "--local", "--s-test", specs[0].s_tests[0].run_id,
        "--precision", "bfloat16", "--json", *words[:2],
    )  # fmt: skip
    assert found.json["run"] == specs[1].run_id


@pytest.mark.parametrize(
    ("dtype", "words", "said"),
    [
        ("float64", ("influence",), "goes with s_test vectors of float32, and those of"),
        ("float32", ("s-test",), "--precision bfloat16 is not for this"),
        ("float32", ("self-influence",), "--precision bfloat16 is not for this"),
        ("float32", ("baseline", "--method", "loss"), "--precision bfloat16 is not for this"),
    ],
)
def test_where_bfloat16_does_harm_it_is_refused(
    infl: Infl, made: Callable[[str], str], dtype: str, words: tuple[str, ...], said: str
) -> None:
    asked = ("--local", "--epochs", "1", "--task", made(dtype), "--precision", "bfloat16")
    more = () if words == ("self-influence",) else ("--test", "3")
    answer = infl("submit", *words, *asked, *more)
    assert (answer.code, said in answer.err) == (2, True), answer.err


def test_a_dot_product_is_computed_in_bfloat16(
    infl: Infl, made: Callable[[str], str], tmp_path: Path
) -> None:
    local = ("submit", "baseline", "--method", "dot-product", "--local", "--epochs", "1")
    asked = (*local, "--task", made("float32"), "--test", "3", "--json")
    ids = [infl(*asked, *more).json["run"] for more in ((), ("--precision", "bfloat16"))]
    full, rough = (np.asarray(Run.open(str(tmp_path / "runs"), i).array(SCORES)) for i in ids)
    assert 1e-5 < np.abs(full - rough).max() / np.abs(full).max() < 0.02


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float64"])
def test_every_kind_of_run_takes_a_model_in_another_dtype(
    infl: Infl, made: Callable[[str], str], dtype: str
) -> None:
    name = made(dtype)
    check = infl("check", name)
    assert check.code == 0, check.out
    # Going back through the training needs the precision that half has not.
    refused = [line for line in check.out.splitlines() if "refused" in line]
    assert all("unrolled" in line and "of bfloat16" in line for line in refused)
    one = ("--local", "--epochs", "1", "--task", name, "--test", "3")
    for asked in (
        ("attribution",),
        ("baseline", "--method", "loss"),
        ("s-test", "--solver", "lissa", "--damping", "0.5", "--repeats", "1"),
        ("influence", "--solver", "ek-fac", "--relative", "theta"),
        ("ablation", "--by", "random", "--k", "5", "--mode", "remove"),
    ):
        answer = infl("submit", *asked, *one)
        assert answer.code == 0, (asked, answer.err)


def test_the_precision_of_the_model_is_the_same_baseline(
    infl: Infl, made: Callable[[str], str]
) -> None:
    asked = ("submit", "baseline", "--method", "loss", "--task", made("float64"), "--test", "3")
    words = ((), ("--precision", "float64"), ("--precision", "float32"))
    runs = [infl(*asked, "--epochs", "1", "--local", "--json", *more).json["run"] for more in words]
    assert runs[0] == runs[1] != runs[2]


def test_a_forward_that_insists_on_half_precision_is_refused_by_name(
    infl: Infl, tmp_path: Path
) -> None:
    name = "insists:Classes"
    text = TASK.replace("DTYPE", "bfloat16").replace(
        "model(batch[0])", "model(batch[0].to(torch.bfloat16))"
    )
    (tmp_path / "insists.py").write_text(text)
    for kind in ("influence", "attribution"):
        answer = infl("submit", kind, "--local", "--epochs", "1", "--task", name, "--test", "3")
        assert answer.code == 2
        assert "Sequential is built in bfloat16 and does not run in float32" in answer.err
        assert "Traceback" not in answer.err
    assert "is built in bfloat16 and does not run" in infl("check", name).out
