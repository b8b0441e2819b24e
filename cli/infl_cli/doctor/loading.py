"""What packages say when they are loaded: in a process of its own, which a broken one may end."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from infl_cli.doctor.finding import Line

DEADLINE_S = 600.0  # a first import takes minutes on a slow disk or a machine that is overloaded
PROBE = "infl_cli.doctor.probe"


class Loading:
    """One process that loads torch and the others, and what it has found of machine and data.

    It prints a JSON object on each line: a finding (`part`, `mark`, `check`, `said`), or what it is
    about to do (`doing`).
    """

    def machine(self) -> Iterator[Line]:
        """Packages that do not load, processors, memory, GPUs."""
        yield from self._of("machine")
        if self._end:
            yield "fail", "loading", self._end

    def data(self) -> Iterator[Line]:
        """Data sets that are here, or where they would come from."""
        if self._end:
            yield "warn", "data", "not looked at, because a package does not load"
        yield from self._of("data")

    def _of(self, part: str) -> Iterator[Line]:
        for found in self._found[0]:
            if found.get("part") == part:
                yield found["mark"], found["check"], found["said"]

    @property
    def _end(self) -> str:
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[list[dict[str, Any]], str]:
        """The objects that the process printed, and how it ended unless it ended well."""
        # With -P, files in the working directory cannot shadow modules.
        command = [sys.executable, "-P", "-m", PROBE]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            said, code, errors = done.stdout, done.returncode, done.stderr
        except subprocess.TimeoutExpired as late:
            text = late.stdout or b""
            said, code, errors = text.decode() if isinstance(text, bytes) else text, None, ""
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if code == 0:
            return lines, ""
        doing = next((line["doing"] for line in reversed(lines) if "doing" in line), "to start")
        return lines, f"{_how(code, errors)} at: {doing}"


def _how(code: int | None, errors: str) -> str:
    if code is None:
        return f"no end after {DEADLINE_S:.0f} s"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
    return last[:300]
