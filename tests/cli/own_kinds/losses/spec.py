"""Losses of the training samples."""

from typing import Literal

from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import Spec


class LossesSpec(Spec):
    """The loss of every training sample at a checkpoint."""

    kind: Literal["losses"] = "losses"
    checkpoint: Checkpoint
