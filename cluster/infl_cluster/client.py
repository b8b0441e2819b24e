"""A client of Ray's Jobs REST API: a deadline for every call, a one-line error for every fault.

Ray's own `JobSubmissionClient` waits for ever if the head hangs. It prefers `RAY_ADDRESS` to the
address it is given, and would send our token there. It also follows proxies and redirects. This
client does none of that, and does not import ray.
"""

import contextlib
import http.client
import ipaddress
import json
import shlex
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Any
from urllib.parse import quote, urlsplit

from infl_cluster.tokens import find_token
from influence_jobs.errors import RuntimeFault

MOST_NODES = 10_000  # that Ray lists
MOST_BYTES = 2**28  # of an answer: the log of a job
SLOWEST_BYTES_PER_S = 250_000  # of an upload
NO_HTTP = (
    ". It may be Ray's own port (6379 by default): give the one of the dashboard (8265 by default)"
)
NO_ANSWER = (
    "; is the head up, the tunnel to it open, and this its dashboard's port (8265 by default)?"
)
NO_AGENT = (
    "; its agent is still starting, or another Ray on the head's host has the agent's port 52365: "
    "then start this one with a free port as its dashboard-agent-listen-port"
)
OPEN = (
    "asks for no token: whoever reaches it can run any code there, as the user that its Ray runs "
    "as; start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE on every node"
)
FINAL_STATUSES = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class UnknownJob(RuntimeFault):
    """The cluster has no job with that id: it was never submitted, or the head was restarted.

    Cure: `infl resume RUN`, which submits what is left as a new job.
    """


class NoAnswer(RuntimeFault):
    """Nothing answers at an address, not in time, or not as Ray does.

    Cure: the address of the dashboard, and a head and a tunnel that are up.
    """


class TokenRefused(RuntimeFault):
    """The cluster refuses the token, or wants one: to ask again would not help."""


class _NotThere(RuntimeFault):
    """The cluster has nothing at that path."""


