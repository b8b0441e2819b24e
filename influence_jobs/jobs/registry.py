"""Which job carries out which spec."""

from typing import Any

import torch

from influence_jobs.jobs.ablation import AblationJob
from influence_jobs.jobs.attribution import AttributionJob
from influence_jobs.jobs.base import Job
from influence_jobs.jobs.baseline import BaselineJob
from influence_jobs.jobs.grad_norms import GradNormsJob
from influence_jobs.jobs.influence import InfluenceJob
from influence_jobs.jobs.lds import LdsJob
from influence_jobs.jobs.paper import PaperJob
from influence_jobs.jobs.s_test import STestJob
from influence_jobs.jobs.stability import StabilityJob
from influence_jobs.jobs.train import TrainJob
from influence_jobs.specs import Spec
from influence_jobs.store.run import Run

JOBS: dict[type[Spec], type[Job[Any]]] = {
    job.spec_type: job
    for job in (
        TrainJob,
        GradNormsJob,
        STestJob,
        InfluenceJob,
        AttributionJob,
        BaselineJob,
        AblationJob,
        LdsJob,
        StabilityJob,
        PaperJob,
    )
}


def open_job(run: Run, *, device: str = "cpu", batch_size: int | None = None) -> Job[Any]:
    """The job that fills a run."""
    return JOBS[type(run.spec)](run, device=torch.device(device), batch_size=batch_size)
