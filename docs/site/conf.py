"""Settings of the site: `make docs`. Its sources are the documents where they lie.

So a link that works where the repository is read works on the site too. A link to a file that is no
page becomes a download.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from made import fill
from mathml import add_mathml
from sphinx.application import Sphinx

from influence_jobs import __version__

project = "infl"
version = release = __version__
extensions = [
    "myst_nb",  # reads Markdown, and notebooks as they are
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "benchmarks/*.md"]
exclude_patterns = ["README.md", "docs/site", "**/.ipynb_checkpoints"]
smartquotes = False  # they make a dash of the two in --option
highlight_language = "text"  # a block without a language is output
default_role = "code"  # docstrings write `name`

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
nb_execution_mode = "off"

python_maximum_signature_line_length = 120
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["lightning"]  # not needed to read about its callback
nitpicky = True
# No page tells of these: other packages' types, and types of ours that a user does not name.
nitpick_ignore_regex = [("py:(class|exc)", r"(?!influence_jobs\.\w+$).*")]

html_theme = "furo"
html_title = f"infl {release}"
html_additional_pages = {"index": "first.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_copyright = False  # LICENSE says it


def add_pages_of_folder(app: Sphinx, name: str, source: list[str]) -> None:
    """A folder's README leads to the other pages of the folder."""
    if name.endswith("/README"):
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n**\n```\n"


def plain_signature(*given: Any) -> tuple[str | None, str | None]:
    """A default that is a function stands by its name, and one that is made anew as dots."""
    arguments, result = given[-2:]
    if arguments is not None:
        arguments = re.sub(r"<function (\w+)>", r"\1", arguments).replace("<factory>", "...")
    return arguments, result


def level_headings(app: Sphinx, name: str, template: str, context: Any, *_: Any) -> None:
    """Screen readers are told the level of the captions beside a page."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Let what is made from code take the place of its marks."""
    add_mathml(app)
    app.connect("source-read", fill)
    app.connect("source-read", add_pages_of_folder)
    app.connect("html-page-context", level_headings, priority=900)  # after the theme
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True}
