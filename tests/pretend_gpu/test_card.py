"""A real GPU: `pytest -m gpu`. Where not all is installed that the other tests need, torch, numpy,
scipy, psutil, Pillow and pytest will do; without Zarr two tests are skipped:

python -m pytest -c /dev/null --rootdir . --import-mode importlib --noconftest -m gpu \\
    tests/pretend_gpu/test_card.py
"""

import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from influence_jobs import memory
from influence_jobs.curvature import ConjugateGradient, EkFac, GaussNewton
from influence_jobs.curvature.eigenvectors import MOST_AT_ONCE, eigh
from influence_jobs.curvature.output_roots import Doubts, exact_roots
from influence_jobs.gpu import tf32
from influence_jobs.gradients import GradDots, GradNorms, ParameterSpace
from influence_jobs.gradients.rules import rule_of
from influence_jobs.memory import Peak
from influence_jobs.tasks.output_loss import FORMS, which_forms_give
from influence_jobs.training.recipe import Recipe
from influence_jobs.training.train import Trainer
from influence_jobs.transfers import ahead, loader_for, numbers, on_cpu, on_device

from .networks import Digits, made
from .subjects import SUBJECTS
from .test_subjects import tensors
from .trainings import SGD

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with tf32(False):
        yield
    memory.share_gpu(1.0)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_the_numbers_are_those_of_the_cpu(subject):
    found, expected = (tensors(subject.start(device)(2)) for device in (CUDA, CPU))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.double().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-3 * scale)


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


def test_a_batch_of_ek_fac_waits_for_nothing():
    task, model = made("convolutions", CUDA)
    space = ParameterSpace(model)
    rhs_QP = torch.randn(3, space.size, device=CUDA)
    counts = []
    for samples in (16, 16, 48):
        operator = GaussNewton(model, space, task, torch.arange(samples), batch_size=8)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                EkFac(0.1).solve(operator, rhs_QP)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in seen))
    assert counts[2] == counts[1]


def test_copies_go_both_ways():
    x = on_device(torch.arange(3.0), CUDA)
    found = on_cpu({"a": x, "b": 2 * x})
    assert {name: t.tolist() for name, t in found.items()} == {"a": [0, 1, 2], "b": [0, 2, 4]}
    assert numbers(x) == [0, 1, 2]
    fetched = [*ahead(on_device(torch.full((2**20,), float(i)), CUDA) for i in range(4))]
    assert [float(t.mean()) for t in fetched] == [0, 1, 2, 3]
    table = torch.arange(60.0).view(3, 4, 5)
    for part in (
        table[:, ::2],
        table.mT,
        table[:1].expand(3, 4, 5),
        table[..., :0],
        table[0, 0, 0],
    ):
        torch.testing.assert_close(on_device(part, CUDA).cpu(), part)


def test_many_copies_in_advance_do_not_get_mixed_up():
    """Pinned memory is used anew for a later batch; a copy that is on its way must keep its own."""
    busy = torch.randn(4096, 4096, device=CUDA)
    sums = []
    for x in ahead(on_device(torch.full((2**18,), float(i)), CUDA) for i in range(200)):
        busy = busy @ busy.clamp(-1e-3, 1e-3)  # so that copies wait in a long line
        sums.append(x.sum(dtype=torch.float64))
    assert [total / 2**18 for total in numbers(sums)] == [*range(200)]


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
def test_lower_precisions_are_near_and_are_other_numbers(precision, apart):
    task, model = made("perceptron", CUDA)
    batch = task.batch(torch.arange(48), None)  # type: ignore[arg-type]
    batch = batch[0].to(CUDA), batch[1].to(CUDA)
    found = []
    for kind in ("float32", precision):
        with (
            tf32(kind == "tf32"),
            GradNorms(model, ["3"], task.losses, reduction="layer", precision=kind) as engine,
        ):
            engine.check(batch)
            found.append(engine(batch)["3"])
    error = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    assert 0 < error < apart


