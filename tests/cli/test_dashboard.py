"""`infl cluster dashboard`: which cluster, and what is said."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from infl_cli import cluster
from infl_cluster.client import JobClient

Infl = Callable[..., Any]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the browser was to open; a dashboard that answers."""
    found: list[str] = []
    monkeypatch.setattr(JobClient, "version", lambda self: {})
    monkeypatch.setattr(cluster, "open_signed_in", lambda client: not found.append(client.address))
    monkeypatch.setattr(cluster, "copy_token", lambda client: f"copied {client.token}")
    head = SimpleNamespace(client=lambda: JobClient("http://127.0.0.1:1", "here"))
    monkeypatch.setattr(cluster, "current_head", lambda: head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "there")
    monkeypatch.setenv("DISPLAY", ":77")
    return found


def test_the_dashboard_of_this_machine_is_opened(infl: Infl, opened: list[str]) -> None:
    answer = infl("cluster", "dashboard")
    assert answer.err == "http://127.0.0.1:1 is opened in your browser\nit is signed in\n"
    assert opened == ["http://127.0.0.1:1"]


def test_that_of_a_tunnel_too(infl: Infl, opened: list[str]) -> None:
    assert infl("cluster", "dashboard", "--address", "http://localhost:2").code == 0
    assert opened == ["http://localhost:2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--copy",), "http://127.0.0.1:1: copied here\n"),
        (("--address", "https://ray.example.com"), "https://ray.example.com: copied there\n"),
    ],
)
def test_of_another_host_or_on_demand_the_token_is_copied(
    infl: Infl, opened: list[str], words: tuple[str, ...], said: str
) -> None:
    assert infl("cluster", "dashboard", *words).err == said
    assert opened == []


def test_a_browser_that_does_not_come_is_told(
    infl: Infl, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "open_signed_in", lambda client: False)
    lines = infl("cluster", "dashboard").err.splitlines()
    assert lines[1:] == [
        "the browser has not come for the page that signs it in",
        "http://127.0.0.1:1: copied here",
    ]


def test_without_ray_there_is_none(
    infl: Infl, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "current_head", lambda: None)
    answer = infl("cluster", "dashboard")
    assert answer.code == 2
    assert answer.err.startswith("error: no Ray of infl is up on this machine")


def test_plain_http_to_another_machine_is_refused(infl: Infl, opened: list[str]) -> None:
    answer = infl("cluster", "dashboard", "--address", "http://ray.example.com:8265")
    assert answer.code == 2
    assert "clear text" in answer.err
