"""Reading weights from files that may be anything."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from influence_jobs.errors import ModelError

_NAMED = 3  # how many offending parameters an error message lists


def load_weights(model: nn.Module, source: Path | BinaryIO, *, name: str | None = None) -> None:
    """Load a state dict into a model, all of it or nothing.

    The file holds a state dict, bare or under the key `model`; a `module.` before every name (left
    by `DataParallel`) is dropped. Nothing but tensors and plain containers is unpickled.

    Args:
        model: Receives the weights, on whatever device it is; unchanged if this raises.
        source: File written by `torch.save`.
        name: What to call it in errors; the path by default.

    Raises:
        ModelError: The file is missing, corrupted, no state dict, or of another architecture.
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
                    if archive.testzip():  # torch itself does not look at the checksums
                        raise zipfile.BadZipFile("checksum")
            stream.seek(0)
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # bad bytes make the unpickler raise almost anything
        # torch's own text is left out: it tells the reader how to switch the protection off.
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
