"""What a batch is, and how it is cut into samples.

A batch is a tree of tuples, lists, dicts and dataclasses; subclasses of dict and other mappings,
such as the batches of transformers' tokenizers, count as dicts. Its tensors have the samples along
the first axis. A list or tuple without tensors, such as texts, is one leaf: a value for each
sample. What has another length is shared by all samples.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from influence_jobs.errors import ModelError

KINDS = "a tuple, list, dict or dataclass of tensors, each with the samples along its first axis"


def flattened(batch: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a batch, and the structure for `pytree.tree_unflatten`.

    Raises:
        ModelError: A mapping in it cannot be made anew from its items.
    """
    _register(batch)
    return pytree.tree_flatten(batch, is_leaf=_is_column)


def plain_leaves(batch: Any) -> list[Any]:
    """The leaves of a batch, of lists without tensors each element.

    Raises:
        ModelError: As `flattened`.
    """
    _register(batch)
    return pytree.tree_leaves(batch)


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """The batch with a function of each tensor in its place.

    Raises:
        ModelError: As `flattened`.
    """
    _register(batch)
    return pytree.tree_map_only(Tensor, function, batch)


def has_samples(leaf: Any, size: int) -> bool:
    """Whether a leaf of a batch of `size` samples has a part for each of them."""
    if isinstance(leaf, Tensor | np.ndarray):
        return leaf.ndim > 0 and len(leaf) == size
    return isinstance(leaf, list | tuple) and len(leaf) == size


def one_sample(batch: Any, index: int, size: int) -> Any:
    """Sample `index` of a batch of `size`, as a batch of one.

    Raises:
        ModelError: As `flattened`.
    """
    return part_of(batch, slice(index, index + 1), size)


def part_of(batch: Any, samples: slice, size: int) -> Any:
    """Some samples of a batch of `size`, as a batch.

    Raises:
        ModelError: As `flattened`.
    """
    leaves, structure = flattened(batch)
    cut = [leaf[samples] if has_samples(leaf, size) else leaf for leaf in leaves]
    return pytree.tree_unflatten(cut, structure)


def _is_column(node: Any) -> bool:
    if not isinstance(node, list | tuple):
        return False
    return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node))


def _register(tree: Any) -> None:
    """Teach torch's pytree the types of mappings and dataclasses in a tree that it does not know.

    Raises:
        ModelError: As `flattened`.
    """
    for leaf in pytree.tree_leaves(tree):
        kind = type(leaf)
        if kind in pytree.SUPPORTED_NODES:  # since a moment ago
            pass
        elif isinstance(leaf, Mapping):
            _require_remade(leaf)
            pytree.register_pytree_node(
                kind,
                lambda node: ([*node.values()], (type(node), [*node])),
                lambda values, context: context[0](dict(zip(context[1], values, strict=True))),
            )
        elif dataclasses.is_dataclass(kind):
            pytree.register_pytree_node(kind, _fields_of, _with_fields)
        else:
            continue
        _register(leaf)  # what is inside


def _require_remade(batch: Mapping[Any, Any]) -> None:
    kind: Any = type(batch)
    try:
        if [*kind(dict(batch))] == [*batch]:
            return
    except Exception:  # noqa: BLE001, S110  (whatever its constructor raises)
        pass
    raise ModelError(
        f"a batch is a {kind.__name__}, which {kind.__name__}(dict) cannot make again: return a "
        "plain dict"
    )


def _fields_of(node: Any) -> tuple[list[Any], Any]:
    names = [field.name for field in dataclasses.fields(node)]
    return [getattr(node, name) for name in names], (type(node), names)


def _with_fields(values: Any, context: Any) -> Any:
    kind, names = context
    node = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(node, name, value)  # it may be frozen
    return node
