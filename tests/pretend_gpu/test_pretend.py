"""The pretended GPU itself: it computes what a CPU does, refuses mixtures, and counts waits."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from influence_jobs.transfers import ahead, numbers, on_cpu, on_device

from .networks import Tied
from .pretend import DeviceMismatch, PretendGpu, PretendTensor


def on(gpu: PretendGpu, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(gpu.device)


def test_it_computes_what_a_cpu_computes(gpu):
    model, x = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh()),
        torch.randn(3, 1, 5, 5),
    )
    other = copy.deepcopy(model).to(gpu.device)
    for network, of in ((model, x), (other, x.to(gpu.device))):
        network(of).square().sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(theirs.grad, PretendTensor)
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad)
    torch.testing.assert_close(other[1].running_mean.cpu(), model[1].running_mean)


@pytest.mark.parametrize(
    "mix",
    [
        lambda gpu: on(gpu, 3) + torch.ones(3),
        lambda gpu: torch.ones(2, 3) @ on(gpu, 3, 2),
        lambda gpu: torch.ones(3)[torch.zeros(1, dtype=torch.long, device=gpu.device)],
        lambda gpu: on(gpu, 3).index_select(0, torch.zeros(1, dtype=torch.long)),
        lambda gpu: torch.stack([on(gpu, 1)[0], torch.tensor(1.0)]),
        lambda gpu: on(gpu, 3).index_put_((torch.arange(2),), torch.ones(2)),
        lambda gpu: nn.Linear(3, 2)(on(gpu, 1, 3)),
    ],
)
def test_tensors_of_the_cpu_are_refused(gpu, mix):
    with pytest.raises(DeviceMismatch):
        mix(gpu)


def test_numbers_of_the_cpu_and_indices_are_taken(gpu):
    x = on(gpu, 3)
    assert isinstance(x * torch.tensor(2.0), PretendTensor)
    with gpu.counting() as waits:
        x[torch.tensor([0, 2])].sum()
        x[1] = torch.tensor(0.0)
    assert [wait.kind for wait in waits] == ["upload", "upload"]  # indices, and the number


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("read", lambda x: float(x[0])),
        ("read", lambda x: x.tolist()),
        ("read", lambda x: bool((x > 0).any())),
        ("read", lambda x: x.nonzero()),
        ("read", lambda x: x[x > 0]),
        ("read", lambda x: torch.equal(x, x)),
        ("read", lambda x: torch.linalg.eigh(torch.outer(x, x))),
        ("download", lambda x: x.cpu()),
        ("download", lambda x: torch.zeros(3).copy_(x)),
        ("download", lambda x: torch.save(x, io.BytesIO())),
        ("upload", lambda x: torch.tensor([1.0], device=x.device)),
        ("upload", lambda x: torch.ones(3).to(x.device)),
        ("upload", lambda x: torch.ones(3).to(x.device, non_blocking=True)),  # not pinned
        ("upload", lambda x: x.copy_(torch.ones(3))),
    ],
)
def test_what_waits_is_noted(gpu, kind, act):
    x = on(gpu, 3)
    with gpu.counting() as waits:
        act(x)
    assert [wait.kind for wait in waits] == [kind]


def test_what_does_not_wait_is_not_noted(gpu):
    x, pinned = on(gpu, 3), torch.ones(3).pin_memory()
    with gpu.counting() as waits:
        x.add_(pinned.to(gpu.device, non_blocking=True))
        torch.where(x > 0, x, 0.0).sum().sqrt().expand(2).clone()
        torch.zeros(2, device=gpu.device).add_(x.max())
        x.to("cpu", non_blocking=True)
        torch.empty(3, device="meta")
    assert waits == []


def test_a_copy_holds_nothing_before_the_program_waits(gpu):
    x = on(gpu, 3)
    copied = x.to("cpu", non_blocking=True)
    assert copied.isnan().all()
    torch.accelerator.synchronize()
    torch.testing.assert_close(copied, x.cpu())


def test_a_wait_says_where_it_is(gpu):
    numbers([on(gpu, 1)[0]])
    assert "transfers.py" in str(gpu.waits[-1])


def test_threads_are_on_the_device_too(gpu):
    threads = set()

    def items():
        for i in range(2):
            threads.add(threading.get_ident())
            yield torch.ones(2).to(gpu.device) + i

    assert [one.tolist() for one in ahead(items())] == [[1, 1], [2, 2]]
    assert threading.get_ident() not in threads


def test_a_model_keeps_the_weights_that_are_shared(gpu):
    model = Tied().to(gpu.device)
    assert model.first.weight is model.second.weight
    again = copy.deepcopy(model)
    assert again.first.weight is again.second.weight
    assert again.first.weight is not model.first.weight


def test_copies_both_ways_wait_once(gpu):
    with gpu.counting() as waits:
        x = on_device(torch.arange(3.0), gpu.device)
    assert waits == []
    with gpu.counting() as waits:
        found = on_cpu({"a": x, "b": x + 1, "here": torch.ones(1)})
    assert [wait.kind for wait in waits] == ["download"]
    assert {name: t.tolist() for name, t in found.items()} == {
        "a": [0, 1, 2], "b": [1, 2, 3], "here": [1]
    }  # fmt: skip
    with gpu.counting() as waits:
        assert numbers(x + 1) == [1, 2, 3]
    assert len(waits) == 1
