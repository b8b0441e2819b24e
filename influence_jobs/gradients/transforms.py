"""What a forward pass needs so that torch can differentiate it in every way that we ask for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def all_derivatives(model: nn.Module) -> Iterator[None]:
    """Run a model by kernels that have forward-mode and second derivatives; they may be slower.

    Fused attention kernels have neither. Nor have the recurrent layers of oneDNN and cuDNN, which
    are switched off for models with such layers alone: convolutions are faster by them. What CUDA
    has in their place knows no forward mode either, so it is made of plain operations.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(without_fused_transformers())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_switched_off(torch.backends.mkldnn))
        stack.enter_context(_plain_recurrence(model))
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
    """Kernels that torch can map over samples: no fused attention, no oneDNN, no fused recurrence.

    Recurrent layers write into the initial state that they make themselves, which is none of a
    sample's: they are given one.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_switched_off(torch.backends.mkldnn))
        stack.enter_context(_plain_recurrence(model))
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


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers of a GPU by plain operations: no cuDNN, no fused cells."""
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
    with ExitStack() as stack:
        if recurrent:
            stack.enter_context(_switched_off(torch.backends.cudnn))
            if _has_fused_cells(next(recurrent[0].parameters())):
                stack.enter_context(_PlainCells())
        yield


class _PlainCells(TorchFunctionMode):
    """LSTM and GRU by torch's own formulas for them, as on a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CELLS:
            return _CELLS[name](*args)
        if name in _LAYERS and len(args) == 9:
            packed = not isinstance(args[2], list)  # there the weights follow the input's sizes
            dropout, train = args[5 + packed : 7 + packed]
            if not (dropout and train):  # the formulas leave dropout out
                return _LAYERS[name][packed](*args)
        return func(*args, **(kwargs or {}))


def _has_fused_cells(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _lstm_cell(x: Tensor, state: Any, w_x: Tensor, w_h: Tensor, b_x: Any, b_h: Any) -> Any:
    h, c = state
    gates = F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)
    enters, keeps, new, leaves = gates.chunk(4, 1)
    c = keeps.sigmoid() * c + enters.sigmoid() * new.tanh()
    return leaves.sigmoid() * c.tanh(), c


def _gru_cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Any, b_h: Any) -> Tensor:
    resets, keeps, new = F.linear(x, w_x, b_x).chunk(3, 1)
    h_resets, h_keeps, h_new = F.linear(h, w_h, b_h).chunk(3, 1)
    new = (new + (resets + h_resets).sigmoid() * h_new).tanh()
    return new + (keeps + h_keeps).sigmoid() * (h - new)


_CELLS: dict[str, Any] = {"lstm_cell": _lstm_cell, "gru_cell": _gru_cell}
_LAYERS: dict[str, list[Any]] = {
    name: [*get_decompositions([overloads.input, overloads.data]).values()]
    for name, overloads in (("lstm", torch.ops.aten.lstm), ("gru", torch.ops.aten.gru))
}
