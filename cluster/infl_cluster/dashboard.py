"""The way of a browser to a Ray dashboard that asks for a token.

A browser is signed in by a cookie. Browsers keep cookies by host, whatever the port, so a page of
ours on the dashboard's host can set it. The token is in the header of that one answer: in no
address, no log and no list of processes. The page has an address that nobody can guess, answers
once, and the browser learns of it from a file that only its owner can read.
"""

import base64
import contextlib
import html
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from threading import Thread
from typing import TextIO
from urllib.parse import urlsplit

from infl_cluster.client import JobClient, is_loopback
from influence_jobs.home import infl_home, private_dir

WAIT_S = 30.0  # for the browser
COPY_DEADLINE_S = 5.0
_REDIRECT = """<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}"><title>Ray dashboard</title>
<a href="{url}">Ray dashboard</a>"""
# Each takes a text on standard input: its name, its options, and the variable of its display.
_COPIERS = (
    ("wl-copy", (), "WAYLAND_DISPLAY"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY"),
    ("xsel", ("--clipboard", "--input"), "DISPLAY"),
    ("pbcopy", (), None),
)


def can_sign_in(client: JobClient) -> bool:
    """Whether a browser here can be signed in: a page of ours sets cookies of this machine only."""
    return is_loopback(urlsplit(client.address).hostname or "") and _has_browser()


def open_signed_in(
    client: JobClient,
    *,
    wait_s: float = WAIT_S,
    browse: Callable[[str], bool] = webbrowser.open,
) -> bool:
    """Open a dashboard of this machine (`can_sign_in`) in the browser, signed in.

    Args:
        client: Of the cluster. Its token is tried first.
        wait_s: How long to wait for the browser.
        browse: Opens an address.

    Returns:
        False if the browser does not come.

    Raises:
        RuntimeFault: The cluster cannot be asked, or it refuses the token.
    """
    host = urlsplit(client.address).hostname or ""
    cookie = client.sign_in()
    with _SignIn(host, client.address, cookie) as page, _redirect_to(page.url) as file:
        opened: list[bool] = []
        # In a thread: some browsers are waited for until they are closed.
        Thread(target=lambda: opened.append(browse(file.as_uri())), daemon=True).start()
        deadline = time.monotonic() + wait_s
        while not page.used and opened != [False] and time.monotonic() < deadline:
            page.handle_request()
        return page.used


def copy_token(client: JobClient, terminal: TextIO = sys.stderr) -> str:
    """Copy the token to the clipboard, and say what was done, or where the token is."""
    token = client.token or ""
    for name, options, display in _COPIERS:
        if (display is None or os.environ.get(display)) and (program := shutil.which(name)):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                # Some go on in the background and keep their output open.
                subprocess.run(
                    [program, *options],
                    input=token.encode(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=COPY_DEADLINE_S,
                    check=True,
                )
                return f"its token is in the clipboard (by {name}): paste it there"
    if terminal.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        # OSC 52: the terminal puts it into its own clipboard, also at the other end of ssh.
        terminal.write(f"\033]52;c;{base64.b64encode(token.encode()).decode()}\a")
        terminal.flush()
        return (
            "its token was sent to the terminal's clipboard: paste it there; if nothing comes, the "
            f"terminal takes none, and the token is in {client.token_source}"
        )
    return f"it asks for the token, which is in {client.token_source}"


class _SignIn(TCPServer):
    """A page that sets a cookie and leads on, once."""

    def __init__(self, host: str, target: str, cookie: str) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.target, self.cookie, self.used = target, cookie, False
        self.timeout = 0.2
        super().__init__((str(address[0]), 0), _Answer)
        self.path = f"/{secrets.token_urlsafe(32)}"
        named = f"[{host}]" if ":" in host else host
        self.url = f"http://{named}:{self.server_address[1]}{self.path}"

    def handle_error(self, *_: object) -> None:
        """Say nothing: whoever hangs up gets no cookie."""


class _Answer(BaseHTTPRequestHandler):
    server: _SignIn
    timeout = 2.0  # of a connection that says nothing

    def do_GET(self) -> None:
        """Set the cookie for whoever knows the path, and lead on to the dashboard."""
        page = self.server
        right = secrets.compare_digest(self.path.encode(), page.path.encode())
        if page.used or not right:
            self.send_error(404)
            return
        page.used = True
        self.send_response(303)
        self.send_header("Set-Cookie", page.cookie)
        self.send_header("Location", f"{page.target}/")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep no log: the path is a secret for as long as it holds."""


@contextmanager
def _redirect_to(url: str) -> Iterator[Path]:
    """A file of the user alone that leads the browser on: `ps` would show the address itself."""
    folder = private_dir(infl_home() / "dashboard")
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".html")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(_REDIRECT.format(url=html.escape(url)))
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _has_browser() -> bool:
    """Whether a browser with a window can be opened; one in the terminal would take it over."""
    named = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform == "darwin"
