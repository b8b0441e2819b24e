"""Which models are plain perceptrons, for which ensembles and curvature have a faster path."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from influence_jobs.tasks.base import Batch, Task


@dataclass(frozen=True)
class Chain:
    """Linear layers with ReLU between them, the last one's outputs being logits.

    Attributes:
        linears: Names of the L layers, in order.
        dropouts: The probability p of the dropout after each of the L - 1 ReLUs; 0 where there is none.
    """

    linears: tuple[str, ...]
    dropouts: tuple[float, ...]


def find_chain(model: nn.Module) -> Chain | None:
    """Read the chain off the traced forward pass; None if the model is anything else.

    Accepted is one straight line: any flattening, then Linear, ReLU, perhaps Dropout, and so on, Linear, perhaps
    log-softmax over the classes. Every layer has a bias, is trained, occurs once, and nothing else has parameters.
    """
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception:  # noqa: BLE001  (control flow and much else cannot be traced, with any error)
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
    names = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    every = dict(model.named_parameters())
    trained = all(parameter.requires_grad for parameter in every.values())
    return Chain(tuple(linears), tuple(dropouts)) if trained and names == set(every) else None


# (what was last, what comes): what is now last.
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
    """What a node does, if it is one of the few things a chain may do; else an empty word."""
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


def first_inputs(task: Task, model: nn.Module, chain: Chain, batch: Batch) -> Tensor:
    """What the first layer is given for a batch, shape (B, I)."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0].detach())
        raise _Caught

    hook = model.get_submodule(chain.linears[0]).register_forward_pre_hook(catch)
    try:
        task.outputs(model, batch)
    except _Caught:
        return caught[0]
    finally:
        hook.remove()
    raise AssertionError(f"outputs() did not call {chain.linears[0]!r}")
