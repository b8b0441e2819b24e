"""A line of what `infl doctor` finds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

# ok: as it should be; none: absent, and needed only for what the line names; warn: some runs will
# not work, or not as you may think; fail: no run will work.
Mark = Literal["ok", "none", "warn", "fail"]
Line = tuple[Mark, str, str]  # mark, what was looked at, what is so and the cure
Look = Callable[[], Iterable[Line]]


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        section: The heading it stands under.
        mark: ok, none, warn or fail.
        check: What was looked at, in a word or two.
        said: What is so and, unless it is right, the cure.
    """

    section: str
    mark: Mark
    check: str
    said: str

    def __str__(self) -> str:
        return f"  {self.mark:<4}  {self.check}: {self.said}"


def found_by(section: str, look: Look) -> Iterator[Finding]:
    """What a look finds, one by one. One that fails itself is a finding too."""
    try:
        for mark, check, said in look():
            yield Finding(section, mark, check, said)
    except Exception as error:  # noqa: BLE001  (a broken package may raise anything)
        lines = str(error).strip().splitlines() or [""]
        yield Finding(section, "fail", section, f"{type(error).__name__}: {lines[0]}")
