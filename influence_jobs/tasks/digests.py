"""Digests of single samples, by which it is noticed that data are not what they were.

A fingerprint (`Task.fingerprint`) is part of run ids, so it stays as it is, and it covers a few
training samples. Digests are kept beside a run: of other training samples, and of test samples.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_jobs.errors import DataError, InflError
from influence_jobs.gradients.batches import plain_leaves
from influence_jobs.tasks.base import READING, Draw, Task, digest
from influence_jobs.tasks.own_code import described

SAMPLES = 64  # training samples that are looked at
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")  # another one in each process


def digest_of(content: Any) -> str:
    """The digest of what is fetched of a sample, on the CPU and as it is fetched: 16 hex digits.

    Raises:
        ModelError: A mapping in it cannot be made anew from its items.
    """
    return digest([_shown(leaf) for leaf in plain_leaves(content)])[:16]


def some_samples(task: Task, seed: int) -> list[int]:
    """Ids of `SAMPLES` training samples at random, or of all if there are no more; ascending."""
    n = len(task.train_data())
    chosen = np.random.default_rng(seed).choice(n, min(n, SAMPLES), replace=False)
    return sorted(map(int, chosen))


def training_sample(task: Task) -> Callable[[int], Any]:
    """Fetches a training sample by its id, in the form of which a fingerprint is made."""
    return lambda sample: task.batch(torch.tensor([sample]), Draw(0))


def digests_of(what: str, ids: Iterable[int], fetch: Callable[[int], Any]) -> dict[str, str]:
    """Digests by id. What cannot be fetched has none: the work that needs it says why.

    Args:
        what: Whose ids they are, for the message: "training" or "test".
        fetch: Gives a sample by its id.

    Raises:
        DataError: The first of them is another one each time.
    """
    found: dict[str, str] = {}
    for sample in ids:
        try:
            now = _fetched(sample, fetch)
        except Exception:  # noqa: BLE001, S112  (the user's code may raise anything)
            continue
        if not found and _fetched(sample, fetch) != now:
            raise _unsteady(what)
        found[f"{sample}"] = now
    return found


def first_other(what: str, digests: Mapping[str, str], fetch: Callable[[int], Any]) -> str | None:
    """The first sample that is not what it was, as the subject of a sentence; None if all are.

    Args:
        what: As for `digests_of`.
        digests: By id.

    Raises:
        DataError: It is another one each time.
    """
    for name, then in digests.items():
        sample = int(name)
        try:
            now = _fetched(sample, fetch)
            if now != then and _fetched(sample, fetch) != now:
                raise _unsteady(what)
        except InflError:
            raise
        except Exception as error:  # noqa: BLE001  (the user's code may raise anything)
            return f"{what} sample {sample}, which cannot be fetched ({described(error)}),"
        if now != then:
            return f"{what} sample {sample}"
    return None


def _fetched(sample: int, fetch: Callable[[int], Any]) -> str:
    with READING:
        return digest_of(fetch(sample))


def _unsteady(what: str) -> DataError:
    augment = ", and augment in train_batch()" if what == "training" else ""
    return DataError(
        f"the task gives different numbers each time a {what} sample is fetched, so no result "
        "could be repeated: let random numbers depend on (draw.seed, draw.index, sample id) only"
        f"{augment}"
    )


def _shown(leaf: Any) -> Any:
    """A leaf as `digest` takes it: what does not show its bytes is told in words."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
        return leaf.detach().resolve_conj().resolve_neg()
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return leaf
    return _ADDRESS.sub("", repr(leaf))
