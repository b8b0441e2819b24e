"""The errors that a user can cause or cure.

Each message is one line: what is wrong, where, and the cure. The command line prints the line and
exits with code 2. Any other exception is our own fault and keeps its traceback.
"""

import errno
import re
from typing import Self

# The disk is full, read-only or forbidden: not our fault, and the next write fails as well.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

# Messages name every option in one form, `--like-this`, so that the names are data.
# What follows is its value if it is no English word: it has a digit, is a placeholder, or `all`.
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?: (?=[^\s,;:)]*\d|[A-Z]+[\s,;:)=]|all\b))?")


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of one without a text, its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class InflError(Exception):
    """Base of all errors whose message is meant for the user."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options in the message, spelled as in Python."""
        return tuple(match[1].replace("-", "_") for match in _OPTION.finditer(str(self)))

    def for_python(self) -> Self:
        """The same error for a notebook: `like_this=` instead of `--like-this`."""
        text = _OPTION.sub(lambda match: f"{match[1].replace('-', '_')}=", str(self))
        return type(self)(text)


class DataError(InflError):
    """Training data, images or downloads are missing, unreadable or wrong.

    Cure: put the data where the message says, or mend the sample that it names. `infl doctor` and
    `infl check TASK` look at data before a run does.
    """


class UntrustedCode(DataError):
    """A run names code that the user has not, or that is not here.

    Without it the run can be shown, but not its data. Cure: read the file that the message names,
    then name it in a command, or add `--trust`.
    """


class ModelError(InflError):
    """A checkpoint or model cannot be used.

    Examples: another architecture, a damaged file, an unsupported layer, train mode. Cure: the
    change of the model, or the option, that the message names; `infl check TASK` finds these faults
    in seconds.
    """


class SpecError(InflError):
    """A request cannot be carried out as it stands.

    Cure: ask with the options that the message names, or without them. Nothing was computed.
    """


class StoreError(InflError):
    """A run folder cannot be read or written, or it disagrees with its manifest.

    Cure: mend disk, rights or network, then `infl resume RUN`; if the message speaks of damage,
    first `infl verify RUN --repair`. Finished shards that agree with their checksums are kept.
    """


class RuntimeFault(InflError):
    """The cluster, the machine or a computation failed while the request itself was right.

    Examples: a cluster is unreachable, refuses, or makes no progress; a solver found no solution.
    Cure: what the message names, then `infl resume RUN`; `infl doctor` looks at this machine and,
    with `--address URL`, at a cluster.
    """
