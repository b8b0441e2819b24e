"""Which of torch's kernels a pass may use: fused ones lack hooks, derivatives or a batched form."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
