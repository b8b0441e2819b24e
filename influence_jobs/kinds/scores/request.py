"""The request for scores from a file."""

from pathlib import Path
from typing import TYPE_CHECKING

from influence_jobs.kinds.scores.spec import GivenScoresSpec, ScoresFile
from influence_jobs.requests.base import One, Request, Say, option
from influence_jobs.requests.options import QueriesOptions
from influence_jobs.specs.base import Spec, TaskSpec, make_spec
from influence_jobs.specs.queries import Queries

if TYPE_CHECKING:
    from influence_jobs.tasks.base import Task


class GivenScoresRequest(Request, QueriesOptions):
    """Take in the scores of another library, to look at them as at ours.

    The experiments take the file itself: --by NAME=FILE.
    """

    file: One[str] = option(
        ...,
        "Scores (queries, training samples) as .npy, .parquet or .zarr, positive = helpful: rows "
        "in the order of --test, columns in the order of the training samples.",
    )

    def specs(self, root: str, say: Say) -> tuple[Spec, ...]:
        from influence_jobs.requests.queries import queries_of
        from influence_jobs.requests.subject import task_of

        task, built = task_of(self, say)
        return (scores_of_file(self.file, task, built, queries_of(self, built)),)


def scores_of_file(path: str, task: TaskSpec, built: "Task", queries: Queries) -> GivenScoresSpec:
    """The spec of the scores in a file.

    Raises:
        SpecError: There is no such file, or it does not hold a score for every query and sample.
    """
    from influence_jobs.store.run import checksum
    from influence_jobs.store.scores_file import read_scores

    values_QN = read_scores(path, (len(queries.items), len(built.train_data())))
    return make_spec(
        GivenScoresSpec,
        task=task,
        file=ScoresFile(path=str(Path(path).absolute()), sha256=checksum(values_QN)),
        queries=queries,
        precision=values_QN.dtype.name,
    )
