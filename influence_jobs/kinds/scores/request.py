"""The request for scores from a file."""

from influence_jobs.requests.base import One, Request, Say, option
from influence_jobs.requests.options import QueriesOptions
from influence_jobs.specs.base import Spec


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
        from influence_jobs.requests.score_files import scores_of_file
        from influence_jobs.requests.subject import task_of

        task, built = task_of(self, say)
        return (scores_of_file(self.file, task, built, queries_of(self, built)),)
