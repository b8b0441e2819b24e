"""The processors of this machine."""

import os
from typing import Literal

from influence_jobs.errors import SpecError

# How often a thread of torch's libgomp looks for work before it sleeps. Its own 300,000 hold up the
# other threads where the machine has other work: small networks are ten times as slow. On an idle
# machine 10,000 are as fast.
SPINS = {"GOMP_SPINCOUNT": "10000"}
# glibc keeps large freed buffers: to give them back and fault them in again costs time.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
}

Device = Literal["auto", "cpu", "cuda"]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads of one torch operation: OMP_NUM_THREADS if it is set, as other programs count."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(asked)) if asked.isdecimal() and int(asked) else cores()


def spins() -> dict[str, str]:
    """How long idle threads wait, for an environment; nothing if the user has said it in ours."""
    return {} if {"OMP_WAIT_POLICY", *SPINS} & os.environ.keys() else SPINS


def let_idle_threads_sleep() -> None:
    """Set how long idle threads wait, unless the user has. Without effect once torch is loaded."""
    os.environ.update(spins())


def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch  # takes seconds: help and completion must not wait for it

    return torch.cuda.is_available()


def resolved(device: Device) -> Literal["cpu", "cuda"]:
    """The device that `auto` means on this machine; another one as it is.

    Raises:
        SpecError: The user wants CUDA and this machine has none.
    """
    if device == "auto":
        return "cuda" if has_cuda() else "cpu"
    if device == "cuda" and not has_cuda():
        raise SpecError(
            "--device cuda: torch finds no CUDA device on this machine; leave --device out, or "
            "see infl doctor"
        )
    return device
