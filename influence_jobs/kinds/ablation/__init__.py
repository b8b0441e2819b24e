"""Ablation: retrain after the top samples are removed or relabelled."""

from influence_jobs.kinds.ablation.spec import AblationSpec
from influence_jobs.kinds.base import Kind

KIND = Kind(
    __name__,
    AblationSpec,
    panel="Experiments",
    request="AblationRequest",
    job="AblationJob",
    view="AblationView",
    shard_unit="models",
)
