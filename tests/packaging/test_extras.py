"""The library without the packages of its extras."""

import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import influence_jobs
from influence_jobs.extras import EXTRAS

PROJECT = Path(__file__).parents[2]
ABSENT = tuple(package for packages in EXTRAS.values() for package in packages)

# Modules that draw need the extra `report`; the rest of the library needs no extra.
DRAWS = tuple(
    f"influence_jobs.{room}"
    for room in (
        "report.",
        "views.contact_sheet",
        "views.curves",
        "views.drawing",
        "views.figure",
        "views.sheets",
    )
)
INDEXES = ("influence_jobs.kinds.gradient_index.job",)  # needs the extra `faiss`
# Callbacks of packages whose users have them.
CALLBACKS = ("influence_jobs.training.hugging_face", "influence_jobs.training.lightning")
ROOMS = [
    module.name
    for module in pkgutil.walk_packages(influence_jobs.__path__, "influence_jobs.")
    if not module.name.startswith(DRAWS + INDEXES + CALLBACKS)
]

WITHOUT = """
import importlib, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
"""


def _python(code: str, absent: tuple[str, ...] = ABSENT) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(absent=absent) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_the_library_needs_no_extra() -> None:
    assert len(ROOMS) > 50
    done = _python(f"for name in {ROOMS!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_driver_in_process_needs_no_extra() -> None:
    done = _python("import infl_cluster.driver, infl_cluster.inline, infl_configs")
    assert done.returncode == 0, done.stderr


def test_results_say_what_to_install() -> None:
    done = _python("from influence_jobs import open_run")
    assert done.returncode == 1
    line = "xarray is not installed; run: pip install 'influence-jobs[report]'"
    assert done.stderr.endswith(f"influence_jobs.extras.MissingExtra: {line}\n")


def test_the_command_says_what_to_install() -> None:
    done = _python("from infl_cli.entry import main; main()")
    assert done.returncode == 2
    assert done.stderr == "error: typer is not installed; run: pip install 'influence-jobs[cli]'\n"


def test_the_command_says_what_it_misses_later(tmp_path: Path) -> None:
    code = f"sys.argv = ['infl', 'view', 'none', '--runs', {str(tmp_path)!r}]\n"
    done = _python(f"{code}from infl_cli.entry import main; main()", ("uvicorn",))
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: uvicorn is not installed; run: pip install 'influence-jobs[report]'\n"
    )


def test_an_index_says_what_to_install() -> None:
    code = (
        "from influence_jobs.extras import missing_extra\n"
        "try:\n    import influence_jobs.kinds.gradient_index.job\n"
        "except ModuleNotFoundError as error:\n    print(missing_extra(error))"
    )
    said = "faiss is not installed; run: pip install 'influence-jobs[faiss]'\n"
    assert _python(code, ("faiss",)).stdout == said


def test_other_missing_modules_keep_their_traceback() -> None:
    done = _python("from infl_cli.entry import main; main()", ("yaml",))
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'yaml'" in done.stderr


def test_extras_are_those_of_the_project_file() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    homes = packages_distributions()
    for extra, packages in EXTRAS.items():
        asked = {
            requirement.partition(">=")[0].partition("[")[0].lower()
            for requirement in project["optional-dependencies"][extra]
        } - {"influence-jobs"}
        assert {homes[package][0].lower() for package in packages} == asked
