"""Loads the packages that compute, and prints what there is. Run by `loading` in its own process.

Each line of its output is a JSON object: what it is about to do, or a finding.
"""

import contextlib
import importlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Those with compiled code, which may not fit the machine or each other; how pip calls them.
LOADED = {
    "numpy": "numpy",
    "torch": "torch",
    "torchvision": "torch torchvision",  # they come in pairs
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic pydantic-core",
    "numcodecs": "numcodecs",
    "zarr": "zarr",
    "ray": "ray",
    "matplotlib": "matplotlib",
}
NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")


def main() -> None:
    """Print what packages, processors and data there are."""
    if load():
        attempt("processors", processors)
        attempt("memory", memory)
        attempt("GPU", gpus)
        attempt("MNIST", mnist)
        attempt("photographs", photographs)


def load() -> bool:
    """Load the packages; whether those that all else needs are loaded."""
    failed = set()
    for module, wheels in LOADED.items():
        doing(f"import {module}")
        try:
            with warnings.catch_warnings(action="ignore"):
                importlib.import_module(module)
        except BaseException as error:  # noqa: BLE001  (some packages exit)
            failed.add(module)
            said = f"does not load, {_told(error)}; run: pip install --force-reinstall {wheels}"
            tell("machine", "fail", module, said)
    if not failed:
        tell("machine", "ok", "loading", f"{', '.join(LOADED)} load")
    return failed.isdisjoint({"numpy", "torch", "PIL", "pydantic"})


def attempt(name: str, look: Callable[[], None]) -> None:
    """Look at something; that it cannot be looked at is a finding too."""
    doing(f"look at {name}")
    try:
        look()
    except Exception as error:  # noqa: BLE001  (drivers and disks may raise anything)
        part = "data" if look in (mnist, photographs) else "machine"
        tell(part, "warn", name, _told(error))


def processors() -> None:
    """Cores, and the threads of one operation."""
    from influence_jobs.devices import cores, threads

    asked = os.environ.get("OMP_NUM_THREADS")
    why = f" (OMP_NUM_THREADS={asked})" if asked else ""
    tell("machine", "ok", "processors", f"{cores()} cores, --local takes {threads()}{why}")


def memory() -> None:
    """Memory of the machine, and what a run can still take."""
    import psutil
    import torch

    from influence_jobs.devices import cores
    from influence_jobs.memory import free_bytes
    from influence_jobs.terms import size

    torch.set_num_threads(cores())  # then one worker has all there is
    total, free = psutil.virtual_memory().total, free_bytes(torch.device("cpu"))
    said = f"{size(total)}, {size(free)} free"
    if free < 2e9:
        said += ": a worker of one core takes about 500 MB; end other programs, or take --workers 1"
        tell("machine", "warn", "memory", said)
    else:
        tell("machine", "ok", "memory", said)


def gpus() -> None:
    """CUDA devices, each with a small computation; why there are none, if there should be."""
    import torch

    from influence_jobs.terms import size

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    built = torch.version.cuda
    if usable:
        for i in range(torch.cuda.device_count()):
            doing(f"compute on GPU {i}")
            try:
                device = torch.device("cuda", i)
                assert torch.ones(8, device=device).sum().item() == 8
                free, total = torch.cuda.mem_get_info(device)
            except Exception as error:  # noqa: BLE001  (whatever the driver says)
                cure = "take a torch for this GPU from https://pytorch.org, or --device cpu"
                tell("machine", "warn", f"GPU {i}", f"{_told(error)}; {cure}")
                continue
            name = torch.cuda.get_device_name(i)
            said = f"{name}, {size(free)} of {size(total)} free, CUDA {built}"
            tell("machine", "ok", f"GPU {i}", said)
        return
    if not (shutil.which("nvidia-smi") or any(Path(path).exists() for path in NVIDIA)):
        tell("machine", "none", "GPU", "torch finds none: runs compute on the CPU")
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built is None:
        why = f"torch {torch.__version__} is built without CUDA: take one from https://pytorch.org"
    elif hidden is not None:
        why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset it"
    else:
        said_by_torch = str(caught[0].message).strip().splitlines()[0] if caught else ""
        why = f"torch cannot use it: {said_by_torch or 'see nvidia-smi'}"
    tell("machine", "warn", "GPU", f"there is a GPU, but {why}; runs compute on the CPU")


def mnist() -> None:
    """Whether MNIST is here and right, and else where it would come from."""
    from influence_jobs.datasets.mnist import SOURCES, default_data_dir, load_mnist
    from influence_jobs.errors import DataError

    folder = default_data_dir()
    try:
        load_mnist(folder)
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            tell("data", "warn", "MNIST", str(error))
            return
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(parent, os.W_OK):
            cure = "set INFL_DATA to a folder that you may write"
            tell("data", "warn", "MNIST", f"not in {folder}, which cannot be written: {cure}")
            return
        said = f"not in {folder} yet: runs of --task mnist, or infl data mnist, fetch it from "
        tell("data", "none", "MNIST", said + ", else from ".join(SOURCES))
    else:
        tell("data", "ok", "MNIST", f"in {folder}, checksums right")


def photographs() -> None:
    """The photographs that other packages bring, for FFDNet."""
    from influence_jobs.datasets.images import SAMPLES, ImageFolder
    from influence_jobs.errors import DataError

    try:
        found = [len(ImageFolder(name).sizes) for name in SAMPLES]
    except DataError as error:
        tell("data", "warn", "photographs", str(error))
    else:
        tell("data", "ok", "photographs", f"{sum(found)}, of scikit-image and scikit-learn")


def doing(what: str) -> None:
    """Say what comes next: it may be the last thing that this process says."""
    _print({"doing": what})


def tell(part: str, mark: str, check: str, said: str) -> None:
    """Print a finding."""
    _print({"part": part, "mark": mark, "check": check, "said": said})


def _print(line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(line), flush=True)


def _told(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:300]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