def products_off() -> list[float]:
    """How far products, convolutions and recurrences of float32 are from those of float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(2), nn.Linear(36, 64)).to(CUDA)
    rnn, x = nn.LSTM(64, 64).to(CUDA), torch.randn(8, 64, 8, 8, device=CUDA)

    def outputs() -> list[torch.Tensor]:
        return [model[0](x), model[2](x[:, :, :6, :6].flatten(2)), rnn(x[:, :, 0].mT)[0]]

    with torch.no_grad():
        found = outputs()
        model, rnn, x = model.double(), rnn.double(), x.double()
        wanted = outputs()
    pairs = zip(found, wanted, strict=True)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


def test_float32_is_float32_whatever_torch_was_told():
    generic: Any = torch.backends
    before = generic.fp32_precision
    generic.fp32_precision = "tf32"  # as a user's file may
    try:
        with tf32(False):
            assert max(products_off()) < 3e-5
        with tf32(True):
            assert max(products_off()[:2]) > 1e-4
    finally:
        generic.fp32_precision = before


def in_a_process(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program by itself: a process that has used its GPU, or has lost it, shows nothing."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_training_may_be_the_first_that_uses_the_gpu():
    done = in_a_process(
        "import torch\n"
        "from influence_jobs.training.train import seeded\n"
        "for index in (None, 0):\n"
        "    draws = []\n"
        "    for seed in (1, 1, 2):\n"
        "        with seeded(seed, torch.device('cuda', index)):\n"
        "            draws.append(torch.rand(3, device='cuda').tolist())\n"
        "    assert draws[0] == draws[1] != draws[2]\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_has_failed_is_told_from_other_errors():
    pytest.importorskip("zarr")
    done = in_a_process(
        "import os, torch\n"
        "from influence_jobs.kinds.runner import _gpu_failure, _kind, _line\n"
        "cuda, other = torch.device('cuda'), ValueError('its cause is elsewhere')\n"
        "table = torch.zeros(3, device=cuda)\n"
        "assert _gpu_failure(other, cuda) is None\n"
        "table[torch.tensor([7], device=cuda)]\n"
        "failure = _gpu_failure(other, cuda)\n"
        "assert _kind(failure) == 'worker', failure\n"
        "assert 'out of range' in _line(failure), _line(failure)\n"
        "os._exit(0)\n"  # in order it may not end any more
    )
    assert done.returncode == 0, done.stderr


def test_a_target_that_is_no_class_does_not_end_the_process():
    outputs = torch.randn(4, 3, 5, device=CUDA)
    targets = torch.tensor([[0, 1, 2, 0, 255]] * 4, device=CUDA)
    for shaped in (outputs, outputs.mT.contiguous()):
        assert not which_forms_give(
            torch.ones(4, device=CUDA), shaped, targets, FORMS["cross-entropy"]
        ).any()
    torch.cuda.synchronize()


@pytest.mark.parametrize("recipe", [SGD, Recipe(9, 8, "adam", lr=3e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize("network", ["convolutions", "perceptron"])
def test_a_training_repeats_bit_by_bit_also_if_it_stops(network, recipe):
    def trained(stop: int) -> dict[str, torch.Tensor]:
        task = Digits(network=network)
        trainer = Trainer(task, recipe, seed=3, device=CUDA)
        for step in range(12):
            if step == stop:
                state = trainer.state_dict()
                trainer = Trainer(task, recipe, seed=3, device=CUDA)
                trainer.load_state_dict(state)
            trainer.step()
        return trainer.model.state_dict()

    first = trained(stop=-1)
    for other in (trained(stop=-1), trained(stop=7)):
        for name, values in first.items():
            assert torch.equal(values, other[name]), name


def test_recurrent_layers_have_all_derivatives():
    """cuDNN has no backward in eval mode, and CUDA's fused cells have no forward mode."""
    pytest.importorskip("zarr")
    from influence_jobs.jobs.queries import query_gradients
    from influence_jobs.specs.queries import Queries, Query

    task, model = made("odd", CUDA)
    queries = Queries(items=(Query(test=1),))
    gradient_QP = query_gradients(task, model, ParameterSpace(model), queries, 0, 1)
    host_task, host = made("odd", CPU)
    wanted_QP = query_gradients(host_task, host, ParameterSpace(host), queries, 0, 1)
    torch.testing.assert_close(gradient_QP.cpu(), wanted_QP, rtol=1e-4, atol=1e-6)
    batch = tuple(part.to(CUDA) for part in task.batch(torch.arange(8), None))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that it is slow
        with GradDots(model, ParameterSpace(model), task.losses, gradient_QP) as dots:
            dots.total(batch)
        operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(16))
        operator.look()
    assert not operator._plain


