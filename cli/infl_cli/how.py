"""How a run is to be carried out: the options of the panel `How to run`, checked."""

from dataclasses import dataclass
from typing import Literal

import torch

from infl_cli.options import cores
from influence_jobs.errors import SpecError


@dataclass(frozen=True)
class How:
    """The `How to run` options of a command."""

    address: str | None = None
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_gpus: float | None = None
    batch_size: int | None = None
    shard_size: int | None = None
    local: bool = False
    detach: bool = False
    dry_run: bool = False
    json: bool = False

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
        if self.device == "cuda" and not self.address and not torch.cuda.is_available():
            raise SpecError("--device cuda: torch finds no CUDA device on this machine")

    @property
    def resolved_device(self) -> str:
        """`auto` made definite."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() and not self.address else "cpu"

    @property
    def num_workers(self) -> int:
        """Workers on this machine."""
        if self.local:
            return 1
        return self.workers or (
            torch.cuda.device_count() if self.resolved_device != "cpu" else cores()
        )
