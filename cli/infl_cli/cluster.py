"""`infl cluster`: the Ray on this machine."""

import time
from typing import Annotated

import typer

from infl_cli import options as o
from infl_cli import render
from infl_cli.render import say
from infl_cluster.client import TokenRefused, remote_client
from infl_cluster.dashboard import can_sign_in, copy_token, open_signed_in
from infl_cluster.head import current_head, ensure_head, recorded_head, remains, stop_head
from influence_jobs.errors import RuntimeFault

app = typer.Typer(
    no_args_is_help=True,
    help="Start and stop the Ray on this machine that runs use, and look at it; wait for another "
    "one, or open its dashboard, with --address.",
)

NONE = "no Ray of infl is up on this machine; a run starts one, and so does infl cluster up"


@app.command()
def up(
    num_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs to offer; all by default.")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs to offer; all by default.")
    ] = None,
) -> None:
    """Start Ray and keep it until `infl cluster down`. Without it, a run starts Ray itself."""
    if (num_cpus is not None or num_gpus is not None) and current_head() is not None:
        say("Ray is up already and keeps its CPUs and GPUs; to change them: infl cluster down")
    head = ensure_head(idle_timeout_s=None, num_cpus=num_cpus, num_gpus=num_gpus)
    say(f"Ray is up: dashboard {head.dashboard_url}, token in {head.token_path}")


@app.command()
def status(json: o.Json = False) -> None:
    """Show whether Ray is up, and the addresses of its dashboard and metrics."""
    head = current_head()
    left = [process.pid for process in remains()] if head is None else []
    if json:
        up = (
            {"dashboard": head.dashboard_url, "metrics": head.metrics_url, "pid": head.pid}
            if head
            else {}
        )
        render.print_json({"up": head is not None, "left": left, **up})
    elif left:
        say(
            f"Ray has died, and processes of it are left ({len(left)}, such as {left[0]}): "
            "infl cluster down ends them; the next run does, too, and starts a new Ray"
        )
    elif head is None:
        say(NONE)
    else:
        idle = head.idle_timeout_s
        render.print_fields(
            [
                ("dashboard", head.dashboard_url),
                ("token", head.token_path),
                ("metrics", head.metrics_url),
                ("pid", head.pid),
                ("ends itself", "never" if idle is None else f"after {idle / 60:.0f} idle minutes"),
                ("jobs", ", ".join(head.client().unfinished()) or "none"),
            ]
        )


@app.command()
def dashboard(
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard of a Ray cluster, not that of this machine."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the token, and open no browser.")
    ] = False,
) -> None:
    """Open the Ray dashboard signed in. Without a browser here, copy its token and say so."""
    if address is None:
        head = current_head()
        if head is None:
            raise RuntimeFault(NONE)
        client = head.client()
    else:
        client = remote_client(address)
    client.version()  # a wrong token is said here, and not by the browser
    if not copy and can_sign_in(client):
        say(f"{client.address} is opened in your browser")
        if open_signed_in(client):
            say("it is signed in")
            return
        say("the browser has not come for the page that signs it in")
    say(f"{client.address}: {copy_token(client)}")


@app.command()
def wait(
    address: Annotated[str, typer.Option(metavar="URL", help="Dashboard of a Ray cluster.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes to wait for.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 300.0,
) -> None:
    """Wait until nodes of a Ray cluster are up. A run may begin before: later ones get workers too.

    How many workers a run has at most, and how many CPUs each takes, is settled when it begins.
    """
    client = remote_client(address)
    began, up, why = time.monotonic(), 0, ""
    while up < nodes:
        if time.monotonic() - began > timeout:
            late = f"after {timeout:.0f} s"
            if why:
                raise RuntimeFault(f"{late} {why}")
            found = f"{up} of {nodes} nodes of {address} are up {late}"
            raise RuntimeFault(f"{found}: look at Ray's logs on the others")
        time.sleep(0.2)
        try:
            up, why = client.num_nodes(), ""
        except TokenRefused:
            raise
        except RuntimeFault as fault:
            up, why = 0, str(fault)
    say(f"{up} of {nodes} nodes of {address} are up")


@app.command()
def down() -> None:
    """Stop Ray and all its processes. Interrupted runs can be resumed."""
    head = recorded_head()
    if head is None:
        say(NONE)
        return
    stop_head(head)
    say("Ray is down")
