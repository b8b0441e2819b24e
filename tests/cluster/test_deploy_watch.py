"""Every query of the Grafana dashboard finds what a running job says of itself."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from infl_cluster.head import Head
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run
from influence_jobs.store.status import read_status

WATCH = Path(__file__).parents[2] / "cluster" / "deploy" / "watch"
DASHBOARD = json.loads((WATCH / "grafana-dashboard.json").read_text())
SERVICE_DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
LONG_S = 240.0
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# The units in use, which getValueFormats() of @grafana/data has: any other word is shown as it is.
UNITS = {"bytes", "dtdhms", "locale", "percentunit", "short"}

TASK = """
import time
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from influence_jobs import Task


class Slow(Task):
    def model(self):
        return nn.Linear(3, 2)

    def train_data(self):
        torch.manual_seed(0)
        return TensorDataset(torch.rand(60000, 3), torch.arange(60000) % 2)

    def losses(self, model, batch):
        time.sleep(3.0 if len(batch[1]) == 1024 else 0.0)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def expressions() -> dict[str, str]:
    """The queries of all panels, by panel and reference."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }


def test_the_dashboard_shows_what_was_promised() -> None:
    titles = " ".join(panel["title"].lower() for panel in DASHBOARD["panels"])
    for what in ("samples per second", "shards done", "retries", "stragglers", "time left", "gpu"):
        assert what in titles
    for name, query in expressions().items():
        # Two folders may have runs of one request, which have the same id.
        assert "by (run, folder" in query, name
        chosen = re.findall(r"{(.*?)}", query)
        assert {*chosen} == {'run=~"$run", folder=~"$folder"'}, name
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for p in places
        for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]  # fmt: skip
    assert len({*cells}) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_query_asks_the_prometheus_that_the_user_chooses() -> None:
    chosen, folder, run = DASHBOARD["templating"]["list"]
    assert (chosen["name"], chosen["type"], chosen["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    asking = [
        folder,
        run,
        *DASHBOARD["panels"],
        *(t for p in DASHBOARD["panels"] for t in p["targets"]),
    ]
    assert [a["datasource"] for a in asking] == [SOURCE] * len(asking)
    assert "__inputs" not in DASHBOARD


def test_values_are_said_in_units_that_grafana_knows() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]


def test_legends_name_the_run_and_only_labels_of_the_answer() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            named = re.findall(r"{{(\w+)}}", target["legendFormat"])
            kept, *_ = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            assert named[0] == "run", panel["title"]
            # A folder is long: one panel tells which is which.
            assert {*named} - {"folder"} == {*kept.split(", ")} - {"folder"}, panel["title"]
            assert ("folder" in named) == (panel["title"] == "Progress")
            # Ray's own id of a worker has 56 digits, and `infl logs` names its process.
            assert ("worker" in named) == ("each worker" in panel["title"])


def test_no_value_is_red_because_it_is_above_80() -> None:
    """Grafana paints so what has no thresholds of its own, in panels that show the last value."""
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "timeseries":
            steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
            plain = panel["options"].get("colorMode") == "none"
            assert plain or [s["value"] for s in steps] == [None], panel["title"]


def test_time_left_is_of_runs_that_are_at_work() -> None:
    """The last value within the time shown would be that of a run that has failed, for hours."""
    (panel,) = (p for p in DASHBOARD["panels"] if p["title"] == "Time left")
    assert [t["instant"] and not t["range"] for t in panel["targets"]] == [True]


def test_overrides_are_of_queries_of_the_panel() -> None:
    for panel in DASHBOARD["panels"]:
        queries = [target["refId"] for target in panel["targets"]]
        assert len({*queries}) == len(queries)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["id"] == "byFrameRefID"
            assert override["matcher"]["options"] in queries, panel["title"]


@contextmanager
def prometheus(head: Head, folder: Path) -> Iterator[str]:
    """Prometheus with our file, told only where this Ray lies and to look every second."""
    settings = yaml.safe_load((WATCH / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [SERVICE_DISCOVERY]}]
    found = head.temp_dir / Path(SERVICE_DISCOVERY).name
    job["file_sd_configs"] = [{"files": [str(found)], "refresh_interval": "1s"}]
    settings["global"]["scrape_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT
    ) as server:  # fmt: skip
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def asked(url: str, path: str, **query: str) -> Any:
    address = f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path} {query}: {error.read().decode()}")
    except urllib.error.URLError:  # it is still starting
        return {"result": []}


def values(url: str, run: Run, query: str) -> list[float]:
    query = query.replace("$run", run.id).replace("$folder", run.root)
    query = query.replace("$__rate_interval", "5m")
    found = asked(url, "query", query=query)["result"]
    own = (run.id, run.root)
    assert all((s["metric"]["run"], s["metric"]["folder"]) == own for s in found)
    return [float(series["value"][1]) for series in found]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus: apt-get install it")
def test_every_query_finds_the_running_job(
    ray_head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_norms.py").write_text(TASK)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "weights.pt")
    infl = [sys.executable, "-c", "from infl_cli.entry import main; main()"]
    words = (
        "submit grad-norms --task slow_norms.py:Slow --layer all --checkpoint weights.pt --detach"
    )
    more = f"--workers 2 --batch-size 1024 --address {ray_head.dashboard_url}".split()
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(ray_head.token_path)}
    monkeypatch.chdir(tmp_path)
    subprocess.run([*infl, *words.split(), *more], env=environment, check=True)
    run = find_run(str(tmp_path / "runs"), "grad-norms")
    own = (run.root, run.id)
    waiting, found = expressions(), dict[str, list[float]]()
    deadline = time.monotonic() + LONG_S
    try:
        with prometheus(ray_head, tmp_path) as url:
            while waiting and time.monotonic() < deadline:
                assert read_status(run)["state"] in ("new", "running"), read_status(run)
                for name, query in [*waiting.items()]:
                    if answer := values(url, run, query):
                        found[name] = answer
                        del waiting[name]
                time.sleep(0.5)
            assert not waiting
            for chosen, value in zip(DASHBOARD["templating"]["list"][1:], own, strict=True):
                query = chosen["query"]["query"].replace("$folder", run.root)
                metric, name = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
                assert name == chosen["name"]
                assert value in asked(url, f"label/{name}/values", **{"match[]": metric})
            # What `infl status` says, and nothing of its own.
            status = read_status(run)
            (total,) = values(url, run, "ray_infl_run_samples{run=~'$run'}")
            (shards,) = values(url, run, "ray_infl_run_shards{run=~'$run'}")
            (done,) = values(url, run, "ray_infl_run_samples_done{run=~'$run'}")
            each = asked(url, "query", query=f"ray_infl_samples_per_second{{run='{run.id}'}}")
            workers = [series["metric"]["worker"] for series in each["result"]]
    finally:
        subprocess.run([*infl, "stop", run.id], env=environment, check=True)
    assert total == status["units_total"] == 60000
    assert shards == status["shards_total"] > 1
    assert 0 < done <= status["units_done"]
    assert found["Retries A"] == found["Stragglers B"] == [0.0]
    assert all(memory == 0 for memory in found["GPU memory of each worker A"])
    logs = subprocess.check_output([*infl, "logs", run.id], env=environment, text=True)
    assert workers and all(worker in logs for worker in workers)
