"""What a forward pass needs so that torch can differentiate it in every way that we ask for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
            stack.enter_context(_switched_off(torch.backends.mkldnn))
            stack.enter_context(_switched_off(torch.backends.cudnn))
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


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels that call every layer and have a backward in eval mode.

    Fused transformers call no layer. cuDNN's recurrent networks have no backward in eval mode.
    """
    with ExitStack() as stack:
        stack.enter_context(without_fused_transformers())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_switched_off(torch.backends.cudnn))
        yield


@contextmanager
def mappable_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels that torch can map over samples: no fused attention, no oneDNN.

    Recurrent layers write into the initial state that they make themselves, which is none of a
    sample's: they are given one.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_switched_off(torch.backends.mkldnn))
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                hook = module.register_forward_pre_hook(_with_state, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _with_state(module: nn.RNNBase, args: Any, kwargs: dict[str, Any]) -> Any:
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    inputs = given["input"]
    if given.get("hx") is not None or not isinstance(inputs, Tensor) or inputs.ndim != 3:
        return None
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = inputs.shape[0 if module.batch_first else 1]
    state = inputs.new_zeros(layers, batch, module.proj_size or module.hidden_size)
    if module.mode == "LSTM":
        return (inputs, (state, inputs.new_zeros(layers, batch, module.hidden_size))), {}
    return (inputs, state), {}


@contextmanager
def _switched_off(backend: Any) -> Iterator[None]:
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before
