"""How a run is to be carried out: the options of the panel `How to run`, checked."""

from dataclasses import dataclass
from typing import Literal

from infl_cli import options as o
from infl_cli.options import cores
from influence_jobs.errors import SpecError


@dataclass(frozen=True)
class How:
    """The options of every run."""

    address: o.Address = None
    workers: int | None = None
    device: o.Device = "auto"
    num_gpus: o.NumGpus = None
    batch_size: int | None = None
    shard_size: int | None = None
    local: o.Local = False
    detach: o.Detach = False
    dry_run: o.DryRun = False
    json: o.Json = False

    def __post_init__(self) -> None:
        pool = {
            "--detach": self.detach,
            "--address": self.address is not None,
            "--workers": self.workers not in (None, 1),
            "--num-gpus": self.num_gpus is not None,
        }
        for option, given in pool.items():
            if self.local and given:
                raise SpecError(f"--local computes in this process: leave out {option}")
        if self.device == "cuda" and not self.address and not _has_cuda():
            raise SpecError("--device cuda: torch finds no CUDA device on this machine")

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        """`auto` made definite."""
        if self.device != "auto":
            return self.device
        return "cuda" if not self.address and _has_cuda() else "cpu"

    @property
    def num_workers(self) -> int:
        """Workers on this machine."""
        if self.local:
            return 1
        import torch

        return self.workers or (
            torch.cuda.device_count() if self.resolved_device != "cpu" else cores()
        )


@dataclass(frozen=True)
class WorkersHow(How):
    """The options of a run whose inputs spread over workers."""

    workers: o.Workers = None


@dataclass(frozen=True)
class RetrainingHow(WorkersHow):
    """The options of a run that retrains: how many models make a shard."""

    shard_size: o.ModelsOfShard = None


@dataclass(frozen=True)
class ShardedHow(WorkersHow):
    """The options of a run that passes samples through a model."""

    batch_size: o.BatchSize = None
    shard_size: o.ShardSize = None


def _has_cuda() -> bool:
    import torch  # takes seconds: help and completion must not wait for it

    return torch.cuda.is_available()
