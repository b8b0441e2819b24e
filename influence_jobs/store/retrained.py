"""Weights of retrained variants, shared by all experiments in a folder of runs.

So no variant is trained twice.

<runs>/retrained-<task>-<hash of the recipe>/
    recipe.json         how all of them were trained
    samples.json        digests of some training samples; not in folders that earlier versions made
    manifest/KEY.json   one file per variant: the checksum of its weights, written after them
    checkpoints/KEY-SUM.pt  its weights; SUM is the beginning of their checksum
KEY is the hash of what distinguishes a variant: seed, removed samples, relabelled samples, their
new labels, and masked samples. Two workers may train the same variant at the same time. Then they
write two files, equal up to rounding, and the manifest names one of them.
"""

import io
import json
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from influence_jobs.errors import DataError
from influence_jobs.kinds.train.spec import TrainSpec
from influence_jobs.store.documents import MOST_BYTES, Entry, SampleDigests, parsed
from influence_jobs.store.files import open_files
from influence_jobs.store.layout import CHECKPOINTS
from influence_jobs.store.manifest import Manifest, checksum
from influence_jobs.store.run import now
from influence_jobs.store.software import software
from influence_jobs.tasks.base import Task
from influence_jobs.tasks.digests import digests_of, first_other, some_samples, training_sample
from influence_jobs.torch_files import load_torch
from influence_jobs.transfers import on_cpu

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.json"
WRITTEN_S = 3600.0  # weights take seconds to write: a partial file of this age is abandoned


class Retrained:
    """The variants of one recipe.

    Args:
        root: Folder of all runs.
        recipe: How the variants are trained; its seed does not count.
        task: Gives the task, with the data that they are trained on.
    """

    def __init__(self, root: str, recipe: TrainSpec, task: Callable[[], Task]):
        self._recipe, self._task = recipe, task
        self._name = f"retrained-{recipe.run_id.removeprefix(f'{recipe.kind}-')}"
        self._files = open_files(root).sub(self._name)
        self._manifest = Manifest(self._files)
        self._compared = False

    def sweep(self) -> None:
        """Remove old partial files of killed writers. Other drivers may be writing here."""
        self._files.sweep(older_than_s=WRITTEN_S)

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Weights of a variant, on the CPU; None if they are missing or damaged.

        Raises:
            DataError: The variants were trained on other data.
        """
        entry = self._manifest.read(key)
        if entry is None:
            return None
        self._require_same_data()
        ((name, expected),) = entry.files.items()
        try:
            data = self._files.read(name)
        except FileNotFoundError:
            data = b""
        if checksum(data) != expected:
            log.warning("variant %s is damaged: it is trained again", key)
            return None
        weights: dict[str, Tensor] = load_torch(io.BytesIO(data))
        return weights

    def write(self, key: str, weights: dict[str, Tensor]) -> None:
        """Keep the weights of a variant."""
        # Whoever is the first of all tells the data: variants of earlier versions have no digests.
        if self._files.create("recipe.json", self._recipe.model_dump_json(indent=2).encode()):
            task = self._task()
            chosen = some_samples(task, seed=int(self._recipe.hash[:16], 16))
            digests = digests_of("training", chosen, training_sample(task))
            kept: SampleDigests = {"training": digests, "test": {}}
            self._files.create(SAMPLES_FILE, json.dumps(kept, indent=1).encode())
        buffer = io.BytesIO()
        # Cloned, since saving a row of a stack would save the whole stack.
        torch.save({name: tensor.clone() for name, tensor in on_cpu(weights).items()}, buffer)
        data = buffer.getvalue()
        found = checksum(data)
        name = f"{CHECKPOINTS}/{key}-{found[:8]}.pt"
        self._files.write(name, data)
        entry = Entry(
            key,
            0,
            0,
            attempt=1,
            spec=self._recipe.hash,
            state="done",
            files={name: found},
            software=software(),
            finished_at=now(),
        )
        self._manifest.write(entry)

    def _require_same_data(self) -> None:
        if self._compared:
            return
        self._compared = True
        try:
            data = self._files.read(SAMPLES_FILE, most=MOST_BYTES)
        except FileNotFoundError:
            return
        digests = parsed(data, SampleDigests, f"{self._files.url}/{SAMPLES_FILE}")["training"]
        task = self._task()
        if other := first_other("training", digests, training_sample(task)):
            raise DataError(
                f"{other} is not the one that the models of {self._name} were trained with "
                f"({len(digests)} of {len(task.train_data()):,} training samples are "
                "compared): restore the data, or delete that folder and submit again"
            )


def variant_key(
    seed: int, removed: bytes, relabelled: bytes, labels: bytes, masked: bytes = b""
) -> str:
    """The key of a variant.

    Args:
        seed: The variant's seed.
        removed: Bytes of the sorted ids of its removed samples, int64.
        relabelled: Bytes of the sorted ids of its relabelled samples, int64.
        labels: Bytes of their new labels, int64.
        masked: Bytes of the sorted ids of its masked samples, int64.
    """
    parts = {
        "seed": seed,
        "removed": checksum(removed),
        "relabelled": checksum(relabelled),
        "labels": checksum(labels),
    }
    if masked:  # older than this part, variants have none
        parts["masked"] = checksum(masked)
    return checksum(json.dumps(parts).encode())[:24]
