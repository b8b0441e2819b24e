"""The errors a user can cause or cure.

Every message says what is wrong, where, and what to do about it, in one line. The command line prints
that line and leaves with exit code 2; anything that is not an `InflError` is a fault of ours and keeps its traceback.
"""

import errno
import re
from typing import Self

# A full, read-only or forbidden disk: no fault of ours, and the same for whatever is written next.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


# Messages name every option in one form, `--like-this`, so that the names are data.
# What follows is its value if it is no English word: it has a digit, is a placeholder, or `all`.
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?: (?=[^\s,;:)]*\d|[A-Z]+[\s,;:)=]|all\b))?")


class InflError(Exception):
    """Base of all errors whose message is meant for the user."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the message is about, as Python has them."""
        return tuple(match[1].replace("-", "_") for match in _OPTION.finditer(str(self)))

    def for_python(self) -> Self:
        """The same error in the words of a notebook: `like_this=` for `--like-this`."""
        text = _OPTION.sub(lambda match: f"{match[1].replace('-', '_')}=", str(self))
        return type(self)(text)


class DataError(InflError):
    """Training data, images or downloads are missing, unreadable or not what they should be."""


class ModelError(InflError):
    """A checkpoint or model cannot be used: other architecture, corrupted, unsupported layer, train mode."""


class SpecError(InflError):
    """A request cannot be carried out as it was made."""


class StoreError(InflError):
    """A run folder cannot be read or written, or its contents do not agree with its manifest."""


class RuntimeFault(InflError):
    """The cluster did not do what was asked: unreachable, refused, no progress."""
