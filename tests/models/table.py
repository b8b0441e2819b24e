"""Make docs/models.md: which command is right for which model. `make models` runs it.

Every cell is kept as soon as it is done, so the program goes on where it was stopped. It does not
see that the library has changed: delete the file of cells then, or name what to do again.
"""

import argparse
import gc
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from cells import COLUMNS, REFUSED, RIGHT, Cell, Subject, cell
from zoo_base import TRAIN, Zoo

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = ("zoo_texts", "zoo_images", "zoo_others")


def models():
    """Every task of the zoo by its name: {LeNet: (file, class)}."""
    found = {}
    for file in FILES:
        module = importlib.import_module(file)
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == file and issubclass(kind, Zoo)
            if own and "model" in vars(kind):
                found[name] = HERE / f"{file}.py", kind
    return found


def main():
    """Fill the cells that are asked for and not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, default=ROOT / "models.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--model", action="append", help="only these")
    parser.add_argument("--column", action="append", help="only these")
    parser.add_argument("--again", action="append", default=[], help="also cells of this mark")
    parser.add_argument("--seconds", type=int, default=120, help="for a cell")
    options = parser.parse_args()
    # What runs write besides results must not reach the folders of this user.
    os.environ.pop("INFL_RUNS", None)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = read(options.cells)
    wanted_columns = options.column or list(COLUMNS)
    for name, (file, kind) in models().items():
        if options.model and name not in options.model:
            continue
        columns = [
            column
            for column in wanted_columns
            if (name, column) not in done or done[name, column].mark in options.again
        ]
        fill(name, file, kind, columns, options, done)
    options.page.write_text(page(done))
    told = Counter(one.mark for one in done.values())
    print(", ".join(f"{count} {mark}" for mark, count in told.most_common()))
    return 0 if set(told) <= {RIGHT, REFUSED} else 1


def fill(name, file, kind, columns, options, done):
    """Fill the cells of one model, and keep each."""
    if not columns:
        return
    with tempfile.TemporaryDirectory(prefix="infl-models-") as folder:
        subject = Subject(f"{file}:{kind.__name__}", kind, Path(folder))
        for column in columns:
            start = time.monotonic()
            found = cell(subject, column, options.seconds)
            done[name, column] = found
            line = {"model": name, "column": column, **asdict(found)}
            with options.cells.open("a") as file_of_cells:
                file_of_cells.write(json.dumps(line) + "\n")
            took = time.monotonic() - start
            words = found.words.strip().splitlines()[-1:] if found.words else ""
            print(name, column, found.mark, found.error, *words, f"{took:.1f} s", flush=True)
    gc.collect()


def read(file):
    """The cells that are there; of several of one place the last."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line.pop("model"), line.pop("column")): Cell(**line) for line in lines}


INTRODUCTION = """# Models that were tried

Every command on {count} small models of many kinds, {foreign} of them from torchvision, timm,
transformers and PEFT, each with {train} training samples. `make models` makes this page, cell by
cell; each model is a task in `tests/models`, each column a function in `tests/models/cells.py`.

A number is the largest relative error; the marks are

| mark | |
|---|---|
| 3e-07 | right: the largest relative error that was found |
| 3e-07 (84%) | right, of that share of the trained parameters; the command names the others |
| ok | right, where there is no number to compare |
| nothing | not tried yet |
| r1, r2, ... | refused by name, in one line with exit code 2; the lines are below |
| **WRONG**, **TRACEBACK**, **timeout** | a fault of `infl` |

What numbers are compared with, all by plain autograd in float64, one sample at a time:

| column | compared with |
|---|---|
{columns}
"""

FOREIGN = ("torchvision", "timm", "transformers", "peft")


def page(done):
    """The page, in Markdown."""
    known = {name: kind for name, (_, kind) in models().items()}
    names = [name for name in known if any(place[0] == name for place in done)]
    columns = [column for column in COLUMNS if any(place[1] == column for place in done)]
    foreign = sum(
        any(word in inspect.getsource(known[name].model) for word in (*FOREIGN, "_bert", "_Narrow"))
        for name in names
    )
    refusals = {}
    for (name, column), one in done.items():
        if one.mark == REFUSED:
            refusals.setdefault(refusal(one.words, name), []).append((name, column))
    ordered = sorted(refusals, key=lambda line: -len(refusals[line]))
    numbers = {line: i for i, line in enumerate(ordered, start=1)}
    lines = [
        INTRODUCTION.format(
            count=len(names),
            foreign=foreign,
            train=TRAIN,
            columns="\n".join(
                f"| {column} | {' '.join(inspect.getdoc(COLUMNS[column]).split())} |"
                for column in columns
            ),
        )
    ]
    for group in (columns[: len(columns) // 2], columns[len(columns) // 2 :]):
        lines += ["## The models" if group == columns[: len(columns) // 2] else "", ""]
        lines += [f"| model | {' | '.join(group)} |", f"|---|{'---|' * len(group)}"]
        for name in names:
            marks = [shown(done.get((name, column)), name, numbers) for column in group]
            lines.append(f"| {name} | {' | '.join(marks)} |")
        lines.append("")
    lines += ["## Refusals", "", "| | cells | what is said | where |", "|---|---|---|---|"]
    for line in ordered:
        where = {}
        for name, column in refusals[line]:
            where.setdefault(column, []).append(name)
        places = "; ".join(f"{column}: {', '.join(of)}" for column, of in where.items())
        said = line.replace("|", "\\|")
        lines.append(f"| r{numbers[line]} | {len(refusals[line])} | {said} | {places} |")
    faults = [(place, one) for place, one in done.items() if one.mark not in (RIGHT, REFUSED)]
    if faults:
        lines += ["", "## Faults", ""]
        for (name, column), one in faults:
            last = refusal((one.words.strip().splitlines() or [""])[-1], name)[:200]
            lines.append(f"- {name}, {column}: {one.mark} {one.error or ''} {last}")
    return "\n".join(lines) + "\n"


def shown(one, name, numbers):
    """A cell as the table has it."""
    if one is None:
        return ""
    if one.mark == REFUSED:
        return f"r{numbers[refusal(one.words, name)]}"
    if one.mark == RIGHT:
        number = "ok" if one.error is None else f"{one.error:.0e}" if one.error else "0"
        share = re.search(r"(\d+%) of the parameters", one.words)
        return f"{number} ({share[1]})" if share else number
    return f"**{one.mark}**" + ("" if one.error is None else f" {one.error:.0e}")


def refusal(words, name):
    """A refusal without what is of this run: ids, folders, and the hint to go on."""
    words = re.sub(r" \(infl logs [^)]*\)", "", " ".join(words.split()))
    words = re.sub(r"[a-z-]+-[a-z0-9]+-[0-9a-f]{12}", "RUN", words)
    return words.replace(name, "TASK")


if __name__ == "__main__":
    sys.exit(main())
