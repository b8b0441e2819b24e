"""Ask from Python: `influence_jobs.submit`."""

import sys
from typing import Any

from infl_cluster.how import How
from infl_cluster.launch import carry_out
from influence_jobs.devices import Device
from influence_jobs.errors import InflError, SpecError
from influence_jobs.kinds import find_kind
from influence_jobs.report.results import Results
from influence_jobs.store.folder import DEFAULT_RUNS, runs_folder
from influence_jobs.store.run import Run


def submit(
    kind: str,
    *,
    runs: str = DEFAULT_RUNS,
    ray: bool = False,
    address: str | None = None,
    workers: int | None = None,
    device: Device = "auto",
    num_gpus: float | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    detach: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Results:
    """Compute something, and the runs it needs; what is done already is found again.

    It takes what `infl submit KIND` takes, under the same names: `--test-set paper` is
    `test_set="paper"`. An option that may be repeated takes a list or one value. `task` may also be
    a class or an object, `checkpoint`, `norms` and `s_test` the results of a former call::

        trained = submit("train", task=Digits, epochs=5)
        found = submit("influence", checkpoint=trained, test=[3, 7], solver="ek-fac")
        found.top_k(5, test=3)

    Args:
        kind: A kind of run, such as train or influence; `infl submit --help` lists them.
        runs: Folder of all runs: a path, s3:// or gs://.
        ray: Compute on a Ray of this machine, which is started if there is none, and not in this
            process.
        address: Compute on the Ray cluster with this dashboard address.
        workers: Worker processes of Ray; one a core or GPU by default.
        device: Where to compute.
        num_gpus: GPUs of each worker; fractions share one.
        batch_size: Samples a pass; of "train", samples a step.
        shard_size: Samples or models of a shard.
        detach: Return as soon as Ray has the job.
        quiet: Show no progress.
        options: Those of the kind of run, and of its task.

    Returns:
        The run; of a detached one, what there is so far.

    Raises:
        InflError: It cannot be carried out as it was asked, or it failed. What was finished is
            kept, and the same call goes on there.
    """

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    found = find_kind(kind)
    if batch_size is not None:
        if "batch_size" in found.request_type.model_fields:
            options["batch_size"], batch_size = batch_size, None
        elif not found.batched:
            raise SpecError(f"--batch-size has no meaning for {kind}: leave it out").for_python()
    root = runs_folder(runs)
    try:
        how = How.checked(
            {
                "address": address,
                "workers": workers,
                "device": device,
                "num_gpus": num_gpus,
                "batch_size": batch_size,
                "shard_size": shard_size,
                "local": not (ray or address),
                "detach": detach,
            }
        )
        specs = found.request_type.of(options).specs(root, say)
        if len(specs) > 1:
            raise SpecError(
                f"{kind} of {len(specs)} checkpoints is as many runs: ask for one at a time"
            )
        run = Run(root, specs[0])
        carry_out(run, how, say)
    except InflError as error:
        raise error.for_python() from error
    return Results(root, run.id)
