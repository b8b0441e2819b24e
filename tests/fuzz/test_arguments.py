"""Words of commands, drawn at random: an answer or one line, never a traceback."""

import contextlib
import io
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infl_cli import dry_run
from infl_cli.main import main
from influence_jobs.datasets import mnist
from influence_jobs.errors import DataError
from influence_jobs.jobs import automatic
from influence_jobs.kinds import kinds
from influence_jobs.store.run import Run
from influence_jobs.tasks import mnist as mnist_task

SEED = os.environ.get("INFL_FUZZ", "1")
COMMANDS = (
    ("runs",), ("status",), ("logs",), ("verify",), ("top",), ("report",), ("check",), ("denoise",),
    ("cluster", "nothing"), ("data", "nothing"), ("stop",), ("nothing",),
)  # fmt: skip
OPTIONS = (
    "--json", "--k", "--test", "--layer", "--checkpoint", "--epochs", "--lr", "--task", "--option",
    "--seed", "--batch-size", "--channel", "--png", "--parquet", "--solver", "--damping", "--point",
    "--region", "--quantity", "--norms", "--method", "--by", "--reduce", "--precision", "--preset",
    "--save-epoch", "--norms-layer", "--shard-size", "--width", "--images", "--out", "--help",
    "--retrainings", "--top", "--mode", "--subsets", "--relative", "--exclude-norm-above", "--x",
)  # fmt: skip
VALUES = (
    "", " ", "0", "-1", "1", "3", "1e999", "nan", "-inf", "1,2", "1,2,3,4", "all", "x", "conv1",
    "head", "digits:DigitsTask", "mnist", "ffdnet", "nix:Nix", "../x", "/dev/null", "/dev/zero",
    "train", "grad-norms", "train@all", "train@9", "@", "a=b", "width=8", "width={", "=", "\x1b[2J",
    "\ud800", "é" * 50, "9" * 5000, "{" * 3000, "--", "-", "runs", ".", "cg", "loss", "theta",
)  # fmt: skip


@pytest.fixture
def answer(
    tmp_path: Path, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], int]:
    """Runs the command of a number; returns its exit code."""
    shutil.copytree(finished_run.root, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("INFL_DATA", str(tmp_path / "data"))
    for module in (automatic, dry_run):
        monkeypatch.setattr(module, "PROBE_S", 0.0)

    def nothing_is_fetched(*_: object, **__: object) -> None:
        raise DataError("nothing is fetched in a test")

    for module in (mnist, mnist_task):
        monkeypatch.setattr(module, "fetch_mnist", nothing_is_fetched)

    def run(number: int) -> int:
        rng = random.Random(f"{SEED}/arguments/{number}")
        submits = [("submit", kind) for kind in kinds()]
        words = list(rng.choice((*COMMANDS, *submits, *submits)))
        dry = words[0] == "submit"
        for _ in range(rng.randrange(6)):
            words.append(rng.choice((*OPTIONS, *VALUES)))
            if rng.random() < 0.6:
                words.append(rng.choice(VALUES))
        words += ["--dry-run"] * dry
        monkeypatch.setattr(sys, "argv", ["infl", *words])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            try:
                main()
            except Exception as error:
                raise AssertionError(f"command {number}, seed {SEED}: {words!r}"[:500]) from error
        told = err.getvalue()
        assert "Traceback" not in told, words
        if left.value.code == 2 and told:
            assert told.splitlines()[-1].startswith("error: "), (words, told[-300:])
        assert left.value.code in (0, 2), words
        return int(left.value.code)

    return run


@pytest.mark.filterwarnings("ignore")
def test_some_commands(answer: Callable[[int], int]) -> None:
    assert 2 in {answer(number) for number in range(25)}


@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_commands(
    answer: Callable[[int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [answer(number) for number in range(1000)]
    with capsys.disabled():
        print(f"\ncommands: {len(codes):,}, {codes.count(0):,} accepted")
