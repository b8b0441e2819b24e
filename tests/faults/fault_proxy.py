"""A proxy before a server that speaks S3, which disturbs what goes through it."""

import http.client
import random
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SERVED, REFUSED, LOST, FAILED, CUT, SLOW = "served", "503", "lost", "500", "cut", "slow"

Decide = Callable[[str, str, int], str]
"""From method, path and the number of the request to what happens to it."""


class Proxy:
    """Forwards requests, and does to each what `decide` says.

    `503`: it is refused. `lost`: it is carried out, and the connection closed without an answer.
    `500`: it is carried out, and the answer is an error. `cut`: half of the answer arrives.
    `slow`: it takes a second.
    """

    def __init__(self, host: str, port: int) -> None:
        self.decide: Decide = lambda _method, _path, _number: SERVED
        self.counts: dict[str, int] = {}
        self._number = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = proxy.next(self.command, self.path)
                if what == REFUSED:
                    self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                    return
                if what == SLOW:
                    time.sleep(1)
                server = http.client.HTTPConnection(host, port, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                found = server.getresponse()
                data, headers = found.read(), dict(found.getheaders())
                server.close()
                if what == LOST:
                    self._hang_up()
                elif what == FAILED:
                    self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
                elif what == CUT and data:
                    self._answer(found.status, headers, data, send=len(data) // 2)
                    self._hang_up()
                else:
                    self._answer(found.status, headers, data)

            def _answer(
                self, code: int, headers: dict[str, str], data: bytes, send: int | None = None
            ) -> None:
                self.send_response_only(code)
                skipped = {"content-length", "transfer-encoding", "connection"}
                for name, value in headers.items():
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                self.wfile.write(data[:send])
                self.wfile.flush()

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next(self, method: str, path: str) -> str:
        with self._lock:
            self._number += 1
            what = self.decide(method, path, self._number)
            self.counts[what] = self.counts.get(what, 0) + 1
        return what

    def disturb(self, decide: Decide) -> None:
        with self._lock:
            self.counts, self._number, self.decide = {}, 0, decide

    def heal(self) -> None:
        self.disturb(lambda _method, _path, _number: SERVED)

    def close(self) -> None:
        self._server.shutdown()


def first(count: int, what: str) -> Decide:
    """The first requests."""
    return lambda _method, _path, number: what if number <= count else SERVED


def every(nth: int, what: str, method: str | None = None) -> Decide:
    """Every nth request, or every nth of a method."""
    seen = [0]

    def decide(found: str, _path: str, _number: int) -> str:
        if method not in (None, found):
            return SERVED
        seen[0] += 1
        return what if seen[0] % nth == 0 else SERVED

    return decide


def one_of(path: str, method: str, what: str) -> Decide:
    """The first request of a method for a path that ends so."""
    done = []

    def decide(found: str, where: str, _number: int) -> str:
        if not done and found == method and where.partition("?")[0].endswith(path):
            done.append(where)
            return what
        return SERVED

    return decide


def at_random(share: float, whats: tuple[str, ...], seed: int) -> Decide:
    """A share of all requests."""
    generator = random.Random(seed)

    def decide(_method: str, _path: str, _number: int) -> str:
        return generator.choice(whats) if generator.random() < share else SERVED

    return decide
