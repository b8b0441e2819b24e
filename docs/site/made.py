"""Parts of pages that are made from the code, in the place of `<!-- made: NAME -->`."""

import re
from collections.abc import Callable, Mapping

from commands_page import commands, submit_commands
from errors_page import errors
from sphinx.application import Sphinx

MADE: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "submit commands": submit_commands,
    "errors": errors,
}
_MARK = re.compile(r"^<!-- made: (.+) -->$", re.MULTILINE)


def fill(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace the marks of a page that Sphinx has read."""
    source[0] = _MARK.sub(lambda found: MADE[found[1]](), source[0])