def test_many_small_matrices_have_eigenvectors():
    rows = torch.randn(2 * MOST_AT_ONCE + 3, 3, 3, device=CUDA)
    moments = rows @ rows.mT
    values, vectors = eigh(moments)
    found = (vectors * values.unsqueeze(1)) @ vectors.mT
    torch.testing.assert_close(found, moments, rtol=1e-4, atol=1e-5)


def test_roots_of_many_samples():
    outputs = torch.randn(2 * MOST_AT_ONCE + 3, 3, device=CUDA)
    form, doubts = FORMS["cross-entropy"][0], Doubts()
    targets = torch.zeros(len(outputs), dtype=torch.int64, device=CUDA)
    roots = torch.stack([*exact_roots(form, outputs, targets, doubts)], dim=2)
    p = outputs.softmax(1)
    wanted = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(roots @ roots.mT, wanted, rtol=1e-4, atol=1e-6)


def test_matrices_of_low_rank_have_eigenvectors():
    rows = torch.randn(7, 3072, device=CUDA) * torch.logspace(0, -6, 3072, device=CUDA)
    moment = rows.t() @ rows
    values, vectors = eigh(moment)
    found = vectors * values @ vectors.t()
    assert float((found - moment).norm() / moment.norm()) < 1e-4


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


def test_out_of_memory_in_a_backward_pass_or_in_the_thread_that_fetches_leaves_nothing():
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(CUDA)[1]
    memory.share_gpu(2**30 / total)
    weight = torch.ones(2**22, device=CUDA, requires_grad=True)  # 16 MB
    gc.collect()  # what other tests have left
    before = torch.cuda.memory_allocated(CUDA)
    for heavy in ("work", "fetch"):
        batching = memory.BatchSize(64)

        def fetch(ids: torch.Tensor, heavy: str = heavy) -> torch.Tensor:
            return torch.ones(len(ids), 2**22 if heavy == "fetch" else 1, device=CUDA)

        def work(ids: torch.Tensor, x: torch.Tensor, heavy: str = heavy) -> float:
            loss = (x * weight).sin().exp().sum() if heavy == "work" else (x.sum() * weight[0])
            (gradient,) = torch.autograd.grad(loss, weight)
            return float(gradient[0])

        found = [*batching.map(work, [torch.arange(64)], fetch=fetch, loader=loader_for(CUDA))]
        assert torch.cat([ids for ids, _ in found]).tolist() == [*range(64)]
        assert batching.size < 64
        assert torch.cuda.memory_allocated(CUDA) <= before


def test_what_torch_keeps_for_later_is_free():
    torch.cuda.empty_cache()
    before = memory.free_bytes(CUDA)
    peak = Peak(CUDA)
    kept = torch.empty(2**28, device=CUDA)  # 1 GB
    assert before - memory.free_bytes(CUDA) >= kept.nbytes
    assert peak.bytes == kept.nbytes
    del kept
    assert before - memory.free_bytes(CUDA) < 2**26
