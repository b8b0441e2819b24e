"""Recognise perceptrons, and compute the inputs of their first layer."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from influence_jobs.tasks.base import Batch, Task
from influence_jobs.tasks.placement import copy_of


@dataclass(frozen=True)
class Perceptron:
    """A multilayer perceptron: linear layers with ReLU between them. The last one gives the logits.

    Attributes:
        linears: Names of the L layers, in order.
        dropouts: Probability p of the dropout after each of the L - 1 ReLUs; 0 means no dropout.
    """

    linears: tuple[str, ...]
    dropouts: tuple[float, ...]

    @property
    def parameters(self) -> set[str]:
        """Names of all weights and biases."""
        return {f"{linear}.{kind}" for linear in self.linears for kind in ("weight", "bias")}


def find_perceptron(model: nn.Module) -> Perceptron | None:
    """Recognise a perceptron by its traced forward pass; None if the model is anything else.

    The operations form one straight line. The model may flatten its input. Then follow Linear, ReLU
    and possibly Dropout, any number of times, and a last Linear, possibly with log-softmax over the
    classes. Every linear layer has a bias, is trained and occurs once. Nothing else has parameters.
    """
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    if any(type(owner) is not nn.Linear for owner in owners):
        return None
    try:
        # Of a copy: what its forward keeps in the model would stay there as fx's stand-ins.
        nodes = list(fx.symbolic_trace(copy_of(model)).graph.nodes)
    except Exception:  # noqa: BLE001  (tracing fails on control flow and more, with any error)
        return None
    modules = dict(model.named_modules())
    steps = [node for node in nodes if node.op not in ("placeholder", "output")]
    line = [nodes[0], *steps, nodes[-1]]
    if any(after.all_input_nodes != [before] for before, after in pairwise(line)):
        return None
    state, linears, dropouts = "input", [], []
    for node in steps:
        state = _GRAMMAR.get((state, _word(node, modules)), "")
        if state == "linear":
            linears.append(str(node.target))
        elif state == "relu":
            dropouts.append(0.0)
        elif state == "dropout":
            dropouts[-1] = float(modules[str(node.target)].p)
        elif not state:
            return None
    if state not in ("linear", "end") or len(set(linears)) < len(linears):
        return None
    perceptron = Perceptron(tuple(linears), tuple(dropouts))
    parameters = dict(model.named_parameters())
    trained = all(parameter.requires_grad for parameter in parameters.values())
    return perceptron if trained and perceptron.parameters == set(parameters) else None


# (last operation, next operation): the next state.
_GRAMMAR = {
    ("input", "flatten"): "input",
    ("input", "linear"): "linear",
    ("linear", "relu"): "relu",
    ("relu", "dropout"): "dropout",
    ("relu", "linear"): "linear",
    ("dropout", "linear"): "linear",
    ("linear", "log_softmax"): "end",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.Flatten: "flatten",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.Dropout: "dropout",
    nn.LogSoftmax: "log_softmax",
}
_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    torch.flatten: "flatten",
    F.relu: "relu",
    torch.relu: "relu",
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
}
_METHODS = {"flatten": "flatten", "relu": "relu", "log_softmax": "log_softmax"}


def _word(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The operation of a node, if a perceptron may have it; else an empty string."""
    word, dim = "", node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if node.op == "call_module":  # by exact type: a subclass may compute something else
        module = modules[str(node.target)]
        word, dim = _MODULES.get(type(module), ""), getattr(module, "dim", None)
    elif node.op == "call_function":
        word = _FUNCTIONS.get(node.target, "")  # type: ignore[arg-type]
    elif node.op == "call_method":
        word = _METHODS.get(str(node.target), "")
    return "" if word == "log_softmax" and dim not in (1, -1) else word


class _Caught(Exception):
    """Ends a forward pass once the input of the first layer is known."""


def first_inputs(task: Task, model: nn.Module, perceptron: Perceptron, batch: Batch) -> Tensor:
    """The first layer's input for a batch; (B, I), or (B, ..., I) if the model does not flatten."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0].detach())
        raise _Caught

    hook = model.get_submodule(perceptron.linears[0]).register_forward_pre_hook(catch)
    try:
        task.outputs(model, batch)
    except _Caught:
        return caught[0]
    finally:
        hook.remove()
    raise AssertionError(f"outputs() did not call {perceptron.linears[0]!r}")
