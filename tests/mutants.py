"""How many small changes of the code do the nearest tests notice? `make mutants` tries a sample.

Cosmic Ray makes each change in a copy of the tree: another operator, comparison or number, a
condition negated, a decorator removed, a loop not entered. A change that no test notices has
survived: it is equivalent, or a test is missing. Strings are not changed.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome

ROOT = Path(__file__).parents[1]
LIBRARY = "tests/influence_jobs"
DRIVER = "tests/cluster/test_driver.py"
# What is changed, and the tests that should notice, the quickest first.
ROOMS = {
    "influence_jobs/experiments/*.py": (f"{LIBRARY}/experiments",),
    "influence_jobs/methods/*.py": (f"{LIBRARY}/methods",),
    "influence_jobs/store/*.py": (f"{LIBRARY}/store", DRIVER, f"{LIBRARY}/report"),
    "influence_jobs/jobs/*.py": (DRIVER, f"{LIBRARY}/jobs"),
    "influence_jobs/kinds/*.py": (DRIVER, f"{LIBRARY}/kinds", f"{LIBRARY}/jobs"),
    "influence_jobs/kinds/*/job.py": (DRIVER, f"{LIBRARY}/report", f"{LIBRARY}/jobs"),
    "influence_jobs/kinds/*/view.py": (f"{LIBRARY}/report", "tests/cli/test_scores.py"),
    "influence_jobs/views/*.py": (
        f"{LIBRARY}/views",
        f"{LIBRARY}/report",
        "tests/cli/test_scores.py",
    ),
}
PYTEST = "-m pytest -x -q -p no:cacheprovider -m 'not slow and not gpu and not ray'"
BASELINE_S, TIMEOUT_S = 1800, 300  # a change that makes a loop endless counts as noticed
# `|` stands in annotations mostly, where every other operator fails at import; for small numbers
# `is` means the same as `==`.
SKIPPED_OPERATORS = ("BinaryOperator_BitOr_", "Eq_Is")
PACKAGES = (".", "cli", "cluster", "configs")


def mutations(path: Path) -> Iterator[MutationSpec]:
    """All changes of a file that Cosmic Ray knows to make without being told more."""
    tree = get_ast_from_path(path)
    lines = path.read_text().splitlines()
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments() or any(part in name for part in SKIPPED_OPERATORS):
            continue
        places = [
            place for node in ast_nodes(tree) for place in operator().mutation_positions(node)
        ]
        for occurrence, (start, end) in enumerate(places):
            # What types alone need is not run.
            if "TYPE_CHECKING" not in lines[start[0] - 1]:
                yield MutationSpec(path, name, occurrence, start, end)


def sample(rooms: list[str], count: int, seed: int) -> list[tuple[str, MutationSpec]]:
    """Random places, one change of each: most changes are of arithmetic, most places are not."""
    by_place: dict[tuple[str, str, tuple[int, int]], list[MutationSpec]] = {}
    for room in rooms:
        for path in sorted(Path().glob(room)):
            for mutation in mutations(path):
                by_place.setdefault((room, str(path), mutation.start_pos), []).append(mutation)
    print(f"{sum(map(len, by_place.values()))} changes at {len(by_place)} places; seed {seed}")
    chosen = random.Random(seed)
    places = chosen.sample(sorted(by_place), min(count, len(by_place)))
    return [(place[0], chosen.choice(by_place[place])) for place in places]


def copied_tree(folder: Path) -> None:
    """Copy what git knows or would take into a folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def command(*tests: str) -> str:
    return f"{shlex.quote(sys.executable)} {PYTEST} {' '.join(dict.fromkeys(tests))}"


def main() -> None:
    """Run the sample; print what became of each change, and the share noticed at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=120, help="how many changes (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (0)")
    parser.add_argument("--room", action="append", choices=ROOMS, help="only these; again for more")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copied_tree(Path(folder))
        os.chdir(folder)
        # Before the installed packages, which are those of the tree itself.
        os.environ["PYTHONPATH"] = os.pathsep.join(f"{folder}/{name}" for name in PACKAGES)
        os.environ["OMP_NUM_THREADS"] = "1"
        chosen = sample(asked.room or list(ROOMS), asked.sample, asked.seed)
        every = command(*(test for room, _ in chosen for test in ROOMS[room]))
        outcome, output = run_tests(every, BASELINE_S)
        if outcome is not TestOutcome.SURVIVED:
            sys.exit(f"{output}\nthe tests fail without any change")
        found: Counter[tuple[str, bool]] = Counter()
        for number, (room, mutation) in enumerate(chosen, start=1):
            began = time.monotonic()
            result = mutate_and_test([mutation], command(*ROOMS[room]), TIMEOUT_S)
            if result.worker_outcome is not WorkerOutcome.NORMAL:
                sys.exit(f"{mutation} could not be tried: {result.output}")
            found[room, result.is_killed] += 1
            what = "noticed" if result.is_killed else "SURVIVED"
            line = f"{mutation.module_path}:{mutation.start_pos[0]}"
            print(f"{number} {what} {line} ({time.monotonic() - began:.0f} s)")
            changed = [
                x for x in (result.diff or "").splitlines() if x[:1] in "+-" and x[1:2] != x[0]
            ]
            failed = [
                x for x in (result.output or "").splitlines() if x.startswith(("FAILED", "ERROR"))
            ]
            print(*changed, *failed, sep="\n", flush=True)
    for room in asked.room or ROOMS:
        print(f"{found[room, True]} of {found[room, True] + found[room, False]} noticed: {room}")
    noticed = sum(count for (_, killed), count in found.items() if killed)
    print(f"{noticed} of {len(chosen)} noticed: {noticed / len(chosen):.2f}")


if __name__ == "__main__":
    main()
