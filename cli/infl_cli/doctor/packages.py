"""What is installed, and whether the versions suit."""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import influence_jobs
from infl_cli.doctor.finding import Line, Mark
from influence_jobs.store.software import PACKAGE, software

REINSTALL = "run: pip install -e '.[cli]' in the folder of the code"
NEEDED = ("", "cli", "report")  # the plain package, and extras that the command cannot do without
OPTIONAL = {
    "cloud": "runs on s3://, gs:// and az://",
    "faiss": "--approximate of infl submit gradient-scores",
}
# Packages of no extra, and what their users have of them.
NEIGHBOURS = {
    "transformers": "Hugging Face models, and a callback for its Trainer",
    "lightning": "a callback for Lightning's Trainer",
}


def installed() -> Iterator[Line]:
    """Python, this package, and each package that the command needs."""
    yield _infl(software().get("revision"))
    ours = _distribution(PACKAGE)
    if ours is None:
        said = "runs from a folder and is not installed, so its requirements are not known"
        yield "fail", PACKAGE, f"{said}; {REINSTALL}"
        return
    if ours.version != influence_jobs.__version__:
        said = f"the code is {influence_jobs.__version__}, pip has installed {ours.version}"
        yield "warn", PACKAGE, f"{said}; {REINSTALL}"
    yield _python(str(ours.metadata["Requires-Python"] or ""))
    needed = [one for extra in NEEDED for one in _requirements(ours, extra)]
    for requirement in {one.name: one for one in needed}.values():
        yield _version(requirement, "fail")


def extras() -> Iterator[Line]:
    """What else can be installed, and what for."""
    ours = _distribution(PACKAGE)
    for extra, what in OPTIONAL.items():
        for requirement in _requirements(ours, extra) if ours is not None else ():
            if _distribution(requirement.name) is None:
                cure = f"pip install '{PACKAGE}[{extra}]'"
                yield "none", requirement.name, f"not installed; {what} need it: {cure}"
            else:
                yield _version(requirement, "warn")
    for name, what in NEIGHBOURS.items():
        found = _distribution(name)
        if found is None:
            yield "none", name, f"not installed; for {what}: pip install {name}"
        else:
            yield "ok", name, f"{found.version}; for {what}"


def _infl(revision: str | None) -> Line:
    where = Path(influence_jobs.__file__).parents[1]
    said = f"{influence_jobs.__version__}, revision {revision or 'not known'}, in {where}"
    if sys.platform == "win32":
        return "fail", "infl", f"{said}: Windows is not supported; use its Linux (WSL)"
    return "ok", "infl", said


def _python(wanted: str) -> Line:
    version = platform.python_version()
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return "fail", "python", f"{version}, but {wanted} is needed: make an environment of it"
    return "ok", "python", f"{version} ({wanted}), {sys.executable}"


def _version(requirement: Requirement, worst: Mark) -> Line:
    """Whether the installed version of a package is in the range that is asked for."""
    name, wanted = requirement.name, str(requirement.specifier)
    cure = f"run: pip install '{requirement.name}{wanted}'"
    found = _distribution(name)
    if found is None:
        return worst, name, f"not installed, but {wanted} is needed; {cure}"
    if not requirement.specifier.contains(found.version, prereleases=True):
        return worst, name, f"{found.version}, but {wanted} is needed; {cure}"
    return "ok", name, f"{found.version} ({wanted})"


def _requirements(ours: Distribution, extra: str) -> list[Requirement]:
    """What an extra adds to the plain package; of the plain package if it is empty."""
    found = []
    for line in ours.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        asked = plain if not extra else not plain and marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if asked and canonicalize_name(requirement.name) != PACKAGE:
            found.append(requirement)
    return sorted(found, key=lambda one: one.name.lower())


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
