"""A run of one kind over some samples, in a process of its own: prints its peak memory.

python many_samples.py KIND SAMPLES FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infl_cluster.driver import drive
from infl_cluster.inline import InlineBackend
from influence_jobs.jobs.estimate import samples_per_second, worker_bytes
from influence_jobs.kinds import open_job
from influence_jobs.kinds.grad_norms.spec import GradNormsSpec
from influence_jobs.kinds.gradients.spec import GradientsSpec
from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.s_test.spec import STestSpec
from influence_jobs.memory import Peak
from influence_jobs.specs.base import AnySpec, TaskSpec, make_spec
from influence_jobs.specs.queries import Queries, Query
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    EkFacSettings,
    IdentitySettings,
)
from influence_jobs.store.checkpoints import file_checkpoint
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.registry import make_task
from influence_jobs.tasks.trust import trust_all

SIDE, WIDTH, CLASSES = 64, 512, 10


class Numbers:
    """Samples that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(3, SIDE, generator=torch.Generator().manual_seed(i)), i % CLASSES


class Many(Task):
    """A network whose activations take most of the memory."""

    output_loss = "cross-entropy"
    batch_size = 64

    def __init__(self, *, samples: int = 100) -> None:
        self.samples = samples

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES),
        )  # fmt: skip

    def train_data(self) -> Numbers:
        return Numbers(self.samples)

    def test_data(self) -> Numbers:
        return Numbers(20)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])
        return out

    def targets(self, batch: Any) -> Tensor:
        out: Tensor = batch[1]
        return out

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")


def spec_of(kind: str, samples: int, folder: Path) -> AnySpec:
    """The spec of a run, with curvature of all samples."""
    weights, model = folder / "weights.pt", Many().model()
    torch.save(model.state_dict(), weights)
    name = f"{Path(__file__).stem}:Many"
    task = TaskSpec(name=name, options={"samples": samples}, data="")
    task = task.model_copy(update={"data": make_task(task).fingerprint()})
    checkpoint, layers = file_checkpoint(str(weights)), ("0", "2", "5", "7")
    queries = Queries(items=tuple(Query(test=test) for test in range(8)))
    solver: Any = ConjugateGradientSettings(damping=10.0, tolerance=0.1)
    solver = EkFacSettings(damping=10.0, targets="sampled") if kind == "ek-fac" else solver
    solver = IdentitySettings() if kind == "influence" else solver
    s_test = make_spec(
        STestSpec, task=task, checkpoint=checkpoint, modules=layers, queries=queries, solver=solver
    )
    specs: dict[str, Callable[[], AnySpec]] = {
        "grad-norms": lambda: make_spec(
            GradNormsSpec, task=task, checkpoints=(checkpoint,), layers=layers
        ),
        "gradients": lambda: make_spec(
            GradientsSpec, task=task, checkpoint=checkpoint, modules=layers
        ),
        "influence": lambda: make_spec(InfluenceSpec, task=task, s_tests=(s_test,)),
        "s-test": lambda: s_test,
        "ek-fac": lambda: s_test,
    }
    return specs[kind]()


def main() -> None:
    """Carry out the run, and print its peak in bytes beyond what the imports take."""
    kind, samples, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    trust_all()
    spec = spec_of(kind, samples, folder)
    run = Run.create(str(folder / "runs"), spec)
    peak = Peak(torch.device("cpu"))
    if sys.argv[4:] == ["stated"]:
        job = open_job(run, batch_size=Many.batch_size)
        samples_per_second(job.probe(), 0.0)
        print(json.dumps({"stated": worker_bytes(job, job.plan(), peak)}))
        return
    if sys.argv[4:] == ["prepared"]:
        for needed in open_job(run).inputs(spec):
            drive(run.root, Run.create(run.root, needed).id, InlineBackend())
    else:
        drive(run.root, run.id, InlineBackend(), batch_size=Many.batch_size)
    print(json.dumps({"peak": peak.bytes, "most": peak.most}))


if __name__ == "__main__":
    main()
