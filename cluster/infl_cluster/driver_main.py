"""The entry point of a Ray job: `python -m infl_cluster.driver_main ROOT RUN [options]`."""

import argparse
import socket
import sys

from infl_cluster import shipping, store_access, versions
from infl_cluster.dispatch import STALLED_AFTER_S
from infl_cluster.driver import drive_when_free, stop_on_sigterm
from infl_cluster.pool import RayBackend, why_ended
from influence_jobs.errors import InflError, StoreError
from influence_jobs.store import layout
from influence_jobs.store.documents import MOST_BYTES
from influence_jobs.store.files import open_files
from influence_jobs.tasks.trust import trust_all
from influence_jobs.terms import in_a_line


def main() -> int:
    """Carry out a run with workers on the Ray cluster that started this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("run_id")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-gpus", type=float)
    parser.add_argument("--node-label", action="append", default=[])
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--shard-rows", type=int)
    parser.add_argument("--stalled-after", type=float, default=STALLED_AFTER_S)
    options = parser.parse_args()
    stop_on_sigterm(why_ended)
    store_access.take()
    shipping.unpack()
    trust_all()  # who submitted this has been asked
    backend = RayBackend(
        options.workers,
        device=options.device,
        num_gpus=options.num_gpus,
        node_labels=dict(label.split("=", 1) for label in options.node_label),
        stalled_after_s=options.stalled_after,
    )
    try:
        versions.require_same()
        _require_folder(options.root, options.run_id)
        drive_when_free(
            options.root,
            options.run_id,
            backend,
            shard_rows=options.shard_rows,
            batch_size=options.batch_size,
        )
    except InflError as error:
        print(f"error: {in_a_line(str(error))}", file=sys.stderr)
        return 2
    finally:
        store_access.forget()
    return 0


def _require_folder(root: str, run_id: str) -> None:
    """Refuse a run whose folder this node does not see.

    Raises:
        StoreError: The message names the node.
    """
    files = open_files(root).sub(run_id)
    try:
        files.read(layout.SPEC, most=MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"{files.url} is not on {socket.gethostname()}, the node that directs the run: put the "
            "runs on storage that all nodes share, and name that with --runs"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
