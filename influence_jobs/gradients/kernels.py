"""Which of torch's kernels a pass may use: fused ones lack hooks, derivatives or a batched form."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels that call every layer and have a backward in eval mode.

    Fused transformers call no layer. cuDNN's recurrent networks have no backward in eval mode.
    """
    with ExitStack() as stack:
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_switched_off(torch.backends.cudnn))
        yield


@contextmanager
def mappable_kernels() -> Iterator[None]:
    """Kernels that torch can map over samples: no fused attention, no oneDNN."""
    with sdpa_kernel(SDPBackend.MATH), _switched_off(torch.backends.mkldnn):
        yield


@contextmanager
def _switched_off(backend: Any) -> Iterator[None]:
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before
