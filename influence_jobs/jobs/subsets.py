"""Models retrained on random subsets, and the sums of scores that should predict their losses."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from influence_jobs.experiments.lds import subset
from influence_jobs.jobs.retraining import RetrainJob
from influence_jobs.specs.rankings import Ranking, SubsetsSpec
from influence_jobs.store.rankings import score_blocks
from influence_jobs.training.changes import Changes
from influence_jobs.training.ensemble import Variant

# Distance between the seeds of one subset. torch's generator on the CPU takes the low 32 bits of a
# seed, so seeds that are 2**32 apart give the same initial weights.
SEED_STEP, SHARED_START_STEP = 2**24, 2**32

S = TypeVar("S", bound=SubsetsSpec)


class SubsetsJob(RetrainJob[S]):
    """One row for each (subset, seed), with all seeds of a subset together.

    The trainings depend only on recipe, subsets and seeds. So all methods share them, in other runs
    too.
    """

    @property
    @abstractmethod
    def indices(self) -> Sequence[int]:
        """The index of each of the M subsets; it decides the subset's samples and seeds."""

    @cached_property
    def sizes(self) -> Sequence[int]:
        return [len(self._subset(0))] * (len(self.indices) * len(self.spec.seeds))

    def _subset(self, index: int) -> npt.NDArray[np.int64]:
        n = len(self.task.train_data())
        return subset(n, self.spec.fraction, index)

    def variant(self, row: int) -> Variant:
        which, seed = divmod(row, len(self.spec.seeds))
        index = self.indices[which]
        everything = np.arange(len(self.task.train_data()))
        removed = np.setdiff1d(everything, self._subset(index), assume_unique=True)
        # Each subset has its own seeds: subsets must not share the noise of training.
        step = SEED_STEP if self.spec.own_starts else SHARED_START_STEP
        return Variant(index + step * self.spec.seeds[seed], Changes(removed=removed))

    def found(self) -> npt.NDArray[np.float64]:
        """What was measured after each retraining: (subsets, seeds, queries)."""
        losses_VQ = self.measured()[0].astype(np.float64)
        return losses_VQ.reshape(len(self.indices), len(self.spec.seeds), -1)

    @cached_property
    def members(self) -> npt.NDArray[np.bool_]:
        """Whether a sample is in a subset, shape (N, M)."""
        members_NM = np.zeros((len(self.task.train_data()), len(self.indices)), dtype=bool)
        for which, index in enumerate(self.indices):
            members_NM[self._subset(index), which] = True
        return members_NM

    def predicted(self, ranking: Ranking) -> npt.NDArray[np.float64]:
        """Minus the sum of each subset's scores, shape (Q, M).

        Minus, because samples with large scores lower the loss.
        """
        sums_QM = np.zeros((len(self.spec.queries.items), len(self.indices)))
        for start, block in score_blocks(self.run_store.root, ranking):
            members = self.members[start : start + block.shape[1]].astype(np.float64)
            sums_QM += np.nan_to_num(block, nan=0.0) @ members  # an excluded sample counts as 0
        return -sums_QM
