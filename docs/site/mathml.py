"""Formulas as MathML: browsers draw it themselves, without a script or the network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def add_mathml(app: Sphinx) -> None:
    """Let Sphinx write formulas so, as `html_math_renderer` says."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
