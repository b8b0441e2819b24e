"""What a forward pass needs so that torch can differentiate it in every way that we ask for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def all_derivatives(model: nn.Module) -> Iterator[None]:
    """Run a model by kernels that have forward-mode and second derivatives; they may be slower.

    Fused attention kernels have neither. Nor have the recurrent layers of oneDNN and cuDNN, which
    are switched off for models with such layers alone: convolutions are faster by them.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(without_fused_transformers())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def without_fused_transformers() -> Iterator[None]:
    """Without the fused kernels of frozen transformers, which call no layer and no derivative."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
