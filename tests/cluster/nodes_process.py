"""Several nodes of Ray on this machine, for tests: one JSON command on standard input, one answer.

A process of its own, as Ray reads its authentication settings only once, on import.
"""

import json
import subprocess
import sys
import time
from functools import partial

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80_000_000


class Elsewhere:
    """A node that does not see a folder of this machine."""

    def __init__(self, address: str, hidden: str, options: dict) -> None:
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}"]
        argv += ["--block", f"--num-cpus={options['num_cpus']}", "--disable-usage-stats"]
        argv += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        argv += ["--labels=" + ",".join(f"{k}={v}" for k, v in options["labels"].items())]
        words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', hidden]
        self.process = subprocess.Popen([*words, *argv], stdout=sys.stderr)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def patiently(start):
    """Start again if a busy machine took longer than the 30 seconds that Ray gives a node."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def alive(cluster: Cluster) -> int:
    return sum(node["Alive"] for node in cluster.global_state.node_table())


def main() -> None:
    # The head computes nothing, so that what is computed is on the nodes.
    head = {
        "num_cpus": 0,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,
        "dashboard_port": 0,
    }
    cluster = patiently(partial(Cluster, initialize_head=True, head_node_args=head))
    nodes = {}
    print("ANSWER", json.dumps(cluster.address), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if name := command.get("remove"):
            node = nodes.pop(name)
            if isinstance(node, Elsewhere):
                node.end()
            else:
                cluster.remove_node(node, allow_graceful=False)
            answer = None
        elif command["hidden"]:
            before = alive(cluster)
            name = command["add"]
            nodes[name] = Elsewhere(cluster.address, command["hidden"], command["options"])
            while alive(cluster) == before:
                time.sleep(0.1)
            answer = None
        else:
            options = {"object_store_memory": OBJECT_STORE_BYTES, **command["options"]}
            node = nodes[command["add"]] = patiently(partial(cluster.add_node, **options))
            answer = node.node_id
        print("ANSWER", json.dumps(answer), flush=True)
    for node in nodes.values():
        if isinstance(node, Elsewhere):
            node.end()
    for node in [*cluster.worker_nodes, cluster.head_node]:
        cluster.remove_node(node, allow_graceful=False)  # a GCS may take minutes to end in order


if __name__ == "__main__":
    main()