class JobClient:
    """Jobs of one Ray cluster, reached through its dashboard address.

    Args:
        address: `http://HOST:PORT` or `https://HOST[:PORT][/PREFIX]` of the Ray dashboard.
        token: Ray's authentication token; None for a cluster that needs none.
        token_source: Where the token came from; named in the error if the cluster refuses it.
        timeout_s: Deadline of each call.
        cure: What the error says to do if nothing answers.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        *,
        token_source: str = "the token given",  # noqa: S107  (no token, its name)
        timeout_s: float = 30.0,
        cure: str = "",
    ) -> None:
        self.address = address.rstrip("/")
        self.token, self.token_source = token, token_source
        self._timeout_s, self._cure = timeout_s, cure
        self._scheme, self._host, self._port, self._prefix = _parse(self.address)

    def version(self) -> dict[str, str]:
        """Return the answer of `/api/version`: `ray_version`, `session_name` and more.

        Raises:
            RuntimeFault: Nothing answers there in time, it is not Ray, or it refuses the token.
        """
        answer = self._call("GET", "/api/version")
        if not isinstance(answer, dict) or "ray_version" not in answer:
            raise NoAnswer(
                f"no Ray answers at {self.address}: something else is listening there{self._cure}"
            )
        return answer

    def is_open(self) -> bool:
        """Whether the cluster answers a request without a token to which it asks for one.

        With Ray's token authentication on, `/api/version` needs one, as nearly every path does.
        """
        stranger = JobClient(self.address, None, timeout_s=self._timeout_s)
        try:
            stranger.version()
        except RuntimeFault:
            return False
        return True

    def sign_in(self) -> str:
        """Return the cookie that signs a browser in to the dashboard, as a `Set-Cookie` header.

        It is what the dashboard's own dialog gets for the token.

        Raises:
            RuntimeFault: The cluster could not be asked, or gives no cookie.
        """
        headers, _ = self._answer("POST", "/api/authenticate", {})
        if not (cookie := headers.get("Set-Cookie")):
            raise RuntimeFault(f"Ray at {self.address} gives a browser no cookie for its token")
        return cookie

    def num_nodes(self) -> int:
        """Return the number of nodes that are up. A head answers before its own node is up.

        Raises:
            RuntimeFault: The cluster could not be asked.
        """
        return len(self.nodes())

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that are up, with their `resources_total` and `labels`.

        Raises:
            RuntimeFault: The cluster could not be asked.
        """
        answer = self._call("GET", f"/api/v0/nodes?limit={MOST_NODES}&detail=1")
        found = answer["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

    def submit(
        self,
        entrypoint: Sequence[str],
        *,
        submission_id: str,
        metadata: Mapping[str, str],
        env: Mapping[str, str],
        package: str | None = None,
    ) -> str:
        """Start a job and return its submission id.

        The dashboard shows the entry point, the metadata and `env`: they must hold no secret.

        Args:
            entrypoint: argv of the driver. Every word is quoted for the shell.
            submission_id: Our name for the job. A cluster accepts each name once.
            metadata: Shown on the job's page.
            env: Environment variables of the driver and its workers.
            package: Name of an uploaded archive, in which driver and workers start.

        Raises:
            RuntimeFault: The id was used before, or the cluster could not be asked.
        """
        body = {
            "entrypoint": shlex.join(entrypoint),
            "submission_id": submission_id,
            "metadata": dict(metadata),
            "runtime_env": {
                "env_vars": dict(env),
                **({} if package is None else {"working_dir": f"gcs://{package}"}),
            },
        }
        answer = self._call("POST", "/api/jobs/", body)
        return str(answer["submission_id"])

    def upload(self, name: str, data: bytes) -> None:
        """Give the cluster a zip file for jobs, unless it has one of that name.

        Raises:
            RuntimeFault: The cluster could not be asked.
        """
        path = f"/api/packages/gcs/{name}"
        try:
            self._call("GET", path)  # Ray keeps what was asked for until a job uses it
        except _NotThere:
            self._call("PUT", path, data)
            self._call("GET", path)

    def status(self, submission_id: str) -> str:
        """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

        Raises:
            UnknownJob: The cluster has no such job.
            RuntimeFault: The cluster could not be asked.
        """
        return str(self._call("GET", _job_path(submission_id))["status"])

    def stop(self, submission_id: str) -> None:
        """Ask a job to end: SIGTERM now, SIGKILL some seconds later. Ignored by a finished job.

        Raises:
            UnknownJob: The cluster has no such job.
            RuntimeFault: The cluster could not be asked.
        """
        self._call("POST", _job_path(submission_id, "/stop"))

    def logs(self, submission_id: str) -> str:
        """Return all that the driver has printed so far.

        Raises:
            UnknownJob: The cluster has no such job.
            RuntimeFault: The cluster could not be asked.
        """
        return str(self._call("GET", _job_path(submission_id, "/logs"))["logs"])

    def unfinished(self) -> list[str]:
        """Return the submission ids of the jobs that are waiting or running.

        Raises:
            RuntimeFault: The cluster could not be asked.
        """
        jobs = self._call("GET", "/api/jobs/")
        return [
            job["submission_id"]
            for job in jobs
            if job.get("submission_id") and job["status"] not in FINAL_STATUSES
        ]

    def _call(self, method: str, path: str, body: Mapping[str, Any] | bytes | None = None) -> Any:
        _, text = self._answer(method, path, body)
        try:
            return json.loads(text or "null")
        except ValueError:
            raise NoAnswer(
                f"no Ray answers at {self.address}: something else is listening there{self._cure}"
            ) from None

    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | bytes | None
    ) -> tuple[Message, str]:
        headers = {"Content-Type": "application/json"} if isinstance(body, Mapping) else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        deadline_s = self._timeout_s
        if isinstance(body, bytes):
            deadline_s += len(body) / SLOWEST_BYTES_PER_S
        connection: http.client.HTTPConnection
        if self._scheme == "https":
            connection = http.client.HTTPSConnection(
                self._host,
                self._port,
                timeout=deadline_s,
                context=ssl.create_default_context(),
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=deadline_s)
        # A socket's timeout is of each read: whoever answers a byte a second would never end.
        expired = threading.Event()
        timer = threading.Timer(deadline_s, _cut, (connection, expired))
        timer.daemon = True
        try:
            payload = json.dumps(body) if isinstance(body, Mapping) else body
            connection.connect()
            timer.start()
            connection.request(method, self._prefix + path, payload, headers)
            response = connection.getresponse()
            answer = response.read(MOST_BYTES + 1)
            if expired.is_set():
                raise TimeoutError
            if len(answer) > MOST_BYTES:
                raise http.client.HTTPException("an answer without an end")
            text = answer.decode(errors="replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            cure = self._cure
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            if expired.is_set() or isinstance(error, TimeoutError):
                reason = f"no whole answer in {deadline_s:.3g} s"
            elif type(error) is http.client.BadStatusLine:  # its text is what was sent instead
                reason, cure = "what listens there does not speak HTTP", NO_HTTP
            raise NoAnswer(f"no Ray answers at {self.address}: {reason}{cure}") from None
        finally:
            timer.cancel()
            connection.close()
        if response.status == 200:
            return response.headers, text
        raise self._fault(response.status, path, text, body)

    def _fault(
        self, status: int, path: str, text: str, body: Mapping[str, Any] | bytes | None
    ) -> RuntimeFault:
        if status == 401 and self.token is None:
            return TokenRefused(
                f"Ray at {self.address} wants a token: set RAY_AUTH_TOKEN_PATH to its token file"
            )
        if status in (401, 403):
            cure = "set RAY_AUTH_TOKEN_PATH to that cluster's token file"
            if self.token_source == "RAY_AUTH_TOKEN":  # noqa: S105  (a name; it goes before a file)
                cure = f"give it that cluster's token, or unset it and {cure}"
            return TokenRefused(
                f"Ray at {self.address} refuses the token from {self.token_source}: {cure}"
            )
        job = path.removeprefix("/api/jobs/").split("/")[0]  # empty for other paths
        if status == 404 and job:
            return UnknownJob(
                f"Ray at {self.address} has no job {job}: it may have been restarted since"
            )
        if isinstance(body, Mapping) and "already exists" in text:
            return RuntimeFault(
                f"job {body['submission_id']} was submitted to {self.address} before: "
                "a submission id can be used only once"
            )
        said = text.strip().rsplit("\n", 1)[-1][:300]
        if "No available agent" in said:
            said = said.rstrip(".") + NO_AGENT
        kind = _NotThere if status == 404 else RuntimeFault
        return kind(f"Ray at {self.address} answered {status} to {path}: {said}")


def _cut(connection: http.client.HTTPConnection, expired: threading.Event) -> None:
    """End a call whose time is over."""
    expired.set()
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def remote_client(address: str, *, timeout_s: float = 30.0) -> JobClient:
    """Return a client of the cluster that the user names with `--address`.

    The token is RAY_AUTH_TOKEN, else the content of the file RAY_AUTH_TOKEN_PATH, else that of
    `~/.ray/auth_token`. A cluster without a token is refused.

    Raises:
        RuntimeFault: No usable address, no token, or plain http to another machine, which would
            send the token in clear text.
    """
    scheme, host, port, _ = _parse(address)
    if scheme == "http" and not is_loopback(host):
        there = port or 80
        here = there if there >= 1024 else 8265  # a lower one is for root
        raise RuntimeFault(
            f"{address} would carry the token in clear text: use https, or an SSH tunnel "
            f"(ssh -L {here}:localhost:{there} {host}) and http://localhost:{here}"
        )
    token, source = find_token()
    return JobClient(address, token, token_source=source, timeout_s=timeout_s, cure=NO_ANSWER)


def _parse(address: str) -> tuple[str, str, int | None, str]:
    """Split a dashboard address into scheme, host, port and path prefix."""
    parts = urlsplit(address)
    if parts.scheme == "ray":
        raise RuntimeFault(
            f"{address} is a Ray client address: give the dashboard's, http://{parts.hostname}:8265"
        )
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise RuntimeFault(f"cannot use the address {address}: give http(s)://HOST:PORT")
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _job_path(submission_id: str, action: str = "") -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}{action}"
