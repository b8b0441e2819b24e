"""How a run is carried out. None of it changes the result."""

from collections.abc import Iterable, Mapping
from typing import Literal, Self

from pydantic import model_validator

from influence_jobs import devices
from influence_jobs.errors import SpecError
from influence_jobs.requests.base import Many, One, Options, option
from influence_jobs.specs.base import Count

HOW = "How to run"


def workers_on(gpus: float, num_gpus: float) -> int:
    """Workers that have room on a node's GPUs, each with so many, or with a part of one."""
    if num_gpus >= 1:
        return int(gpus // num_gpus)
    return int(gpus) * int(1 / num_gpus + 1e-9)  # a worker is on one GPU; 1 / .1 may be below 10


def room_on(nodes: Iterable[Mapping[str, float]], num_gpus: float) -> int:
    """Workers that have room on nodes with these resources: by GPUs, or if none, one a CPU."""
    if num_gpus:
        found = sum(workers_on(node.get("GPU", 0.0), num_gpus) for node in nodes)
    else:
        found = sum(int(node.get("CPU", 0.0)) for node in nodes)
    return max(1, found)


class How(Options):
    """Where a run is computed, by how many workers, and in what pieces."""

    address: One[str | None] = option(
        None,
        "Dashboard address of a Ray cluster, http(s)://HOST:PORT; by default the Ray on this "
        "machine, which is started if it is not up.",
        panel=HOW,
    )
    workers: One[Count | None] = option(
        None, "Worker processes; by default one for each core or GPU.", panel=HOW
    )
    device: devices.Device = option(
        "auto", "Where to compute; auto: on GPUs, where the workers have any.", panel=HOW
    )
    num_gpus: One[float | None] = option(
        None,
        "GPUs of each worker; by default 1 where it computes on GPUs. With .5 two workers share "
        "one.",
        panel=HOW,
        ge=0,
    )
    node_label: Many[str] = option(
        (),
        "Compute only on nodes with this label of Ray, KEY=VALUE such as "
        "ray.io/accelerator-type=H100. May be repeated.",
        panel=HOW,
    )
    batch_size: One[Count | None] = option(
        None,
        "Samples in a forward pass. By default the task's own number, or fewer if they do not "
        "fit; in long runs the number that a probe finds fastest.",
        panel=HOW,
    )
    shard_size: One[Count | None] = option(
        None,
        "Samples in a shard, the piece of work that a worker takes; in experiments that retrain,"
        " models.",
        panel=HOW,
    )
    stalled_after: One[float | None] = option(
        None,
        "Replace a worker that has made no progress for so many seconds; by default 1800. A "
        "shard that is tried again gets twice as long.",
        panel=HOW,
        gt=0,
    )
    local: bool = option(False, "Compute in this process, without Ray.", panel=HOW)
    detach: bool = option(False, "Return as soon as the run is submitted.", panel=HOW)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        pool = {
            "--detach": self.detach,
            "--address": self.address is not None,
            "--workers": self.workers not in (None, 1),
            "--num-gpus": self.num_gpus is not None,
            "--node-label": bool(self.node_label),
            "--stalled-after": self.stalled_after is not None,
        }
        for flag, given in pool.items():
            if self.local and given:
                raise SpecError(
                    f"{flag} is for Ray's workers, and this run is computed without Ray: use Ray, "
                    f"or leave out {flag}"
                )
        for label in self.node_label:
            key, equals, value = label.partition("=")
            if not (key and equals and value):
                raise SpecError(f"--node-label {label}: write KEY=VALUE, such as market-type=spot")
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise SpecError(
                f"--num-gpus {self.num_gpus:g}: a worker takes whole GPUs, or a part of one: give "
                "a whole number, or less than 1"
            )
        if not self.address and self.device == "cuda":
            devices.resolved(self.device)
        return self

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """What this machine computes on. Workers of Ray find out where they are."""
        if self.address:
            return "cpu" if self.device == "auto" else self.device
        return devices.resolved(self.device)

    def gpus_of_a_worker(self, nodes: Iterable[Mapping[str, float]]) -> float:
        """GPUs that a worker reserves on nodes with these resources."""
        if self.num_gpus is not None:
            return self.num_gpus
        if self.device == "auto":
            return float(any(node.get("GPU", 0.0) for node in nodes))
        return float(self.device != "cpu")

    @property
    def num_workers(self) -> int:
        """Workers on this machine."""
        if self.local:
            return 1
        import torch

        if self.workers or self.resolved_device == "cpu":
            return self.workers or devices.cores()
        return max(1, workers_on(torch.cuda.device_count(), self.num_gpus or 1.0))
