"""The same software on both sides: where a run is submitted, and on every node that computes it.

Run ids, defaults and fingerprints are made by the submitting side, and numbers by the nodes.
"""

import json
import os
import socket
from collections.abc import Mapping

from influence_jobs.errors import RuntimeFault
from influence_jobs.store.software import PACKAGE, software

VARIABLE = "INFL_SUBMITTED_WITH"
COMPARED = (PACKAGE, "revision", "torch")


def env() -> dict[str, str]:
    """What tells a job with which software it was submitted."""
    ours = software()
    return {VARIABLE: json.dumps({name: ours[name] for name in COMPARED if name in ours})}


def require_same() -> None:
    """Refuse to go on in a process with other software than its run was submitted with.

    Raises:
        RuntimeFault: The message names this machine, the versions and the cure.
    """
    if said := difference(software(), socket.gethostname()):
        raise RuntimeFault(said)


def difference(theirs: Mapping[str, str], node: str) -> str | None:
    """How a node's software differs from what the run was submitted with; None if it does not.

    A build such as `+cu130` of the same version is the same. A revision counts if both sides know
    theirs.
    """
    submitted: dict[str, str] = json.loads(os.environ.get(VARIABLE, "{}"))
    other = [
        name
        for name in COMPARED
        if name in submitted
        and (name != "revision" or name in theirs)
        and _same(theirs.get(name) or "") != _same(submitted[name])
    ]
    if not other:
        return None
    has = ", ".join(f"{name} {theirs.get(name, 'not at all')}" for name in other)
    asked = ", ".join(f"{name} {submitted[name]}" for name in other)
    return (
        f"node {node} has {has}, and the run was submitted with {asked}: install the same on the "
        "nodes and where you submit"
    )


def _same(version: str) -> str:
    """What two versions have in common that are the same: no build, and the start of a revision."""
    return version.partition("+")[0][:12]
