"""Are the data those that a run was computed with? Each run of data keeps digests of samples.

They find what a fingerprint does not: training samples that no fingerprint covers (with 64 at
random of each run, a change of one row in twenty goes unnoticed in one run of 27), test samples,
and a node with other files than the node that began the run.
"""

from collections.abc import Iterable
from typing import Any

from influence_jobs.errors import DataError
from influence_jobs.jobs.base import Job
from influence_jobs.kinds import open_job
from influence_jobs.specs.base import TaskSpec, listed
from influence_jobs.store.documents import SampleDigests
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.digests import (
    SAMPLES,
    digests_of,
    first_other,
    some_samples,
    training_sample,
)
from influence_jobs.tasks.fingerprints import changed
from influence_jobs.tasks.registry import make_task, with_place_of


def sample_digests(job: Job[Any]) -> SampleDigests:
    """What a run keeps of its data: some training samples, others in each run; its test samples.

    Raises:
        DataError: They are others each time they are fetched.
    """
    chosen = some_samples(job.task, seed=int(job.spec.hash[:16], 16))
    return {
        "training": digests_of("training", chosen, training_sample(job.task)),
        "test": digests_of("test", job.tests, job.of_test),
    }


def require_same_here(job: Job[Any]) -> None:
    """Refuse to work on a run with other data than it was begun with; its driver has looked at all.

    Of many test samples a worker looks at as many as of the training samples.

    Raises:
        DataError: Naming a sample.
    """
    if why := _difference(job, most=SAMPLES):
        raise DataError(f"{why}: every node and process must read the same data")


def require_same_data(runs: Iterable[Run], task: TaskSpec, built: Task | None = None) -> None:
    """Refuse runs, begun or done, whose data are others now although fingerprints are the same.

    A run that reads other runs only is compared by these. Of another fingerprint than now are runs
    whose data or code changed in the open: they are not compared.

    Args:
        task: The task whose data are here; runs of it may remember another place.
        built: The same, if it is at hand and `require_unchanged`.

    Raises:
        DataError: Naming a sample, the runs that were computed with another one, and the cure.
    """
    comparison = _Comparison(task, built)
    for run in runs:
        if others := comparison.others(run):
            folders = "folder" if len(others) == 1 else "folders"
            raise DataError(
                f"{next(iter(others.values()))}: restore the data, or delete the {folders} of "
                f"{listed([*others])} and submit again"
            )


class _Comparison:
    """Compares each run once, and makes each task once."""

    def __init__(self, task: TaskSpec, built: Task | None) -> None:
        self._task = task
        self._built: dict[str, Task | None] = {} if built is None else {_place(task): built}
        self._unchanged = {} if built is None else {task.model_dump_json(): True}
        self._found: dict[str, dict[str, str]] = {}

    def others(self, run: Run) -> dict[str, str]:
        """Why, by the ids of a run and of those it was computed from, as far as data differ."""
        if run.id not in self._found:
            self._found[run.id] = self._others(run)
        return self._found[run.id]

    def _others(self, run: Run) -> dict[str, str]:
        job, why = open_job(run), None
        if job.reads_data:
            why = self._difference(job)
            if why is None:
                return {}
        found: dict[str, str] = {}
        for spec in job.inputs(run.spec):
            found |= self.others(Run(run.root, spec))
        why = why or next(iter(found.values()), None)
        return {run.id: why, **found} if why else {}

    def _difference(self, job: Job[Any]) -> str | None:
        if _kept(job) is None:
            return None
        spec = job.spec.task
        if spec.name == self._task.name:
            spec = with_place_of(spec, self._task)
        if (place := _place(spec)) not in self._built:
            self._built[place] = _task_if_here(spec)
        task = self._built[place]
        if task is None or not self._is_unchanged(spec, task):
            return None
        job.task = task
        return _difference(job)

    def _is_unchanged(self, spec: TaskSpec, task: Task) -> bool:
        name = spec.model_dump_json()
        if name not in self._unchanged:
            self._unchanged[name] = not changed(spec, task)
        return self._unchanged[name]


def _place(spec: TaskSpec) -> str:
    """What a task is made of."""
    return spec.model_dump_json(exclude={"data", "code"})


def _task_if_here(spec: TaskSpec) -> Task | None:
    """The task, if its training data are here: what there is of a run may be where they are not."""
    try:
        task = make_task(spec)
        task.train_data()
    except Exception:  # noqa: BLE001  (the user's code may raise anything)
        return None
    return task


def _kept(job: Job[Any]) -> SampleDigests | None:
    """The digests of a run; None if it has not begun, or is of an earlier version."""
    plan = job.run_store.plan()
    return plan.get("samples") if plan else None


def _difference(job: Job[Any], most: int | None = None) -> str | None:
    """The first sample that is not the one that a run was begun with, in a sentence.

    Args:
        most: So many test samples are compared at most.
    """
    kept = _kept(job)
    if kept is None:
        return None
    training, test = kept["training"], kept["test"]
    if most:
        test = dict([*test.items()][:: max(1, -(-len(test) // most))])
    other = first_other("training", training, training_sample(job.task)) or first_other(
        "test", test, job.of_test
    )
    if other is None:
        return None
    looked = f"{len(training)} of {len(job.task.train_data()):,} training samples"
    if kept["test"]:
        count = "all" if len(test) == len(kept["test"]) else f"{len(test)} of {len(kept['test']):,}"
        looked += f" and {count} test samples of its queries"
    return f"{other} is not the one that {job.run_store.id} was begun with ({looked} are compared)"
