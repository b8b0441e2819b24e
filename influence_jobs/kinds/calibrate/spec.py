"""Calibration of influence."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from influence_jobs.kinds.influence.spec import InfluenceSpec
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.specs.rankings import Ranking, SubsetsSpec

LEAST_SUBSETS = 8  # a rank correlation over fewer says next to nothing

Subsets = Annotated[int, Field(ge=LEAST_SUBSETS)]


class CalibrateSpec(SubsetsSpec):
    """Choose a setting of influence by its linear datamodeling score, and measure it anew.

    Attributes:
        rankings: One for each setting: influence at one epoch, averaged over models.
        choosing: Number of random subsets by which the setting is chosen.
        held_out: Number of other subsets, those of `LdsSpec`, on which the chosen one is measured.
    """

    kind: Literal["calibrate"] = "calibrate"
    choosing: Subsets = 24
    held_out: Subsets = 24


class Setting(NamedTuple):
    """A setting of influence.

    Attributes:
        damping: Lambda; None if it is chosen from the largest eigenvalue.
        curvature_samples: None for all.
    """

    solver: str
    epoch: int
    damping: float | None
    curvature_samples: int | None
    models: int

    @property
    def words(self) -> str:
        damping = "automatic" if self.damping is None else f"{self.damping:.3g}"
        models = f", {self.models} models" if self.models > 1 else ""
        return f"{self.solver}, epoch {self.epoch}, lambda {damping}{models}"


def setting_of(ranking: Ranking) -> Setting:
    """The setting that a calibration's ranking is of."""
    scores = ranking.scores[0]
    assert isinstance(scores, InfluenceSpec)
    (s_test,) = scores.s_tests
    assert isinstance(s_test.checkpoint, TrainedCheckpoint)
    return Setting(
        s_test.solver.name,
        s_test.checkpoint.epoch,
        getattr(s_test.solver, "damping", None),
        s_test.curvature.samples,
        len(ranking.scores),
    )
