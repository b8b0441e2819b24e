"""Scores from elsewhere."""

from typing import Literal

from influence_jobs.specs.base import Model
from influence_jobs.specs.queries import Queries
from influence_jobs.specs.scores import ScoresSpec
from influence_jobs.terms import ScorePrecision


class ScoresFile(Model):
    """A file of scores (Q, N), identified by its numbers.

    Attributes:
        sha256: Of the numbers, as `store.run.checksum` makes it of the array that is stored.
    """

    locations = frozenset({"path"})
    path: str
    sha256: str

    def words(self) -> str:
        return f"{self.path} (SHA-256 of its numbers {self.sha256[:12]})"


class GivenScoresSpec(ScoresSpec):
    """Scores that another program computed: positive = helpful.

    Attributes:
        queries: The queries, one a row of the scores.
        precision: In which they are stored.
    """

    kind: Literal["scores"] = "scores"
    file: ScoresFile
    queries: Queries
    precision: ScorePrecision = "float32"
