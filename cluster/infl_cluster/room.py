"""Why no node has a place for a worker, in words: what is wanted, what there is, and the cure."""

from collections.abc import Mapping, Sequence


def wanted(cpus: int, gpus: float) -> str:
    """What a worker reserves, in words."""
    return f"CPU {cpus}" + (f", GPU {gpus:g}" if gpus else "")


def lack(
    nodes: Sequence[tuple[Mapping[str, float], Mapping[str, str]]],
    *,
    cpus: int,
    gpus: float,
    labels: Mapping[str, str],
) -> tuple[str, str] | None:
    """What no node has, and the cure; None if one is large enough and has the labels.

    Args:
        nodes: The resources and the labels of each node that is up.
        cpus: A worker reserves so many.
        gpus: A worker reserves so many.
        labels: Labels of Ray that its node must have.
    """
    if not nodes:
        return "no node of the cluster is up", "add a node"
    fit = [resources for resources, found in nodes if labels.items() <= found.items()]
    named = _words(labels)
    if not fit:
        there = {f"{k}={found[k]}" for _, found in nodes for k in labels if k in found}
        have = f"the nodes have {', '.join(sorted(there))}" if there else "the nodes have none such"
        return (
            f"no node has the label {named}: {have}",
            "correct --node-label, or add a node with it",
        )
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in fit):
        return None
    whose = f"nodes with {named}" if labels else "nodes"
    # A node of Ray names no resource that it has not.
    offers = {
        f"CPU {node.get('CPU', 0):g}" + (f", GPU {node.get('GPU', 0):g}" if gpus else "")
        for node in fit
    }
    said = f"a worker takes {wanted(cpus, gpus)}, and the {whose} have {'; '.join(sorted(offers))}"
    if gpus and not any(node.get("GPU", 0) >= gpus for node in fit):
        return said, "lower --num-gpus, take --device cpu, or add such a node"
    return said, "add such a node; a resumed run takes as many CPUs as the nodes have then"


def _words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
