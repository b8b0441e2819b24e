"""What a driver asks of its cluster's nodes before it hands out work."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infl_cluster.versions import VARIABLE, difference
from influence_jobs.errors import RuntimeFault

ANSWER_S = 60.0  # for a node to start a process


def require_same_software(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to go on if a node has other software than the run was submitted with.

    Workers ask the same of themselves. This is for nodes whose workers would refuse only when
    others have written shards already.

    Args:
        nodes: Those that may have workers, as `ray.nodes()` tells of them.

    Raises:
        RuntimeFault: The message names the first such node, the versions and the cure.
    """
    if VARIABLE not in os.environ or len(nodes) == 1:
        return
    find = _finder()
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[find.options(scheduling_strategy=there).remote()] = node
    refused = []
    for reference in ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_S)[0]:
        node = asked[reference]
        try:
            theirs = ray.get(reference)
        except ray.exceptions.RayError:  # it has just died
            continue
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        if said := difference(theirs, name):
            refused.append(said)
    if refused:
        more = f" ({len(refused) - 1} more nodes differ too)" if len(refused) > 1 else ""
        raise RuntimeFault(min(refused) + more)


def _finder() -> Any:
    """A remote function that returns a node's versions, even if this package is missing there.

    Being local, it travels as it is; a module's function would be imported there.
    """

    def find() -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            from influence_jobs.store.software import software

            return dict(software())
        except ImportError:
            found = {}
            for name in ("influence-jobs", "torch"):
                try:
                    found[name] = version(name)
                except PackageNotFoundError:
                    continue
            return found

    return ray.remote(num_cpus=0, max_retries=0)(find)
