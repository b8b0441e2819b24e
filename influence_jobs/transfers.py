"""Copies between the CPU and a GPU for which the program does not wait, where that is possible.

A copy from ordinary memory lets the program wait; one from pinned memory, which the system cannot
move, goes on by itself, in the order of what the GPU is given to do.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar, cast

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


class OfSteps(Generic[T]):
    """What each step of a training needs; for a GPU a thread fetches that of the next one.

    It keeps no function: one of its owner would keep that, and what it holds, in memory.

    Args:
        device: Of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._coming: dict[Hashable, Future[T]] = {}

    def of(
        self,
        step: Hashable,
        fetch: Callable[[], T],
        following: tuple[Hashable, Callable[[], T]] | None,
    ) -> T:
        """What is fetched for a step, known by a name, while that of `following` is begun."""
        if self._device.type == "cpu":
            return fetch()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1)
        if step not in self._coming:
            self._coming = {step: self._thread.submit(fetch)}
        found = self._coming.pop(step).result()
        if following is not None:
            name, fetch = following
            self._coming = {name: self._thread.submit(fetch)}
        return found
