"""Scores from elsewhere: a file that another library wrote."""

from influence_jobs.kinds.base import Kind
from influence_jobs.kinds.scores.spec import GivenScoresSpec

KIND = Kind(
    __name__,
    GivenScoresSpec,
    panel="Norms and scores",
    request="GivenScoresRequest",
    job="GivenScoresJob",
    view="GivenScoresView",
    workers=False,
    here=True,
)
