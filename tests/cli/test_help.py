"""Names of commands and options: nothing may be removed or renamed by accident."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from infl_cli.main import app

TASK_DATA = "option"
WHERE = "runs json"
HOW = f"{WHERE} address device num-gpus node-label local detach stalled-after trust"

TRAINED = f"{HOW} {TASK_DATA} dry-run task checkpoint preset epochs workers"
QUERIES = "test test-set point region tokens quantity noise-draws seed"
SCORES = f"{TRAINED} {QUERIES} batch-size shard-size"
SOLVER = (
    "solver damping damping-share operator product precision curvature-samples tolerance "
    "max-iterations segments exponential scale "
    "depth batch repeats targets"
)
CURVATURE = f"layer {SOLVER}"
EXPERIMENT = f"{TRAINED} {QUERIES} {SOLVER} by"

OPTIONS = {
    "init": "",
    "check": f"{TASK_DATA} device json",
    "doctor": f"{WHERE} address",
    "runs": WHERE,
    "status": f"{WHERE} follow watch address",
    "logs": "runs",
    "stop": "runs address",
    "resume": f"{HOW} workers",
    "verify": f"{WHERE} repair",
    "top": f"{WHERE} trust k layer channel test side png parquet",
    "suspects": f"{WHERE} trust k by csv png",
    "denoise": f"{WHERE} checkpoint sigma grey seed out",
    "submit train": f"{HOW} {TASK_DATA} dry-run task preset epochs seed save-epoch optimizer lr "
    "momentum nesterov weight-decay no-bias-decay schedule warmup step-every step-factor "
    "clip-norm batch-size precision recorded norms-layer norms-skip-epochs reduce",
    "submit grad-norms": f"{HOW} {TASK_DATA} dry-run task layer reduce checkpoint combine "
    "precision seed preset epochs workers batch-size shard-size per-token",
    "submit s-test": f"{SCORES} {CURVATURE}",
    "submit influence": f"{SCORES} {CURVATURE} s-test models combine relative keep-layers "
    "per-token",
    "submit unrolled": f"{TRAINED} {QUERIES} precision",
    "submit attribution": f"{SCORES} layer norms exclude-norm-above normalize keep-layers",
    "submit self-influence": f"{TRAINED} layer solver damping curvature-samples precision seed "
    "batch-size shard-size",
    "submit baseline": f"{SCORES} method precision",
    "submit gradients": f"{TRAINED} layer dim projection whole stored precision noise-draws seed "
    "batch-size shard-size",
    "submit gram": f"{HOW} {TASK_DATA} dry-run task gradients quantity workers",
    "submit query-gradients": f"{TRAINED} {QUERIES} gradients",
    "submit gradient-scores": f"{TRAINED} {QUERIES} gradients method damping combine keep-layers "
    "approximate shard-size",
    "submit gradient-index": f"{HOW} {TASK_DATA} dry-run task gradients method damping workers",
    "submit ablation": f"{EXPERIMENT} k mode relabel-to same-run seeds shard-size",
    "submit stability": f"{EXPERIMENT} retrainings top ensemble",
    "submit lds": f"{EXPERIMENT} subsets fraction same-run seeds ensemble shard-size",
    "submit calibrate": f"{TRAINED} {QUERIES} epoch damping solver models subsets held-out seeds "
    "fraction curvature-samples precision shard-size",
    "submit scores": f"{HOW} {TASK_DATA} dry-run task {QUERIES} file",
    "submit paper": f"{TRAINED} quick",
    "report": "runs out trust",
    "view": "runs port open trust",
    "cluster up": "num-cpus num-gpus",
    "cluster dashboard": "address copy",
    "cluster status": "json",
    "cluster wait": "address nodes timeout",
    "cluster down": "",
    "data mnist": "data-dir",
}


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(_commands(typer.main.get_command(app)))


def test_there_are_these_commands() -> None:
    assert set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_has_these_options(name: str) -> None:
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    assert sorted(word for option in options for word in option.opts) == sorted(
        f"--{word}" for word in OPTIONS[name].split()
    )
    assert [option.secondary_opts for option in options] == [[]] * len(options)
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("name", ["", "submit", "cluster", "data", *OPTIONS])
def test_help_shows_every_option_at_80_columns(infl: Callable[..., Any], name: str) -> None:
    answer = infl(*name.split(), "--help")
    assert answer.code == 0
    assert answer.err == ""
    for option in OPTIONS.get(name, "").split():
        assert re.search(rf"--{option}[ ,]", answer.out)
    assert max(map(len, answer.out.splitlines())) <= 80


@pytest.mark.parametrize("group", ["", "submit", "cluster", "data"])
def test_a_group_alone_shows_its_help(infl: Callable[..., Any], group: str) -> None:
    answer = infl(*group.split())
    assert answer.code == 2
    assert "Usage: infl" in answer.out
    assert answer.err == ""


def test_help_and_completion_do_not_wait_for_torch() -> None:
    code = "import infl_cli.main, sys; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_keeps_the_asterisks_of_a_pattern(infl: Callable[..., Any]) -> None:
    assert "*lora*" in infl("submit", "grad-norms", "--help").out
