"""Pinned memory: how much of it is taken, and for what."""

import torch
from torch import Tensor

from influence_jobs.training.ensemble_data import fixed_samples
from influence_jobs.transfers import on_device

from .networks import Digits
from .pretend import PretendGpu, PretendTensor


def pinned(gpu: PretendGpu) -> list[int]:
    """Bytes of each piece so far."""
    return [one.untyped_storage().nbytes() for one in gpu._pinned.values()]


def values(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, PretendTensor)
    return tensor.held


def test_a_part_of_a_table_takes_no_more_pinned_memory_than_its_own(gpu):
    table = torch.arange(6000.0).view(20, 300)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for part in (table[:, :2], table[::5], table.t(), table[:1].expand(4, 300), images):
        before = len(pinned(gpu))
        torch.testing.assert_close(values(on_device(part, gpu.device)), part)
        assert pinned(gpu)[before:] == [part.nbytes]
    assert values(on_device(images, gpu.device)).stride() == images.stride()  # as it was


def test_a_training_set_that_stays_on_the_device_takes_none(gpu):
    task = Digits()
    found = fixed_samples(task, gpu.device)
    assert found is not None
    torch.testing.assert_close(values(found[0]), task.x)
    assert pinned(gpu) == []
