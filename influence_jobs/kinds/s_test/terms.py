"""The terms that scores by s_test vectors are the sum of, and the segments of a training."""

from dataclasses import dataclass

import numpy as np

from influence_jobs.jobs.recipe import flow_time
from influence_jobs.kinds.s_test.spec import STestSpec, stored_epochs
from influence_jobs.kinds.train.spec import Checkpoint, TrainedCheckpoint
from influence_jobs.specs.solvers import SourceSettings
from influence_jobs.store.layout import S_TEST, segment_name


@dataclass(frozen=True)
class Term:
    """weight x s_test . gradient of a sample's loss at a checkpoint.

    Attributes:
        array: Of the run's s_test vectors.
    """

    checkpoint: Checkpoint
    array: str
    weight: float


@dataclass(frozen=True)
class Stretch:
    """A segment of a training by the epochs at its ends, with its checkpoints."""

    begin: int
    end: int
    checkpoints: tuple[TrainedCheckpoint, ...]

    def time(self, num_samples: int) -> float:
        """Of gradient flow."""
        epochs = range(self.begin, self.end)
        return flow_time(self.checkpoints[0].train, num_samples, epochs)


def stretches_of(spec: STestSpec) -> tuple[Stretch, ...]:
    """The segments of SOURCE, the first one first."""
    assert isinstance(spec.solver, SourceSettings)
    assert isinstance(spec.checkpoint, TrainedCheckpoint)
    groups = [
        group.tolist()
        for group in np.array_split(stored_epochs(spec.checkpoint), spec.solver.segments)
    ]
    begins = [0, *(group[-1] for group in groups)]
    return tuple(
        Stretch(
            begin,
            group[-1],
            tuple(TrainedCheckpoint(train=spec.checkpoint.train, epoch=epoch) for epoch in group),
        )
        for begin, group in zip(begins, groups, strict=False)
    )


def terms_of(spec: STestSpec) -> tuple[Term, ...]:
    """The terms of scores: one, or with SOURCE one for each checkpoint of each segment."""
    if not isinstance(spec.solver, SourceSettings):
        return (Term(spec.checkpoint, S_TEST, 1.0),)
    return tuple(
        Term(checkpoint, segment_name(i), 1 / len(stretch.checkpoints))
        for i, stretch in enumerate(stretches_of(spec))
        for checkpoint in stretch.checkpoints
    )
