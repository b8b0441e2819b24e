"""`infl cluster wait`, and what `--dry-run` learns of a cluster; a server gives Ray's answers."""

import json
import time

import pytest
import typer.testing

from infl_cli import dry_run
from infl_cli.cluster import app
from infl_cluster.client import TokenRefused
from infl_cluster.how import How

from .test_client import http_server


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster")


def nodes(*found):
    return json.dumps({"data": {"result": {"result": found}}})


def node(state="ALIVE", **resources):
    return {"state": state, "resources_total": resources, "labels": {"zone": "a"}}


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_told_at_once(status):
    began = time.monotonic()
    with http_server(status) as (address, seen):
        found = typer.testing.CliRunner().invoke(app, ["wait", "--address", address])
    assert isinstance(found.exception, TokenRefused)  # an InflError: one line, exit code 2
    said = str(found.exception)
    assert f"Ray at {address} refuses the token from RAY_AUTH_TOKEN" in said
    assert "or unset it and set RAY_AUTH_TOKEN_PATH" in said
    assert len(seen) == 1
    assert time.monotonic() - began < 60  # of 300 s


def test_a_head_that_is_not_up_is_told_with_its_cure_once():
    with http_server() as (address, _):
        pass  # its port is closed now
    words = ["wait", "--address", address, "--timeout", "0.1"]
    said = str(typer.testing.CliRunner().invoke(app, words).exception)
    assert said.startswith(f"after 0 s no Ray answers at {address}: ")
    assert said.count("is the head up") == 1


def test_nodes_that_are_up_are_counted():
    with http_server(body=nodes(node(), node(), node("DEAD"))) as (address, _):
        words = ["wait", "--address", address, "--nodes", "2"]
        found = typer.testing.CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.exception


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({}, 6),  # one a GPU
        ({"device": "cpu"}, 12),
        ({"num_gpus": 0.5}, 12),
        ({"workers": 3}, 3),
        ({"node_label": ["zone=b"]}, 1),
    ],
)
def test_a_dry_run_asks_the_cluster_for_its_workers(options, workers):
    body = nodes(node(CPU=8.0, GPU=4.0), node(CPU=4.0, GPU=2.0), node("DEAD", CPU=64.0))
    with http_server(body=body) as (address, seen):
        found, said = dry_run._workers(How.checked({"address": address, **options}))
    assert found == workers
    assert bool(seen) == bool(said) == ("workers" not in options)


def test_a_dry_run_says_that_it_could_not_ask():
    with http_server(403) as (address, _):
        found, said = dry_run._workers(How.checked({"address": address}))
    assert found == 1
    assert "give their number with --workers: Ray at" in said
