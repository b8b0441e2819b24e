"""Writes docs/layers.md from the rules: `python -m influence_jobs.gradients.layer_table`."""

from typing import Any

from influence_jobs.gradients.rules import LayerRule, MatrixRule, registered

_HEAD = """# Layers

The layers that have a rule for their per-sample gradients, and how it computes them. This page is
written by `python -m influence_jobs.gradients.layer_table > docs/layers.md`.

A rule is for the layer's type, and for a subclass that overrides nothing but `__init__`; any other
may compute something else. *derived* means computed from the weight and bias gradient, which every
rule gives. *special* means that the rule has a faster way of its own. Norms are L2 over I. *number*
says whether `--layer all` includes the layer and `--layer 1` counts it; other layers must be named.

A new type needs one class, in any file of `influence_jobs/gradients/rules/` or beside your task.

| type | weight read as | number | norms | dot products | quadratic forms | EK-FAC | |
|---|---|---|---|---|---|---|---|
"""
_FORMS = {  # by column, the methods that a faster way overrides
    "norms": ("kernel_norms",),
    "dot products": ("dots", "weight_dots"),
    "quadratic forms": ("squared_norms", "weight_squares", "gradient_matrix", "quadratic"),
}


def layers_page() -> str:
    """The page, in Markdown: a row for each rule."""
    return _HEAD + "".join(f"| {' | '.join(_row(rule))} |\n" for rule in registered())


def _row(rule: type[LayerRule[Any]]) -> list[str]:
    notes = (rule.__doc__ or "").partition("\n")[0]
    factored = "yes" if issubclass(rule, MatrixRule) else "refused"
    numbered = "yes" if rule.numbered else "by name"
    forms = ["special" if _overrides(rule, methods) else "derived" for methods in _FORMS.values()]
    return [rule.type_name(), rule.read_as, numbered, *forms, factored, notes]


def _overrides(rule: type[LayerRule[Any]], methods: tuple[str, ...]) -> bool:
    general = MatrixRule if issubclass(rule, MatrixRule) else LayerRule
    return any(getattr(rule, name, None) is not getattr(general, name, None) for name in methods)


if __name__ == "__main__":
    print(layers_page(), end="")
