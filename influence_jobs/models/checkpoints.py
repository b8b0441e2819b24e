"""Load weights from files that are not trusted."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any, BinaryIO

import torch
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.torch_files import UnsafeFileError, load_torch

_NAMED = 3  # how many offending parameters an error message lists of a kind
MOST_INDEX_BYTES = 2**26
_KEYS = ("state_dict", "model_state_dict", "model")  # where training scripts put a state dict
# What DataParallel, torch.compile and Lightning put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# What transformers writes into a folder, the first that is there: a file, or an index of several.
_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CURE = "write it with torch.save(model.state_dict(), path)"


def load_weights(model: nn.Module, source: Path | BinaryIO, *, name: str | None = None) -> None:
    """Load a whole state dict into a model, or nothing.

    The source is a file of torch or safetensors, or a folder of Hugging Face weights. A file of
    torch holds the state dict, bare or under one of the keys `state_dict` (Lightning), `model` and
    `model_state_dict`. The prefixes `module.`, `_orig_mod.` and `model.` are dropped where all
    names have them and the model's have not. A tied weight needs one of its names only. Nothing
    but tensors and plain containers is unpickled.

    Args:
        model: Receives the weights, on whatever device it is; unchanged if this raises.
        source: A path, or an open file of torch.
        name: What to call it in errors; the path by default.

    Raises:
        ModelError: The source is missing, corrupted, no state dict, or of another architecture.
    """
    name = name or str(source)
    put_weights(
        model,
        _read(source, name),
        name=f"checkpoint {name}",
        cure="name a checkpoint of this architecture",
    )


def put_weights(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, name: str, cure: str
) -> None:
    """Put a whole state dict into a model, or nothing; names as for `load_weights`.

    Args:
        model: Receives the weights; unchanged if this raises.
        state: The weights.
        name: What to call them in errors.
        cure: What to do if they do not fit.

    Raises:
        ModelError: They are of another architecture.
    """
    expected = model.state_dict()
    state = _renamed(state, expected)
    for names in tied_names(model):
        held = next((state[key] for key in names if key in state), None)
        if held is not None:
            state |= {key: held for key in names if key not in state}
    problems = [
        *_listed("it has", [f"{key} as {what}" for key in state if (what := _odd(state[key]))]),
        *_listed("it lacks", [key for key in expected if key not in state]),
        *_listed("it has besides", [key for key in state if key not in expected]),
        *_listed(
            "other shapes:",
            [
                f"{key} has shape {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
                for key, tensor in expected.items()
                if key in state and state[key].shape != tensor.shape
            ],
        ),
        *_listed(
            "complex numbers for real ones:",
            [
                key
                for key, tensor in expected.items()
                if key in state and state[key].is_complex() and not tensor.is_complex()
            ],
        ),
    ]
    if problems:
        raise ModelError(
            f"{name} does not fit {type(model).__name__}: {'; '.join(problems)}: {cure}"
        )
    model.load_state_dict(state)


def _odd(tensor: torch.Tensor) -> str | None:
    """What a tensor is if it is no plain one of numbers; None if it is."""
    if tensor.is_meta:
        return "a tensor without numbers (meta)"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    return None


def weight_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: the path itself, or those of a folder.

    Raises:
        ModelError: The folder holds no weights of Hugging Face, or its index cannot be read.
    """
    if not path.is_dir():
        return [path]
    found = next((path / name for name in _FOLDER if (path / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"checkpoint folder {path} holds no weights; looked for {', '.join(_FOLDER)}"
        )
    if found.suffix != ".json":
        return [found]
    try:
        if found.stat().st_size > MOST_INDEX_BYTES:
            raise ValueError
        names = sorted(set(json.loads(found.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"checkpoint index {found} has no weight_map: get it again") from error
    for name in names:
        # A folder from elsewhere must not lead out of itself.
        if name != Path(name).name or not (path / name).is_file():
            raise ModelError(f"checkpoint folder {path} lacks {name}, which {found.name} names")
    return [path / name for name in names]


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _listed(what: str, problems: Sequence[str]) -> Iterator[str]:
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        yield f"{what} {', '.join(problems[:_NAMED])}{more}"


def _renamed(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict without the prefixes that all its names share, as far as a model's names fit."""
    forms = [dict(state)]
    while prefix := _shared_prefix(forms[-1]):
        forms.append({name.removeprefix(prefix): tensor for name, tensor in forms[-1].items()})
    # Of equals the one that is least changed: a model's own names may begin with "model.".
    return max(forms, key=lambda form: len(form.keys() & expected.keys()))


def _shared_prefix(state: Mapping[str, Any]) -> str:
    return next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), "")


def _read(source: Path | BinaryIO, called: str) -> dict[str, torch.Tensor]:
    """The state dict of a file or folder.

    Raises:
        ModelError: It is missing, corrupted or no state dict.
    """
    if not isinstance(source, Path):
        return _read_torch(source, called)
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(source):
        try:
            with path.open("rb") as stream:
                if path.suffix == ".safetensors":
                    state |= _read_safetensors(path)
                else:
                    state |= _read_torch(stream, called)
        except OSError as error:
            raise ModelError(
                f"cannot read checkpoint {called} on {gethostname()}: {error.strerror}"
            ) from error
    return state


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    # Here: the engines run on machines that have torch and numpy alone.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"checkpoint {path} is corrupted or truncated ({error}): get it again"
        ) from error


def _read_torch(stream: BinaryIO, called: str) -> dict[str, torch.Tensor]:
    try:
        loaded = load_torch(stream)
    except UnsafeFileError as error:
        raise ModelError(
            f"checkpoint {called} is corrupted, or made to do harm ({error}): get it again, or "
            f"{_CURE}"
        ) from error
    except Exception as error:  # bad bytes make the unpickler raise almost anything
        # torch's own text is left out: it tells the reader how to switch the protection off.
        if found := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise ModelError(
                f"checkpoint {called} holds more than tensors ({found[1]}), which may run code "
                f"when it is loaded: {_CURE}"
            ) from error
        raise ModelError(
            f"checkpoint {called} is corrupted, truncated or holds more than tensors; "
            f"get it again, or {_CURE}"
        ) from error
    if isinstance(loaded, Mapping):
        inner = [loaded[key] for key in _KEYS if isinstance(loaded.get(key), Mapping)]
        loaded = inner[0] if inner else loaded
    if (
        not isinstance(loaded, Mapping)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items())
    ):
        keys = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else ""
        has = f" but {keys[:60]}" if keys else ""
        raise ModelError(
            f"checkpoint {called} holds no state dict{has}; looked for one by itself and under "
            f"{', '.join(_KEYS)}: {_CURE}"
        )
    return dict(loaded)
