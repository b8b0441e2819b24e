"""A real GPU: `pytest -m gpu`. It needs the library and torch, and neither Ray nor Zarr:

python -m pytest --noconftest -m gpu tests/pretend_gpu/test_card.py
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from influence_jobs import memory
from influence_jobs.curvature import ConjugateGradient, GaussNewton
from influence_jobs.gradients import GradNorms, ParameterSpace
from influence_jobs.gradients.rules import rule_of
from influence_jobs.transfers import ahead, numbers, on_cpu, on_device

from .networks import made
from .subjects import SUBJECTS
from .test_subjects import tensors

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield
    memory.share_gpu(1.0)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_the_numbers_are_those_of_the_cpu(subject):
    found, expected = (tensors(subject.start(device)(2)) for device in (CUDA, CPU))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.double().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "name", [n for n, s in SUBJECTS.items() if s.unit == "batch" and not s.most]
)
def test_a_batch_is_not_waited_for(name):
    """By torch's own watch, which does not know of copies from memory that is not pinned."""
    if SUBJECTS[name].once:
        pytest.skip("it begins anew for every count of batches")
    work = SUBJECTS[name].start(CUDA)
    work(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        work(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_iteration_of_conjugate_gradients_waits_once():
    task, model = made("convolutions", CUDA)
    space = ParameterSpace(model)
    operator = GaussNewton(model, space, task, torch.arange(48), batch_size=8)
    rhs_QP = torch.randn(3, space.size, device=CUDA)
    counts = []
    for most in (5, 5, 10):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                ConjugateGradient(1e-3, 1e-9, most).solve(operator, rhs_QP)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in seen))
    assert counts[2] - counts[1] <= 5


def test_copies_go_both_ways():
    x = on_device(torch.arange(3.0), CUDA)
    found = on_cpu({"a": x, "b": 2 * x})
    assert {name: t.tolist() for name, t in found.items()} == {"a": [0, 1, 2], "b": [0, 2, 4]}
    assert numbers(x) == [0, 1, 2]
    fetched = [*ahead(on_device(torch.full((2**20,), float(i)), CUDA) for i in range(4))]
    assert [float(t.mean()) for t in fetched] == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("reduction", ["kernel", "channel", "layer"])
def test_forms_of_a_convolution_agree(groups, reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)).eval()
    x = torch.randn(5, 6, 9, 8)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).sin().flatten(1).sum(1)

    found = []
    for device in (CPU, CUDA):
        with GradNorms(model.to(device), ["0"], losses, reduction=reduction) as engine:
            engine.check(x.to(device))
            found.append(engine(x.to(device))["0"].cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert rule_of(model[0]).by_grouped(CUDA) == (groups == 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("precision", "apart"), [("tf32", 3e-3), ("bfloat16", 3e-2)])
def test_lower_precisions_are_near_and_are_other_numbers(precision, apart, monkeypatch):
    task, model = made("perceptron", CUDA)
    batch = task.batch(torch.arange(48), None)  # type: ignore[arg-type]
    batch = batch[0].to(CUDA), batch[1].to(CUDA)
    found = []
    for kind in ("float32", precision):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
        with GradNorms(model, ["3"], task.losses, reduction="layer", precision=kind) as engine:
            engine.check(batch)
            found.append(engine(batch)["3"])
    error = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    assert 0 < error < apart


def test_out_of_memory_halves_the_batch_and_a_share_is_kept():
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(CUDA)[1]
    memory.share_gpu(2**30 / total)
    assert memory.free_bytes(CUDA) <= 2**30
    batching = memory.BatchSize(64)

    def take(ids: torch.Tensor, _: None) -> float:
        return float(torch.zeros(len(ids), 2**24, device=CUDA).sum())  # 64 MB a sample

    found = [*batching.map(take, [torch.arange(64)])]
    assert torch.cat([ids for ids, _ in found]).tolist() == [*range(64)]
    assert batching.size < 16
