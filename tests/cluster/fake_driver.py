"""A driver for tests: carries out the requests on its standard input with `RayBackend`.

It is a process of its own: Ray reads its authentication settings only once, on import.
"""

import json
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

from infl_cluster.pool import RayBackend
from influence_jobs.errors import RuntimeFault
from influence_jobs.jobs.base import Shard
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.lease import Lease
from influence_jobs.store.run import now


def carry_out(request):
    root, spec = Path(request["root"]), SimpleNamespace(kind="fake-kind")
    files = LocalFiles(root / root.name)
    run = SimpleNamespace(root=str(root), id=root.name, spec=spec, files=files)
    shards = [Shard(name, 10 * i, 10 * i + 10) for i, name in enumerate(request["ids"])]
    backend = RayBackend(
        device="cpu", runner=f"fake_runner:{request['runner']}", **request["options"]
    )
    receipts, begun, rescues, fault = [], [], [], None

    def on_idle(_waiting):
        if request["idle_fault"]:
            raise RuntimeFault(request["idle_fault"])

    def on_receipt(receipt, again):
        receipts.append((*astuple(receipt), again))
        status = {"units_done": 10, "units_total": 20, "work_started_at": now() - 1}
        retries = sum(r[-1] for r in receipts)
        backend.show(run, {**status, "state": "running", "retries": retries})  # type: ignore[arg-type]

    try:
        with Lease(files):
            backend.run(
                run,  # type: ignore[arg-type]
                shards,
                on_start=lambda shard, worker: begun.append((shard, worker)),
                on_leave=lambda *_: None,
                on_receipt=on_receipt,
                on_rescue=lambda rescue, line, _workers: rescues.append((rescue, line)),
                on_idle=on_idle,
                quiet_s=lambda _shard: request["quiet_s"],
            )
    except RuntimeFault as error:
        fault = str(error)
    return {"receipts": receipts, "begun": begun, "rescues": rescues, "fault": fault}


if __name__ == "__main__":
    for line in sys.stdin:
        print("RESULT", json.dumps(carry_out(json.loads(line))), flush=True)
