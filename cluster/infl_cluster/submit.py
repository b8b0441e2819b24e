"""Submit runs from Python: `influence_jobs.submit`."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from infl_cluster.how import How
from infl_cluster.launch import carry_out
from infl_cluster.notebook import in_notebook
from influence_jobs.devices import Device
from influence_jobs.errors import InflError, SpecError
from influence_jobs.kinds import find_kind
from influence_jobs.report.results import Results
from influence_jobs.store.folder import DEFAULT_RUNS, runs_folder
from influence_jobs.store.run import Run
from influence_jobs.tasks.trust import trust_all


def submit(
    kind: str,
    *,
    runs: str | os.PathLike[str] = DEFAULT_RUNS,
    ray: bool = False,
    address: str | None = None,
    workers: int | None = None,
    device: Device = "auto",
    num_gpus: float | None = None,
    node_label: str | Sequence[str] = (),
    batch_size: int | None = None,
    shard_size: int | None = None,
    stalled_after: float | None = None,
    detach: bool = False,
    quiet: bool = False,
    trust: bool = False,
    **options: Any,
) -> Results:
    """Compute a run and the runs that it needs. A run that is done already is not computed again.

    It takes the options of `infl submit KIND`, under the same names: `--test-set paper` is
    `test_set="paper"`. An option that may be repeated takes a list or one value. `task` may also be
    a class or an object; `checkpoint`, `norms` and `s_test` may be results of an earlier call::

        trained = submit("train", task=Digits, epochs=5)
        found = submit("influence", checkpoint=trained, test=[3, 7], solver="ek-fac")
        found.top_k(5, test=3)

    Args:
        kind: A kind of run, such as train or influence; `infl submit --help` lists them.
        runs: Folder of all runs: a path, s3:// or gs://.
        ray: Compute on the Ray of this machine, which is started if it is not up. By default the
            run is computed in this process.
        address: Compute on the Ray cluster with this dashboard address.
        workers: Worker processes of Ray; by default one for each core or GPU.
        device: Where to compute.
        num_gpus: GPUs of each worker; a fraction shares a GPU.
        node_label: Compute on nodes with these labels of Ray only, each "KEY=VALUE".
        batch_size: Samples in a forward pass; for "train", samples in a step.
        shard_size: Samples of a shard, or models in retraining experiments.
        stalled_after: Seconds without progress after which a worker is replaced; by default 1800.
        detach: Return as soon as the job is submitted to Ray.
        quiet: Show no progress.
        trust: Run the code that a run's task names, though it was not named on this machine.
        options: Options of the kind of run, and of its task.

    Returns:
        The results. Those of a detached run are what is there so far.

    Raises:
        InflError: The request cannot be carried out, or the run failed. Finished shards are kept,
            and the same call goes on from there.
    """

    def say(line: str) -> None:
        if not quiet:
            # What a notebook gets on standard error looks like an error.
            print(line, file=sys.stdout if in_notebook() else sys.stderr)

    if trust:
        trust_all()
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
                "node_label": node_label,
                "batch_size": batch_size,
                "shard_size": shard_size,
                "stalled_after": stalled_after,
                "local": not (ray or address),
                "detach": detach,
            }
        )
        specs = found.request_type.of(options).specs(root, say)
        if len(specs) > 1:
            raise SpecError(
                f"{kind} at {len(specs)} checkpoints makes {len(specs)} runs: name one at a time"
            )
        run = Run(root, specs[0])
        carry_out(run, how, say, quiet=quiet)
    except InflError as error:
        raise error.for_python() from error
    return Results(root, run.id)
