"""Commands that messages suggest find the run, also with `--runs`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence_jobs.store.run import Run

Infl = Callable[..., Any]


def test_a_run_that_was_never_begun(infl: Infl, tmp_path: Path, finished_run: Run) -> None:
    run = Run.create(str(tmp_path / "elsewhere"), finished_run.spec)
    where = ("grad", "--runs", "elsewhere")
    resume = f"infl resume {run.id} --runs {tmp_path}/elsewhere"
    lines = ("run", run.id), ("path", run.files.url), ("status", "new"), ("next", resume)
    assert infl("status", *where).out == "".join(f"{name:6}  {value}\n" for name, value in lines)
    assert "message  it is not running\n" in infl("status", *where, "--follow").out
    assert infl("logs", *where).err == f"{run.id} has no logs yet: it has not begun\n"
    assert infl("stop", *where).err == f"{run.id} is not running\n"
    assert infl("verify", *where).err == (f"error: run {run.id} has not begun: {resume}\n")
    assert f"is not done yet: {resume}\n" in infl("top", *where).err
    assert f"is not finished (new): {resume}\n" in infl("report", *where).err
    assert "`infl runs --runs " in infl("top", "nothing", "--runs", "elsewhere").err


def test_what_a_ranking_suggests_finds_the_run(infl: Infl, runs: Path, finished_run: Run) -> None:
    runs.rename("elsewhere")
    train = next(Path("elsewhere").glob("train-*")).name
    where = f" --runs {Path('elsewhere').absolute()}\n"
    assert infl("top", "train", "--runs", "elsewhere").err.endswith(f"--checkpoint {train}{where}")
    Path(f"elsewhere/{finished_run.id}/tables/samples.parquet").unlink()
    damaged = infl("top", "grad", "--runs", "elsewhere").err
    assert damaged.endswith(f"infl verify {finished_run.id}{where}")
