"""`infl view`: runs in a browser."""

import secrets
import socket
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Annotated

import typer

from infl_cli import options as o
from infl_cli.render import say
from influence_jobs.errors import SpecError
from influence_jobs.store.find import find_run
from influence_jobs.store.folder import runs_folder

LOOPBACK = "127.0.0.1"
BY_HAND = "no browser could be opened: open the address above by hand"


def view(
    run: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Ids of runs, or their first characters."),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    runs: o.Runs = o.DEFAULT_RUNS,
    trust: o.Trust = False,
) -> None:
    """Look at runs in a browser: queries, their samples, points of images, and progress.

    The viewer listens on this machine only, and asks for the token in the address that it prints.
    It reads runs and never writes. Ctrl-C ends it.
    """
    import uvicorn

    from infl_cluster.ray_job import dashboard_of
    from influence_jobs.report.viewer import make_viewer

    found = [find_run(runs_folder(runs), word) for word in run]
    token = secrets.token_urlsafe(24)
    app = make_viewer(found, token, dashboard_of)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
            listening.listen()  # a browser may be there before the server is
        except OSError as error:
            raise SpecError(
                f"cannot listen on port {port} ({error.strerror}): choose another"
            ) from error
        url = f"http://{LOOPBACK}:{listening.getsockname()[1]}/?token={token}"
        typer.echo(url)
        say("Ctrl-C ends it")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        with _in_browser(url) if open_browser else nullcontext():
            server.run(sockets=[listening])


@contextmanager
def _in_browser(url: str) -> Iterator[None]:
    """Open a browser on a private file that leads to the address.

    The address has the token in it, and all users see the arguments of a process. The file lies in
    the home folder and is not hidden: a browser in a sandbox sees neither /tmp nor ~/.infl.
    """
    with ExitStack() as until_the_end:
        try:
            private = tempfile.TemporaryDirectory(prefix="infl-view-", dir=Path.home())
            page = Path(until_the_end.enter_context(private), "open.html")
            page.touch(0o600)
            page.write_text(f'<meta http-equiv="refresh" content="0; url={url}">')
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
            say(f"{BY_HAND} ({error})")
        else:
            # In a thread: some browsers return only when they are closed.
            Thread(target=_open, args=(page.as_uri(),), daemon=True).start()
        yield


def _open(address: str) -> None:
    if not webbrowser.open(address):
        say(BY_HAND)
