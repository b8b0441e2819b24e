"""Wrong requests for experiments: each ends with one line and exit code 2, and writes nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]

DIGITS = ("--checkpoint", "train-digits", "--local", "--test", "3")
ABLATION = ("submit", "ablation", *DIGITS)
STABILITY = ("submit", "stability", *DIGITS)
LDS = ("submit", "lds", *DIGITS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*ABLATION, "--k", "1501"), "--k 1501: there are 1,500 training samples"),
        ((*ABLATION, "--k", "1500"), "removal must leave some: choose a smaller --k"),
        ((*ABLATION, "--k", "0"), "error: --k: input should be greater than or equal to "),
        ((*ABLATION, "--mode", "flip"), "error: --mode: input should be 'relabel' or 'remove'"),
        (
            (*ABLATION, "--mode", "relabel", "--same-run"),
            "--same-run has no meaning for --mode relabel: leave it out",
        ),
        ((*ABLATION, "--by", "helpfull"), "unknown method 'helpfull': choose attribution, helpful"),
        (
            (*ABLATION, "--by", "random", "--damping", "1"),
            "--damping has no meaning for --by random",
        ),
        (
            (*LDS, "--by", "loss", "--by", "dot-product", "--max-iterations", "9"),
            "--max-iterations has no meaning for --by loss, dot-product: leave it out",
        ),
        ((*STABILITY, "--by", "loss", "--solver", "cg"), "--solver has no meaning for --by loss"),
        ((*ABLATION, "--by", "helpfull", "--damping", "1"), "unknown method 'helpfull': choose"),
        ((*LDS, "--by", "helpfull", "--damping", "1"), "unknown method 'helpfull': choose"),
        (
            (*STABILITY, "--by", "helpfull", "--damping", "1"),
            "stability cannot test 'helpfull': choose",
        ),
        (
            (*LDS, "--by", "influence-nothing", "--damping", "1"),
            "there is no run influence-nothing",
        ),
        ((*ABLATION, "--by", "random", "--by", "random"), "method random is named twice"),
        ((*ABLATION, "--by", "influence-nothing"), "there is no run influence-nothing"),
        ((*ABLATION, "--by", "grad-norms-digits"), "has no scores: name a run that has"),
        ((*ABLATION, "--by", "dot-produkt"), "unknown method 'dot-produkt': choose attribution"),
        (
            (*ABLATION, "--test-set", "paper"),
            "this is not a readable file, and DigitsTask has no named",
        ),
        ((*ABLATION, "--test", "297"), "there is no test sample 297"),
        ((*ABLATION, "--relabel-to", "7"), "'7' is not one of 'report', 'next', 'random'"),
        (
            ("submit", "ablation", "--checkpoint", "train-digits", "--local"),
            "say what to explain: --test ID",
        ),
        ((*ABLATION, "--task", "mnist"), "is a training of digits:DigitsTask, not of mnist"),
        (
            (*ABLATION, "--mode", "remove", "--relabel-to", "next"),
            "--relabel-to has no meaning for",
        ),
        (
            ("submit", "lds", "--checkpoint", "train-digits@1", "--local", "--test", "3"),
            "models are retrained for 2 epochs, as train-digitstask-",
        ),
        ((*LDS, "--by", "harmful"), "leave method harmful out"),
        (
            (*LDS, "--batch-size", "8"),
            "there is no option --batch-size here, and task digits:DigitsTask has --width",
        ),
        (
            ("submit", "paper", "--checkpoint", "train-digits"),
            "the research report has no experiments with",
        ),
        ((*STABILITY, "--by", "random"), "stability cannot test 'random': choose a"),
        ((*STABILITY, "--top", "1501"), "--top 1501 is too many: there are 1,500 training samples"),
        ((*LDS, "--fraction", "1.5"), "fraction: Input should be less than 1"),
        ((*LDS, "--subsets", "2"), "error: --subsets: input should be greater than or equal to "),
        (
            ("submit", "paper", "--task", "digits:DigitsTask"),
            "the research report has no experiments with",
        ),
        (("report", "grad-norms-nothing"), "there is no run grad-norms-nothing"),
        (("report", "train-digits", "nothing"), "there is no run nothing"),
        (("report", "train-digits", "--out", "s3://bucket/x"), "name a folder on this machine"),
        (("view", "nothing"), "there is no run nothing"),
        (("view", "train-digits", "--port", "99999"), "'--port'"),
    ],
)
def test_an_experiment_that_cannot_be_done_is_refused(
    refused: Refused, runs: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(*words)


def test_a_run_whose_arrays_are_gone_is_refused(refused: Refused, runs: Path) -> None:
    (norms,) = runs.glob("grad-norms-*")
    shutil.rmtree(norms / "data.zarr/norms")
    assert f"run {norms.name} has no array 'norms/conv1'; it has none yet" in refused("top", "grad")
    shutil.rmtree(norms / "data.zarr")
    assert f"run {norms.name} has no arrays: " in refused("top", "grad-norms")
    assert f"run {norms.name} has no arrays: " in refused("report", "grad-norms")


def test_a_run_whose_scores_are_gone_is_refused(
    infl: Callable[..., object], refused: Refused, runs: Path
) -> None:
    infl("submit", "influence", *DIGITS, "--solver", "identity")
    (scored,) = runs.glob("influence-*")
    shutil.rmtree(scored / "data.zarr/scores")
    wanted = (("top",), ("top", "--layer", "conv1"), ("report",))
    for command, *words in wanted:
        line = refused(command, "influence-digits", *words)
        assert f"run {scored.name} has no array 'scores'; it has none yet" in line
    shutil.rmtree(scored / "data.zarr")
    for command, *words in wanted:
        line = refused(command, "influence-digits", *words)
        assert f"run {scored.name} has no arrays: it has not begun, or they were deleted" in line


def test_samples_without_classes_cannot_be_relabelled(refused: Refused, images: Path) -> None:
    words = ("submit", "ablation", "--task", "ffdnet", "--images", images, "--patch-size", 20)
    line = refused(*words, "--local", "--test", 0, "--k", 2, "--by", "random")
    assert "its samples have no classes (its loss is mse, not cross-entropy)" in line
    assert "use --mode remove" in line


def test_scores_of_other_queries_are_not_compared(
    infl: Callable[..., object], refused: Refused, runs: Path
) -> None:
    infl("submit", "baseline", "--method", "random", *DIGITS[:3], "--test", 5)
    line = refused(*ABLATION, "--by", "loss", "--by", "baseline-digits")
    assert "has other queries than baseline-digitstask-" in line
