"""Does a task keep its contract? What `infl check` prints, found with a few samples.

Each check is a function of a `Trial` that yields what it found; a mark of `fail` means that results
would be wrong, or that there would be none.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from influence_jobs.contract import jobs, outputs, parameters, samples
from influence_jobs.contract.trial import Finding, Findings, Said, Trial
from influence_jobs.devices import Device, resolved
from influence_jobs.errors import InflError
from influence_jobs.gpu import tf32
from influence_jobs.kinds import find_kind
from influence_jobs.requests.subject import built_task
from influence_jobs.tasks.own_code import described

# Name, what looks, and whether nothing after it makes sense if it fails.
CHECKS: tuple[tuple[str, Callable[[Trial], Said], bool], ...] = (
    ("data", samples.data, True),
    ("repeatable", samples.repeatable, True),
    ("losses", samples.losses, True),
    ("eval mode", samples.deterministic, True),
    ("independence", samples.independent, True),
    ("parameters", parameters.parameters, True),
    ("weights", parameters.reached, False),
    ("layers", parameters.layers, False),
    ("gauss-newton", outputs.gauss_newton, False),
    ("test data", outputs.tests, False),
    ("people", outputs.people, False),
    ("training", jobs.batch_of_one, False),
    ("time", jobs.times, False),
)


def check(task: Any, *, device: Device = "auto", **options: Any) -> Findings:
    """Look at a task, untrained and with a few samples: is everything as `infl` needs it?

    Args:
        task: Its name, `file.py:Class`, its class, or an object of it.
        device: Where to compute.
        options: Of the task.

    Returns:
        A line for each thing looked at, to print or to show in a notebook. A `mark` of "fail" needs
        mending.

    Raises:
        SpecError: There is no such task, or it does not take one of the options.
        DataError: Its `prepare` cannot have the data.
    """
    try:
        return Findings(findings(task, options, device=device))
    except InflError as error:
        raise error.for_python() from error


def findings(
    task: Any, options: Mapping[str, Any], *, device: Device = "auto"
) -> Iterator[Finding]:
    """What `check` returns, one by one as it is found.

    Raises:
        SpecError, DataError: As `check`.
    """
    place = torch.device(resolved(device))
    request = find_kind("train").request_type.of({"task": task, "task_options": options})
    try:
        _, built = built_task(request, lambda line: None)
    except InflError:
        raise
    except Exception as error:  # noqa: BLE001  (of the user's constructor)
        yield Finding("fail", "task", described(error))
        return
    trial = Trial(built, place)
    with tf32(False):  # checks are of float32's digits
        for name, look, needed in CHECKS:
            failed = False
            for finding in _found(name, look, trial):
                failed |= finding.mark == "fail"
                yield finding
            if failed and needed:
                return


def _found(name: str, look: Callable[[Trial], Said], trial: Trial) -> Iterator[Finding]:
    try:
        for mark, said in look(trial):
            yield Finding(mark, name, said)
    except InflError as error:
        yield Finding("fail", name, str(error))
    except Exception as error:  # noqa: BLE001  (whatever the user's code raises)
        yield Finding("fail", name, described(error))
