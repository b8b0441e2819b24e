"""The Ray job that carries out a run; the run's job.json names it."""

import time
from collections.abc import Callable
from importlib.metadata import version

from infl_cluster.client import FINAL_STATUSES, JobClient, NoAnswer, UnknownJob, remote_client
from infl_cluster.head import current_head
from influence_jobs.errors import RuntimeFault
from influence_jobs.home import is_known
from influence_jobs.store import layout
from influence_jobs.store.documents import JobFile
from influence_jobs.store.lease import live_holder
from influence_jobs.store.run import Run
from influence_jobs.store.software import PACKAGE

RAYS_OWN = "Running entrypoint for job"  # Ray's line before the driver's first
SILENCE_S = 20.0  # a cluster that does not answer for so long counts as gone


def client_of(job: JobFile) -> JobClient:
    """A client of the cluster that a run's job was submitted to.

    Raises:
        UnknownJob: The cluster was the Ray of this machine, and is gone.
        RuntimeFault: The cluster cannot be asked, or the user has not named it. A run folder may
            come from a stranger, whose server must not get the token.
    """
    if address := job["address"]:
        if not is_known("cluster", address):
            raise RuntimeFault(
                f"the run says that it runs on {address}, which you have not named on this "
                f"machine; if your token may go there, add --address {address}"
            )
        return remote_client(address)
    head = current_head()
    if head is None:
        raise UnknownJob("the local Ray that ran it is gone")
    return head.client()


def dashboard_of(run: Run) -> str | None:
    """Address of a run's job in its Ray dashboard; None without a job, or if that Ray is gone."""
    job = run.read_json(layout.JOB, JobFile)
    if job is None:
        return None
    address = job["address"]
    if not address:
        try:
            head = current_head()
        except RuntimeFault:  # Ray does not answer: show the run's page without the link
            return None
        address = head.dashboard_url if head is not None else None
    return f"{address.rstrip('/')}/#/jobs/{job['submission_id']}" if address else None


def is_unfinished(job: JobFile) -> bool:
    """Whether a run's job is waiting or running on its cluster.

    Raises:
        RuntimeFault: The cluster cannot be asked.
    """
    try:
        return client_of(job).status(job["submission_id"]) not in FINAL_STATUSES
    except UnknownJob:
        return False


def watcher(run: Run) -> Callable[[], str | None]:
    """A function that returns None while a driver works on a run, and then why it ended."""
    job_ended: Callable[[], str | None] | None = None

    def ended() -> str | None:
        nonlocal job_ended
        if live_holder(run.files) is not None:
            job_ended = None  # the driver may belong to a newer job
            return None
        if job_ended is None:
            job = run.read_json(layout.JOB, JobFile)
            if job is None:
                return "it is not running"
            job_ended = job_watcher(job)
        return job_ended()

    return ended


def job_watcher(job: JobFile) -> Callable[[], str | None]:
    """A function that returns None while a job runs, and then why it ended.

    A cluster that stays silent counts as gone.
    """
    silent_since: float | None = None

    def ended() -> str | None:
        nonlocal silent_since
        try:
            client = client_of(job)
            status = client.status(job["submission_id"])
        except RuntimeFault as fault:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since <= SILENCE_S:
                return None
            if not isinstance(fault, NoAnswer):
                return str(fault)
            return f"Ray does not answer any more; resume the run once it is up again: {fault}"
        silent_since = None
        if status not in FINAL_STATUSES:
            return None
        if status == "SUCCEEDED":  # the run is not done: its last status has been asked for
            return "its Ray job ended well, and some of its shards are not done: resume the run"
        try:
            last = client.logs(job["submission_id"]).strip().rpartition("\n")[2]
        except RuntimeFault as fault:  # such as a log that is too long to come in time
            last = f"its output cannot be read: {fault}"
        last = last.removeprefix("error: ")
        if last.startswith(RAYS_OWN):
            last = ""
        how = "failed" if status == "FAILED" else "was stopped"
        return f"the Ray job {how}: {last or 'it has no output'}{_cure(last)}"

    return ended


def _cure(last: str) -> str:
    """What to do about a driver that could not begin, from the last line that it printed."""
    missing = ("No module named infl_cluster", "No module named 'infl_cluster", "python: not found")
    if any(words in last for words in missing):
        return (
            " (the `python` of the cluster's nodes has no influence-jobs: pip install "
            f"'influence-jobs[cli]=={version(PACKAGE)}' there)"
        )
    return ""
