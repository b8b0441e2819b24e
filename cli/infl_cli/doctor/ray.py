"""Is a Ray up, and can one be started?"""

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infl_cli.doctor.finding import Line
from influence_jobs.errors import InflError
from influence_jobs.home import infl_home
from influence_jobs.terms import size

FULL = 0.95  # of a disk: Ray refuses objects from there on


def local() -> Iterator[Line]:
    """The Ray of this machine, and what a new one would need."""
    from infl_cluster.head import current_head, remains

    try:
        head = current_head()
    except InflError as error:
        yield "fail", "Ray", str(error)
        return
    if head is not None:
        jobs = len(head.client().unfinished())
        cpus = "all CPUs" if head.num_cpus is None else f"{head.num_cpus} CPUs"
        said = f"up at {head.dashboard_url} with {cpus}, {jobs} jobs; token in {head.token_path}"
        yield "ok", "Ray", said
    elif left := remains():
        said = f"has died, processes of it are left ({len(left)}): run infl cluster down"
        yield "warn", "Ray", said
    else:
        said = "not up on this machine; a run without --address starts one, and so does "
        yield "none", "Ray", f"{said}infl cluster up"
    yield _loopback()
    yield from _full_disk()
    yield from _variables()


def remote(address: str) -> Iterator[Line]:
    """The cluster at an address: does it answer, and take the token? What has it?"""
    from infl_cluster.client import OPEN, remote_client

    try:
        client = remote_client(address)
        version = client.version()["ray_version"]
        nodes, is_open = client.nodes(), client.is_open()
    except InflError as error:
        yield "fail", "cluster", str(error)
        return
    answers = "answers" if is_open else "answers and takes the token"
    yield "ok", "cluster", f"{address} {answers}; Ray {version}; {_size(nodes)}"
    if is_open:
        yield "warn", "cluster's token", f"{address} {OPEN}"


def _size(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Nodes, CPUs and GPUs of a cluster in words."""
    has = [node.get("resources_total") or {} for node in nodes]
    cpus, gpus = (sum(one.get(name, 0.0) for one in has) for name in ("CPU", "GPU"))
    return f"nodes {len(nodes)}, CPUs {cpus:g}, GPUs {gpus:g}"


def _loopback() -> Line:
    """Whether programs of this machine can reach each other, as the parts of Ray must."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5.0),
        ):
            return "ok", "ports", "programs of this machine reach each other at 127.0.0.1"
    except OSError as error:
        said = f"127.0.0.1 cannot be reached ({error.strerror or error}): Ray cannot start; "
        return "warn", "ports", f"{said}--local computes without it"


def _full_disk() -> Iterator[Line]:
    try:
        found = shutil.disk_usage(infl_home())
    except (InflError, OSError):
        return  # told under disk
    if found.used + found.free and found.used / (found.used + found.free) >= FULL:
        said = f"{infl_home()} is on a disk with {size(found.free)} free, more than 95 % full, "
        yield "warn", "Ray's disk", f"{said}where Ray stops: set INFL_HOME to a folder elsewhere"


def _variables() -> Iterator[Line]:
    if address := os.environ.get("RAY_ADDRESS"):
        said = f"{address} is not used: runs go to the Ray of this machine, or to --address"
        yield "warn", "RAY_ADDRESS", said
    given = [n for n in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(n)]
    if given:
        yield "ok", "token", f"{given[0]} is set; it is sent to --address alone"
