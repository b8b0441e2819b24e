"""Load weights from files that are not trusted."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from influence_jobs.errors import ModelError

_NAMED = 3  # how many offending parameters an error message lists


def load_weights(model: nn.Module, source: Path | BinaryIO, *, name: str | None = None) -> None:
    """Load a whole state dict into a model, or nothing.

    The file holds a state dict, either by itself or under the key `model`. If every name begins
    with `module.` (as `DataParallel` writes them), this prefix is dropped. Only tensors and plain
    containers are unpickled.

    Args:
        model: Receives the weights, on any device; it is unchanged if this raises.
        source: A file written by `torch.save`.
        name: The file's name in messages; by default its path.

    Raises:
        ModelError: The file is missing or corrupted, holds no state dict, or is of another
            architecture.
    """
    name = name or str(source)
    state = _read_state_dict(source, name)
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ModelError(
            f"checkpoint {name} does not fit {type(model).__name__}: "
            f"{'; '.join(problems[:_NAMED])}{more}; name a checkpoint of this architecture"
        )
    model.load_state_dict(state)


def _read_state_dict(source: Path | BinaryIO, called: str) -> dict[str, torch.Tensor]:
    try:
        stream = source.open("rb") if isinstance(source, Path) else source
    except OSError as error:
        raise ModelError(f"cannot read checkpoint {called}: {error.strerror}") from error
    try:
        with stream:
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    if archive.testzip():  # torch does not check the checksums
                        raise zipfile.BadZipFile("checksum")
            stream.seek(0)
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # bad bytes make the unpickler raise almost anything
        # torch's own message is left out: it explains how to switch the protection off.
        raise ModelError(
            f"checkpoint {called} is corrupted, truncated or holds more than tensors; "
            "get it again, or write it with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items())
    ):
        raise ModelError(
            f"checkpoint {called} holds no state dict; "
            "write it with torch.save(model.state_dict(), path)"
        )
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}
