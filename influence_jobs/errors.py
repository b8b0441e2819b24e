"""The errors a user can cause or cure.

Every message says what is wrong, where, and what to do about it, in one line. The command line prints
that line and leaves with exit code 2; anything that is not an `InflError` is a fault of ours and keeps its traceback.
"""

import errno

# A full, read-only or forbidden disk: no fault of ours, and the same for whatever is written next.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class InflError(Exception):
    """Base of all errors whose message is meant for the user."""


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
