"""Copies between the CPU and a GPU for which the program does not wait, where that is possible.

A copy from ordinary memory lets the program wait; one from pinned memory, which the system cannot
move, goes on by itself, in the order of what the GPU is given to do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to a GPU is of pinned memory, and nothing waits for it."""
    if device.type == "cpu" or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor.to(device)
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        # Pinned memory would span what lies between, and a copy of a part of it is waited for.
        tensor = tensor.contiguous()
    return tensor.pin_memory().to(device, non_blocking=True)


def on_cpu(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Tensors on the CPU. Those of a GPU are copied together, and the program waits once."""
    copies = {
        name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()
    }
    waiting = {t.device for t in tensors.values() if t.device.type != "cpu"}
    for device in waiting:
        torch.accelerator.synchronize(device)  # before that the copies hold anything
    return copies


def numbers(scalars: Iterable[Tensor]) -> list[float]:
    """Scalars of one device as numbers: the program waits once for all of them."""
    found = [*scalars]
    return torch.stack([scalar.double() for scalar in found]).tolist() if found else []


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a second thread makes each item while the previous one is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(T, item)


def loader_for(device: torch.device) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """What passes on batches for a device: for a GPU, a thread fetches the next one in advance."""
    # On a CPU the thread would slow the computation down.
    return iter if device.type == "cpu" else ahead
