"""How a run is to be carried out; none of it changes the result."""

from typing import Literal, Self

from pydantic import model_validator

from influence_jobs import devices
from influence_jobs.errors import SpecError
from influence_jobs.requests.base import One, Options, option
from influence_jobs.specs.base import Count

HOW = "How to run"


class How(Options):
    """Where work is computed, by how many workers, and in what pieces."""

    address: One[str | None] = option(
        None,
        "Dashboard address of a Ray cluster, http(s)://HOST:PORT; a local Ray is started if not "
        "given.",
        panel=HOW,
    )
    workers: One[Count | None] = option(
        None, "Worker processes; one a core or GPU by default.", panel=HOW
    )
    device: devices.Device = option("auto", "Where workers compute.", panel=HOW)
    num_gpus: One[float | None] = option(
        None, "GPUs of each worker; fractions share one. On cuda 1 by default.", panel=HOW, ge=0
    )
    batch_size: One[Count | None] = option(
        None, "Samples a pass; the task's own by default.", panel=HOW
    )
    shard_size: One[Count | None] = option(None, "How many make a shard.", panel=HOW)
    local: bool = option(False, "Compute in this process, without Ray.", panel=HOW)
    detach: bool = option(False, "Return as soon as the job is submitted.", panel=HOW)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        pool = {
            "--detach": self.detach,
            "--address": self.address is not None,
            "--workers": self.workers not in (None, 1),
            "--num-gpus": self.num_gpus is not None,
        }
        for flag, given in pool.items():
            if self.local and given:
                raise SpecError(f"--local computes in this process: leave out {flag}")
        if not self.address and self.device == "cuda":
            devices.resolved(self.device)
        return self

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """`auto` made definite: on a cluster elsewhere, the CPU."""
        if self.address:
            return "cpu" if self.device == "auto" else self.device
        return devices.resolved(self.device)

    @property
    def num_workers(self) -> int:
        """Workers on this machine."""
        if self.local:
            return 1
        import torch

        return self.workers or (
            torch.cuda.device_count() if self.resolved_device != "cpu" else devices.cores()
        )
