"""Take the scores of a file into a run."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from influence_jobs.errors import SpecError
from influence_jobs.jobs.rows import Checks
from influence_jobs.jobs.scores import Scores, ScoresJob
from influence_jobs.kinds.scores.spec import GivenScoresSpec
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import AnySpec
from influence_jobs.store.layout import SCORES
from influence_jobs.store.manifest import checksum
from influence_jobs.store.scores_file import read_scores
from influence_jobs.terms import ScorePrecision


class GivenScoresJob(ScoresJob[GivenScoresSpec]):
    """The file is read once, where the run is submitted: other machines may not have it."""

    spec_type = GivenScoresSpec
    reads_samples = False

    @staticmethod
    def inputs(spec: GivenScoresSpec) -> tuple[AnySpec, ...]:
        return ()

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return ()

    @property
    def stored(self) -> ScorePrecision:
        return self.spec.precision

    @property
    def meaning(self) -> dict[str, str]:
        return {
            "quantity": "scores as they were given",
            "sign": "positive = helpful, negative = harmful",
            "unit": "of the file",
        }

    @cached_property
    def _values_QN(self) -> npt.NDArray[np.floating]:
        path = self.spec.file.path
        shape = (len(self.spec.queries.items), len(self.task.train_data()))
        values_QN = read_scores(path, shape)
        if checksum(values_QN) != self.spec.file.sha256:
            raise SpecError(
                f"the scores in {path} have changed since the run was submitted: restore the file, "
                "or submit the run again"
            )
        return values_QN

    def score(self, term: int, ids: torch.Tensor, fetched: Any, checks: Checks) -> Scores:
        return {SCORES: self._values_QN[:, ids.numpy()]}
