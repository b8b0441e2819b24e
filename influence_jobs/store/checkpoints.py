"""Weights on disk: those of train runs, and state dicts in files and folders."""

import hashlib
import io
from pathlib import Path

from torch import nn

from influence_jobs.errors import ModelError, StoreError
from influence_jobs.kinds.train.spec import FileCheckpoint, TrainedCheckpoint
from influence_jobs.models.checkpoints import load_weights, weight_files
from influence_jobs.store.folder import for_runs
from influence_jobs.store.layout import checkpoint_name
from influence_jobs.store.manifest import checksum
from influence_jobs.store.run import Run


def file_checkpoint(path: str) -> FileCheckpoint:
    """The checkpoint of a file or of a folder of weights, identified by its content.

    Raises:
        ModelError: There is no such plain file, or the folder holds no weights.
    """
    digests = []
    for weights in weight_files(Path(path)):
        # A run may name a pipe or a device, which might never end.
        if weights.exists() and not weights.is_file():
            raise ModelError(f"checkpoint {weights} is not a plain file: name another")
        try:
            with weights.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ModelError(f"cannot read checkpoint {weights}: {error.strerror}") from error
    # A folder with one file of weights is that file.
    whole = digests[0] if len(digests) == 1 else checksum("".join(digests).encode())
    return FileCheckpoint(path=str(Path(path).absolute()), sha256=whole)


def load_checkpoint(
    model: nn.Module, root: str, checkpoint: TrainedCheckpoint | FileCheckpoint
) -> None:
    """Put a checkpoint's weights into a model.

    Args:
        model: On any device.
        root: Folder of all runs; it holds the train run.
        checkpoint: Which weights to load.

    Raises:
        ModelError: The file is missing, changed, damaged or of another architecture.
        StoreError: The weights of the train run do not match its manifest.
    """
    if isinstance(checkpoint, FileCheckpoint):
        if file_checkpoint(checkpoint.path).sha256 != checkpoint.sha256:
            raise ModelError(
                f"checkpoint {checkpoint.path} has changed since the run was submitted: "
                "restore it, or submit the run again"
            )
        load_weights(model, Path(checkpoint.path))
        return
    run = Run(root, checkpoint.train)
    name = checkpoint_name(checkpoint.epoch)
    try:
        data = run.files.read(name)
    except FileNotFoundError:
        data = b""
    if checksum(data) != recorded_digest(root, checkpoint):
        raise StoreError(
            f"{run.files.url}/{name} is missing or damaged: "
            f"infl verify {run.id}{for_runs(root)} --repair, then {run.resume_command}"
        )
    load_weights(model, io.BytesIO(data), name=f"{run.id}@{checkpoint.epoch}")


def recorded_digest(root: str, checkpoint: TrainedCheckpoint) -> str:
    """SHA-256 of a train run's weights according to its manifest; empty if it has none."""
    entries = Run(root, checkpoint.train).manifest.done().values()
    recorded = {name: digest for entry in entries for name, digest in entry.files.items()}
    return recorded.get(checkpoint_name(checkpoint.epoch), "")
