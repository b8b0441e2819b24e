"""Wrong requests for scores: each ends with one line and exit code 2, and writes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]

DIGITS = ("--checkpoint", "train-digits", "--local")
S_TEST = ("submit", "s-test", *DIGITS)
INFLUENCE = ("submit", "influence", *DIGITS)
ATTRIBUTION = ("submit", "attribution", *DIGITS)
ONE = ("--test", "3")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (S_TEST, "say what to explain: --test ID"),
        ((*S_TEST, "--test", "-1"), "error: --test: input should be greater than or equal to "),
        ((*S_TEST, "--test", "297"), "there is no test sample 297: DigitsTask has 297, 0 to 296"),
        ((*S_TEST, *ONE, *ONE), "test 3 is asked for twice"),
        (
            (*S_TEST, "--test-set", "paper"),
            "this is not a readable file, and DigitsTask has no named sets",
        ),
        ((*S_TEST, *ONE, "--point", "1,1"), "has no image regions: leave --point and --region out"),
        ((*S_TEST, *ONE, "--point", "1"), "--point 1: write Y,X, in whole pixels"),
        ((*S_TEST, *ONE, "--region", "1,1,a,2"), "--region 1,1,a,2: write Y,X,H,W"),
        ((*S_TEST, *ONE, "--region", "1,1,0,2"), "region 1,1,0,2 is empty or outside the image"),
        ((*S_TEST, *ONE, "--quantity", "change"), "cannot measure 'change': it has loss"),
        ((*S_TEST, *ONE, "--damping", "0"), "damping: Input should be greater than 0"),
        ((*S_TEST, *ONE, "--damping", "-1"), "damping: Input should be greater than 0"),
        (
            (*S_TEST, *ONE, "--depth", "9", "--solver", "cg"),
            "--depth has no meaning for --solver cg",
        ),
        ((*S_TEST, *ONE, "--batch", "8", "--solver", "ek-fac"), "--batch has no meaning"),
        (
            (*S_TEST, *ONE, "--solver", "identity", "--operator", "hessian"),
            "--operator has no meaning",
        ),
        ((*S_TEST, *ONE, "--scale", "5", "--tolerance", ".1"), "for --solver lissa: leave it out"),
        (
            (*S_TEST, *ONE, "--solver", "lu"),
            "'lu' is not one of 'cg', 'lissa', 'ek-fac', 'source', 'identity'",
        ),
        (
            (*S_TEST, *ONE, "--product", "finite-difference"),
            "finite differences need the Hessian",
        ),
        ((*S_TEST, *ONE, "--solver", "ek-fac", "--operator", "hessian"), "leave --operator out"),
        ((*S_TEST, *ONE, "--curvature-samples", "few"), "write a number of samples, or all"),
        ((*S_TEST, *ONE, "--layer", "9"), "layer 9 does not exist"),
        (
            (*S_TEST, *ONE, "--noise-draws", "0"),
            "error: --noise-draws: input should be greater than or equal to ",
        ),
        ((*INFLUENCE, "--s-test", "train-digits"), "is not an s-test run"),
        ((*INFLUENCE, "--s-test", "s-test-nix"), "there is no run s-test-nix"),
        ((*INFLUENCE, *ONE, "--s-test", "s-test-nix"), "leave their options out"),
        ((*INFLUENCE, "--s-test", "s-test-nix", "--limit", "3"), "leave their options out"),
        ((*INFLUENCE, "--s-test", "s-test-nix", "--task", "mnist"), "leave their options out"),
        (
            (*ATTRIBUTION, *ONE, "--quantity", "output"),
            "attribution explains activations, not a quantity: leave",
        ),
        ((*INFLUENCE, *ONE, "--combine", "max"), "'max' is not one of 'sum', 'mean'"),
        ((*ATTRIBUTION, *ONE, "--norms", "nix"), "there is no run nix"),
        (
            (*ATTRIBUTION, *ONE, "--norms", "train-digits"),
            "recorded no gradient norms: leave --norms out",
        ),
        ((*ATTRIBUTION, *ONE, "--norms", "grad", "--layer", "norm"), "has no norms of layer norm"),
        (
            (*ATTRIBUTION, *ONE, "--exclude-norm-above", "0"),
            "--exclude-norm-above: input should be greater than 0",
        ),
        (("submit", "unrolled", *DIGITS), "say what to explain: --test ID"),
        (("submit", "unrolled", "--checkpoint", "train-digits@3", *ONE), "with --epochs 3"),
        (("submit", "unrolled", *DIGITS, *ONE, "--layer", "1"), "there is no option --layer here"),
        (("submit", "baseline", *DIGITS, *ONE), "Missing option '--method'"),
        (
            ("submit", "baseline", *DIGITS, *ONE, "--method", "luck"),
            "'luck' is not one of 'random'",
        ),
        (("top", "grad", "--test", "3"), "--test has no meaning for grad-norms-digitstask"),
        (("top", "grad", "--png", "x.png"), "--png has no meaning for grad-norms-digitstask"),
    ],
)
def test_a_wrong_command_line_is_refused(
    refused: Refused, runs: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(*words)


def test_a_file_of_ids_that_holds_something_else(
    refused: Refused, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "ids.txt").write_text("3\nfour\n")
    assert "--test-set ids.txt: 'four' is not a test id" in refused(
        *S_TEST, "--test-set", "ids.txt"
    )


def test_weights_without_their_training_cannot_be_unrolled(
    refused: Refused, runs: Path, tmp_path: Path
) -> None:
    (train,) = runs.glob("train-*")
    (weights,) = train.glob("checkpoints/epoch-0002.pt")
    (tmp_path / "w.pt").write_bytes(weights.read_bytes())
    told = refused(
        *("submit", "unrolled", "--task", "digits:DigitsTask", "--checkpoint", "w.pt", *ONE)
    )
    assert "was trained: name a train run" in told
