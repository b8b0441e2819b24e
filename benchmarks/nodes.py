"""How speed grows from one node to two: FFDNet norms by jobs on raylets of this machine.

Each node has as many cores as asked for and as many workers, with one thread each; two nodes
of one core each take two cores. The rate is that of the shards: samples a second from the start of
the first shard to the end of the last. All else is real: driver, workers, lease, manifest, arrays.

    python benchmarks/nodes.py [--cores 1] [--patches 4096]
"""

import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import header, print_table, spread
from ray.cluster_utils import Cluster

from influence_jobs.kinds import find_kind
from influence_jobs.models.ffdnet import FFDNet
from influence_jobs.store import layout
from influence_jobs.store.run import Run

OBJECT_STORE_BYTES = 80_000_000
FOLDER = "INFL_NODES_FOLDER"


def rate(address: str, folder: Path, patches: int, workers: int) -> float:
    """Samples a second of a run on the nodes that there are."""
    options = {
        "task": "ffdnet",
        "stride": 9,
        "limit": patches,
        "layer": ["11"],
        "checkpoint": [str(folder / "weights.pt")],
    }
    with tempfile.TemporaryDirectory(dir=folder) as root:
        (spec,) = find_kind("grad-norms").request_type.of(options).specs(root, lambda _: None)
        run = Run.create(root, spec)
        words = ["-m", "infl_cluster.driver_main", root, run.id, f"--workers={workers}"]
        sizes = ["--shard-rows=256", "--batch-size=32"]
        environment = {**os.environ, "RAY_ADDRESS": address}
        subprocess.run([sys.executable, *words, *sizes], env=environment, check=True)
        shards = [e for name, e in run.manifest.done().items() if name != layout.FINISH]
        ends = [entry.finished_at or 0.0 for entry in shards]
        began = min(end - entry.seconds for end, entry in zip(ends, shards, strict=True))
        return patches / (max(ends) - began)


def with_a_token() -> None:
    """This script again, with a folder and a token: Ray reads the token's place when it loads."""
    with tempfile.TemporaryDirectory(prefix="infl-") as folder:
        (Path(folder) / "token").write_text(secrets.token_hex(32))
        more = {
            FOLDER: folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        more = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more
        subprocess.run([sys.executable, *sys.argv], env=more, check=True)


def main(
    cores: Annotated[int, typer.Option(help="Cores and workers of a node.")] = 1,
    patches: Annotated[int, typer.Option(help="Patches of a run.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Runs on one node, and on two.")] = 3,
) -> None:
    """Print the rates of one node and of two."""
    if FOLDER not in os.environ:
        with_a_token()
        return
    folder = Path(os.environ[FOLDER])
    header("Nodes: FFDNet norms on one and on two")
    torch.save(FFDNet(color=True).state_dict(), folder / "weights.pt")
    store = {"object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "temp_dir": str(folder), **store})
    pairs = []
    try:
        cluster.add_node(num_cpus=cores, **store)
        for _ in range(rounds):
            alone = rate(cluster.address, folder, patches, cores)
            second = cluster.add_node(num_cpus=cores, **store)
            pairs.append((alone, rate(cluster.address, folder, patches, 2 * cores)))
            cluster.remove_node(second)
    finally:
        cluster.shutdown()
    one, two = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    gain = spread([both / alone for alone, both in pairs])
    print_table(["", "1 node, samples/s", "2 nodes", "ratio"],
                [[f"{cores} worker(s) a node", f"{one:,.0f}", f"{two:,.0f}", gain]])  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
