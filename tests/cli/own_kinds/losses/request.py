"""What can be asked of losses."""

from influence_jobs.requests.base import Say
from influence_jobs.requests.options import WeightsRequest
from influence_jobs.specs.base import Spec, make_spec

from .spec import LossesSpec


class LossesRequest(WeightsRequest):
    """The loss of every training sample."""

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.subject import subject_of

        subject = subject_of(self, root, say)
        return (make_spec(LossesSpec, task=subject.task, checkpoint=subject.checkpoints[0]),)
