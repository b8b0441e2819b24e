"""Writes docs/layers.md from the rules: `python -m influence_jobs.gradients.layer_table`."""

from typing import Any

from influence_jobs.gradients.rules import LayerRule, MatrixRule, registered

_HEAD = """# Layers

Gradient norms and influence work for every parameter that torch can differentiate. This page says
which layers have a rule, what happens to the others, and how layers are named. It is written by
`python -m influence_jobs.gradients.layer_table > docs/layers.md`.

## Layers with a rule

A rule is for a type of layer, and for a subclass that overrides nothing but `__init__`; another
subclass may compute something else. It holds if the layer is called once in a forward pass and its
weight is used nowhere else. Norms are L2 over I. *number* says whether `--layer all` includes the
layer and `--layer 1` counts it; other layers must be named. *derived* means that the quantity is
computed from the gradient of weight and bias, which every rule gives. *special* means that the rule
has a faster way of its own.

*EK-FAC*: a layer that applies one matrix to every position, in one call or several, has Kronecker
factors. `--layer all` takes these layers, and so does `--solver ek-fac` if no layer is named.
Other parameters must be named: norm layers and biases, grouped convolutions, recurrent layers,
attention's `in_proj_weight`, tied weights, parameters of your own. A parameter of up to 1,024
numbers has the exact block of the Gauss-Newton matrix; a larger one has a block for each row, or
only the diagonal. A run says which are coarser than a whole block.

A new type needs one class, in any file of `influence_jobs/gradients/rules/` or beside your task.

| type | weight read as | number | norms | dot products | quadratic forms | EK-FAC | |
|---|---|---|---|---|---|---|---|
"""
_TAIL = """
## Without a rule

Recurrent layers, attention's `in_proj_weight`, parameters of your own modules or of the model
itself, weights made by `weight_norm`, layers that are called twice, shared weights, and layers that
have the samples in another order (texts sorted by length inside of the model) have norms too. `infl
submit` says which they are and how they are computed. It takes the first of these forms whose
gradients agree with plain autograd on two samples; *mapped* is over the samples (vmap). Before a
worker stores anything, all its numbers of eight samples from all over the data are compared so.

| form | for | times as slow as rules alone |
|---|---|---|
| the layer's own backward, mapped | all uses are in one call of one module | 1 to 3; recurrent 20 |
| the model's backward, mapped | others, such as `cls_token` and shared weights | 1.5 to 4 |
| plain autograd, sample by sample | what cannot be mapped: packed sequences | as batches of one |

Dot products (influence) go by the rule, else in forward mode, else by the last two forms. The row
of an Embedding's `padding_idx` counts as frozen. Embedding layers with `max_norm`,
`scale_grad_by_freq` or `sparse` are refused, as are losses that depend on
the other samples of the batch, and weights whose gradients a hook (`weight.register_hook`) changes.

Of a weight that no rule reads, the first axis is C, all others are I, and there are no kernel
axes: `kernel` and `channel` norms are both (N, C).

## Names

| word | what |
|---|---|
| `--layer 3` | the third layer with a number, in forward order |
| `--layer head` | the module `head`: norms of its weight, influence of all its own parameters |
| `--layer rnn` | norms have an array for each weight: `norms/rnn.weight_ih_l0`, ... |
| `--layer rnn.weight_ih_l0`, `--layer cls_token` | a parameter |
| `--layer '*lora*'` | the modules whose name matches, else the parameters |
| `--layer module:3` | the module named 3, as a Sequential has them |
| `--layer all` | all layers with a number; the line it prints says what is left out, and why |

`infl top --layer` takes the same words. A shared weight counts once, with all its uses, and has the
names of all its layers. Frozen parameters (`requires_grad=False`) do not count, and a frozen
layer is refused by name.

## Number formats

Gradients are computed in float64 for a model that is built in it, and in float32 for any other;
`--precision` chooses another. Complex buffers stay complex, and a float64 buffer or sample of a
float32 model stays float64. [What each costs](precision.md).
"""
_FORMS = {  # by column, the methods that a faster way overrides
    "norms": ("kernel_norms",),
    "dot products": ("dots", "weight_dots"),
    "quadratic forms": ("squared_norms", "weight_squares", "gradient_matrix", "quadratic"),
}


def layers_page() -> str:
    """The page, in Markdown: a row for each rule."""
    return _HEAD + "".join(f"| {' | '.join(_row(rule))} |\n" for rule in registered()) + _TAIL


def _row(rule: type[LayerRule[Any]]) -> list[str]:
    notes = (rule.__doc__ or "").partition("\n")[0]
    factored = "factors" if rule.one_matrix is not LayerRule.one_matrix else "block"
    numbered = "yes" if rule.numbered else "by name"
    forms = ["special" if _overrides(rule, methods) else "derived" for methods in _FORMS.values()]
    return [rule.type_name(), rule.read_as, numbered, *forms, factored, notes]


def _overrides(rule: type[LayerRule[Any]], methods: tuple[str, ...]) -> bool:
    general = MatrixRule if issubclass(rule, MatrixRule) else LayerRule
    return any(getattr(rule, name, None) is not getattr(general, name, None) for name in methods)


if __name__ == "__main__":
    print(layers_page(), end="")
