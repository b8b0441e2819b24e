"""A shard's rows, gathered on the device and copied once.

A program that looks at each batch's numbers waits for the GPU each time, and the GPU then waits for
the program. So what must hold of the numbers is noted on the device too, and looked at with them.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from influence_jobs.jobs.base import Shard
from influence_jobs.transfers import on_cpu, on_device

T = TypeVar("T")

Numbers = Tensor | npt.NDArray[Any]


class AnotherWayError(Exception):
    """A shard's numbers are not right as they were computed; another way has been chosen."""


def until_right(run: Callable[[], T]) -> T:
    """What `run` gives, which is called again for each `AnotherWayError`."""
    while True:
        with suppress(AnotherWayError):
            return run()


class Rows:
    """A shard's rows of several arrays, added up in float64, each batch at its own places.

    Args:
        shard: Its rows.
        axis: Along which the rows lie.
    """

    def __init__(self, shard: Shard, axis: int = 0) -> None:
        self._shard, self._axis = shard, axis
        self._sums: dict[str, Tensor] = {}

    def add(self, ids: Tensor, values: Mapping[str, Numbers]) -> None:
        """Add the values of some samples, B along the axis, by array."""
        for name, of_batch in values.items():
            numbers = torch.as_tensor(of_batch)
            if name not in self._sums:
                shape = list(numbers.shape)
                shape[self._axis] = self._shard.stop - self._shard.start
                # In float64: a sum of terms, which may almost cancel, adds no rounding errors.
                self._sums[name] = numbers.new_zeros(shape, dtype=torch.float64)
            sums, places = self._sums[name], ids - self._shard.start
            if (run := _run(places)) is not None:
                sums.narrow(self._axis, run.start, len(run)).add_(numbers)
            else:
                where = on_device(places, sums.device)
                sums.index_add_(self._axis, where, numbers.to(sums.dtype))

    def arrays(self, checks: "Checks | None" = None) -> dict[str, npt.NDArray[np.float64]]:
        """The sums, by name.

        Args:
            checks: What must hold of them.

        Raises:
            InflError: As the checks say.
        """
        flags = checks.flags() if checks else {}
        found = on_cpu({**{("", name): sums for name, sums in self._sums.items()}, **flags})
        if checks:
            checks.settle({key: found[key] for key in flags})
        return {name: found["", name].numpy() for name in self._sums}


class Checks:
    """What must hold of a shard's numbers, noted on the device and looked at when they are copied.

    Args:
        shard: Its rows; None: nothing is noted, as in a probe.
        refuse_samples: Refuses what is not finite, by its name, for some ids.
    """

    def __init__(self, shard: Shard | None, refuse_samples: Callable[[str, Tensor], None]) -> None:
        self._shard, self._refuse_samples = shard, refuse_samples
        self._unsound: dict[str, Tensor] = {}  # (N,) of the shard, by what is not finite
        self._right: dict[str, tuple[Tensor, Callable[[], Any]]] = {}

    def finite(self, what: str, values: Numbers, ids: Tensor) -> None:
        """Values (B, ...) of some samples must be finite."""
        if self._shard is None:
            return
        bad_B = ~torch.as_tensor(values).isfinite().reshape(len(ids), -1).all(1)
        if what not in self._unsound:
            self._unsound[what] = bad_B.new_zeros(self._shard.stop - self._shard.start)
        unsound, places = self._unsound[what], ids - self._shard.start
        if (run := _run(places)) is not None:
            unsound[run.start : run.stop] |= bad_B
        else:
            unsound[on_device(places, unsound.device)] |= bad_B

    def right(self, name: str, flag: Tensor, refuse: Callable[[], Any]) -> None:
        """A flag must be true, or else `refuse` is called, which raises."""
        before = self._right.get(name)
        self._right[name] = (flag & before[0] if before else flag), refuse

    def flags(self) -> dict[tuple[str, str], Tensor]:
        """What must be copied from the device, in the order in which it is looked at."""
        finite = {("finite", what): rows for what, rows in self._unsound.items()}
        right = {("right", name): flag for name, (flag, _) in self._right.items()}
        # Beyond the range, norms are computed anew; else a NaN is told as that, whatever follows.
        first = {key: flag for key, flag in right.items() if key[1] == "range"}
        return {**first, **finite, **right}

    def look(self) -> None:
        """Look at what was noted, now.

        Raises:
            InflError: As the checks say.
        """
        self.settle(on_cpu(self.flags()))

    def settle(self, found: Mapping[tuple[str, str], Tensor]) -> None:
        """Refuse what does not hold.

        Raises:
            InflError: As the checks say.
        """
        for (kind, name), flags in found.items():
            if kind == "right" and not flags:
                self._right[name][1]()
            if kind == "finite" and self._shard is not None and flags.any():
                self._refuse_samples(name, flags.nonzero()[:, 0] + self._shard.start)


def _run(places: Tensor) -> range | None:
    """The places as a range, if they follow each other."""
    run = range(int(places[0]), int(places[0]) + len(places))
    return run if torch.equal(places, torch.arange(run.start, run.stop)) else None
