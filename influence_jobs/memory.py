"""What memory a worker has and takes, and batches that are halved where it does not suffice."""

import gc
import logging
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from influence_jobs.devices import cores
from influence_jobs.errors import DataError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

# What torch's allocators say: that of CPUs has no type of its own for it, nor have the libraries of
# CUDA. Without memory these cannot be initialised, and no algorithm of cuDNN finds its workspace.
_SAID = re.compile(
    r"not enough memory: you tried to allocate|can't allocate memory: you tried to allocate"
    r"|CUDA (?:driver error: |error: )?out of memory"
    r"|CU(?:BLAS|SOLVER|SPARSE|DNN)_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED|CUFFT_ALLOC_FAILED"
    r"|was unable to find an engine to execute this computation"
)
_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
_USED = "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a CPU or a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))


_gpu_share = 1.0


def share_gpu(share: float) -> None:
    """Let this process take no more than a part of its GPU's memory, as others share the GPU.

    What goes beyond is out of memory, for which batches are halved.
    """
    global _gpu_share
    _gpu_share = share
    torch.cuda.set_per_process_memory_fraction(share)


def gpu_share() -> float:
    """The part of its GPU's memory that this process may take."""
    return _gpu_share


def free_bytes(device: torch.device) -> int:
    """Memory that this worker can still take: of its GPU, or its part of the machine's."""
    if device.type == "cuda":
        gc.collect()  # models of earlier runs of this process, which their own hooks hold
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.memory_allocated(device)
        kept = torch.cuda.memory_reserved(device) - taken  # what torch has and does not use
        return min(free + kept, int(_gpu_share * total) - taken)
    available: int = psutil.virtual_memory().available
    for limit, used in zip(_LIMITS, _USED, strict=True):
        with suppress(OSError, ValueError):  # a container's own limit; `max` is none
            taken = int(_text(used)) - _cached(str(Path(used).with_name("memory.stat")))
            available = min(available, int(_text(limit)) - taken)
    workers = max(1, cores() // torch.get_num_threads())
    return max(0, available) // workers


def _cached(path: str) -> int:
    """Of what a container takes, the files that were read and can be forgotten."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(path), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(path: str) -> str:
    return Path(path).read_text().strip()


class Peak:
    """The most memory that is taken from now on, beyond what is taken now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # Linux: begin anew
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident()

    @property
    def bytes(self) -> int:
        """Of this process or its GPU. Where a system keeps one peak for ever, 0 below that."""
        return max(0, self.most - self._before)

    @property
    def most(self) -> int:
        """The same with what was taken before."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _most_resident()


def _resident() -> int:
    rss: int = psutil.Process().memory_info().rss
    return rss


def _most_resident() -> int:
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", _text("/proc/self/status"), re.MULTILINE):
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class BatchSize:
    """The samples of a batch: as many as asked for, and half as many whenever they do not fit.

    Args:
        asked: To begin with.

    Attributes:
        size: Now.
    """

    def __init__(self, asked: int) -> None:
        self.asked = self.size = asked
        self._said = ""  # by what did not fit last

    def map(
        self,
        function: Callable[[Tensor, Any], T],
        groups: Iterable[Tensor],
        *,
        fetch: Callable[[Tensor], Any] = lambda ids: None,
        loader: Callable[[Iterator[Any]], Iterator[Any]] = iter,
        most: int | None = None,
    ) -> Iterator[tuple[Tensor, T]]:
        """Apply a function to samples in batches that fit into memory.

        A function that runs out of memory is called anew with half of its samples, so it must not
        have kept anything of the first call; later batches are as small.

        Args:
            function: Of ids and what `fetch` gave for them.
            groups: Ids (n,), or anything whose first axis is the samples. No batch has samples of
                two groups.
            fetch: Of ids, such as the samples themselves.
            loader: Passes on what was fetched, perhaps in advance.
            most: The largest size, where that is less.

        Yields:
            The ids of a batch, and what the function gave for them.

        Raises:
            DataError: One sample alone does not fit.
        """
        for ids, fetched in loader(self._fetched(groups, fetch, most)):
            yield from self._applied(function, fetch, ids, fetched)

    def _fetched(
        self, groups: Iterable[Tensor], fetch: Callable[[Tensor], Any], most: int | None
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        for ids in groups:
            start = 0
            while start < len(ids):
                piece = ids[start : start + min(self.size, most or self.size)]
                yield piece, self._tried(fetch, piece)
                start += len(piece)

    def _applied(
        self,
        function: Callable[[Tensor, Any], T],
        fetch: Callable[[Tensor], Any],
        ids: Tensor,
        fetched: list[Any],
    ) -> Iterator[tuple[Tensor, T]]:
        found: list[T] = []
        if fetched and len(ids) <= self.size:
            found = self._tried(lambda ids: function(ids, fetched[0]), ids)
        if found:
            yield ids, found[0]
            return
        fetched.clear()
        if len(ids) <= self.size:
            self.halve(ids)
        for piece in torch.split(ids, self.size):
            yield from self._applied(function, fetch, piece, self._tried(fetch, piece))

    def _tried(self, function: Callable[[Tensor], T], ids: Tensor) -> list[T]:
        """What a function gives, or nothing if that does not fit into memory."""
        try:
            return [function(ids)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._said = first_line(error)
            return []

    def halve(self, ids: Tensor) -> None:
        """Go on with half as many samples as these, which did not fit.

        Raises:
            DataError: It is one.
        """
        gc.collect()  # what the failed call has left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(ids) == 1:
            # Which cuDNN says without memory, and of what it cannot compute at all.
            why = f" ({self._said})" if "engine" in self._said else ""
            raise DataError(
                f"out of memory with sample {int(ids.flatten()[0])} alone{why}: choose fewer "
                "layers (--layer), fewer queries, or a machine or GPU with more memory"
            )
        self.size = -(-len(ids) // 2)
        log.warning(
            "out of memory with a batch of %d samples: going on with %d", len(ids), self.size
        )
