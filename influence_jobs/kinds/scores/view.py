"""The view of scores from elsewhere."""

from pathlib import PurePath

from influence_jobs.kinds.scores.spec import GivenScoresSpec
from influence_jobs.views.scores import ScoresView


class GivenScoresView(ScoresView[GivenScoresSpec]):
    """The most helpful and the most harmful samples by the scores of a file."""

    @property
    def method(self) -> str:
        return f"scores of {PurePath(self.spec.file.path).name}"

    @property
    def sides(self) -> dict[str, bool]:
        return {"helpful": True, "harmful": False}

    def certainty(self) -> list[str]:
        return []
