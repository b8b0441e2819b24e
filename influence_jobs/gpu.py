"""How torch computes on a GPU: settings that hold for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from influence_jobs.errors import RuntimeFault, first_line

UNUSABLE = "the GPU cannot compute"  # how the message begins, of which another GPU knows nothing


def require_usable(device: torch.device) -> None:
    """Compute something on a GPU.

    Raises:
        RuntimeFault: It cannot: it is broken, all of its memory is taken, or torch is not for it.
    """
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        raise RuntimeFault(
            f"{UNUSABLE} ({first_line(error)}): see infl doctor, or take --device cpu"
        ) from error


def in_tf32() -> bool:
    """Whether GPUs round the factors of float32 products to TF32, as torch is set now."""
    # `allow_tf32` raises an error where a program uses both ways of torch to set it.
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def may_round(device: torch.device) -> bool:
    """Whether float32 may be rounded to TF32 there: torch lets convolutions be, unless told not."""
    cudnn: Any = torch.backends.cudnn
    settings = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    return device.type == "cuda" and any(one.fp32_precision == "tf32" for one in settings)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """In this block GPUs may round float32 products to TF32, or not: by default some do.

    Besides, cuDNN computes the same numbers each time. Else it adds some sums in any order, and
    `benchmark` chooses among its algorithms by time.
    """
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    # The older setting of each, and what is set in its place since torch 2.9.
    settings = {products: [products], cudnn: [cudnn.conv, cudnn.rnn]}
    before = {one: one.fp32_precision for of in settings.values() for one in of}
    older = {backend: _allows(backend, before[of[0]]) for backend, of in settings.items()}
    repeats = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    for backend, of in settings.items():
        backend.allow_tf32 = allowed
        for one in of:  # which else follow those of all backends together
            one.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = repeats
        for backend, of in settings.items():
            backend.allow_tf32 = older[backend]
            for one in of:
                one.fp32_precision = before[one]


def _allows(backend: Any, precision: str) -> bool:
    """The older setting, which can be read only where the newer one is the same."""
    try:
        allowed: bool = backend.allow_tf32
    except RuntimeError:
        return precision != "tf32"
    return allowed
