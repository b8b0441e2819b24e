"""From a file of scores to a spec."""

from pathlib import Path

from influence_jobs.kinds.scores.spec import GivenScoresSpec, ScoresFile
from influence_jobs.specs.base import TaskSpec, make_spec
from influence_jobs.specs.queries import Queries
from influence_jobs.store.manifest import checksum
from influence_jobs.store.scores_file import read_scores
from influence_jobs.tasks.base import Task


def scores_of_file(path: str, task: TaskSpec, built: Task, queries: Queries) -> GivenScoresSpec:
    """The spec of the scores in a file.

    Raises:
        SpecError: There is no such file, or it does not hold a score for every query and sample.
    """
    values_QN = read_scores(path, (len(queries.items), len(built.train_data())))
    return make_spec(
        GivenScoresSpec,
        task=task,
        file=ScoresFile(path=str(Path(path).absolute()), sha256=checksum(values_QN)),
        queries=queries,
        precision=values_QN.dtype.name,
    )
