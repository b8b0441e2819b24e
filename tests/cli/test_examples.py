"""Each example, by the commands of its page, at tiny size.

Norms are compared with plain autograd in float64, one sample at a time. Scores are compared with
(G + lambda I) x = gradient solved directly in float64, with G made of the Jacobians of every
sample's outputs, row by row, and of the loss's Hessian written out by hand.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_jobs.contract import jobs, parameters
from influence_jobs.gradients.weights import weight_named
from influence_jobs.kinds.train.spec import Checkpoint
from influence_jobs.specs.base import TaskSpec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.placement import to_type
from influence_jobs.tasks.registry import make_task

PROJECT = Path(__file__).parents[2]

Infl = Callable[..., Any]
DAMPING = 0.3
IGNORED = -100
DRAW = Draw(0)


@dataclass(frozen=True)
class Example:
    """An example, and how it is made small.

    Attributes:
        name: Of the task; its page is docs/examples/FILE.md.
        options: Of the task.
        weights: Some of the weights whose norms the page asks for.
        warned: Words in the lines of the check that are marked `warn`.
        lr: Learning rate.
        slow: Whether it is one of those that take longest.
    """

    name: str
    weights: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: {"samples": 8, "hidden": 4})
    warned: tuple[str, ...] = ()
    lr: float = 0.01
    slow: bool = False


EXAMPLES = [
    Example(
        "resnet:ResNet",
        ("conv1", "layer4.1.conv2", "fc"),
        {"size": 32},
        lr=1e-4,  # else the running statistics of BatchNorm are far from the samples'
        slow=True,
    ),
    Example(
        "bert:Bert",
        ("bert.embeddings.word_embeddings", "bert.encoder.layer.1.output.dense", "classifier"),
        warned=("position_embeddings",),
        slow=True,
    ),
    Example(
        "gpt:Gpt",
        ("transformer.h.0.attn.c_attn", "transformer.wte"),
        warned=("wte.weight = lm_head.weight", "transformer.wpe"),
    ),
    Example(
        "vit:ViT",
        ("conv_proj", "class_token", "encoder.layers.encoder_layer_0.self_attention"),
        warned=("self_attention",),
        slow=True,
    ),
    Example("tabular:Tabular", ("0", "1", "6"), {"samples": 20, "width": 4}),
    Example("unet:UNet", ("down.conv", "middle.norm", "up"), {"samples": 6, "width": 2}, slow=True),
    Example("audio:Audio", ("0", "2", "6"), {"samples": 8, "width": 2}, slow=True),
    Example("lstm:Lstm", ("rnn.weight_hh_l0", "head"), warned=("(LSTM)", "(GRU)"), slow=True),
    Example(
        "lora:Lora",
        (
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default",
            "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.default",
        ),
        {"samples": 8, "hidden": 4, "rank": 1},
        warned=("frozen",),
        slow=True,
    ),
]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=example.name, marks=pytest.mark.slow if example.slow else ())
        for example in EXAMPLES
    ],
)
def test_an_example(
    example: Example, infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.0)
    monkeypatch.setattr(parameters, "_REPEATS", 1)
    stem = example.name.partition(":")[0]
    if stem == "resnet":
        from resnet import write_digits

        write_digits(tmp_path / "images", count=8, tests=6, classes=3)
        monkeypatch.setattr(jobs, "ASKED", {"grad-norms": jobs.ASKED["grad-norms"]})  # seconds each
    norms, scores = "", []
    lines = [line for line in _page(stem) if line.startswith("infl ")]
    assert [shlex.split(line)[1] for line in lines].count("check") == 1
    for line in lines:
        words = _small(line, example)
        words = [_newest(tmp_path, word) for word in words]  # a page names runs of its own
        done = infl(*words)
        assert done.code == 0, (words, done.out, done.err)
        if words[0] == "check":
            warned = re.findall(r"^warn +(.*)", done.out, re.MULTILINE)
            unknown = [w for w in warned if not any(word in w for word in example.warned)]
            assert unknown == []
        if words[:2] == ["submit", "grad-norms"]:
            norms = _run_in(done.out)
        if words[:2] == ["submit", "influence"] and "--damping" in words:
            scores.append((_run_in(done.out), words))

    for name, words in scores:
        run = find_run("runs", name)
        spec: Any = run.spec
        (s_test,) = spec.s_tests
        _compare_scores(run, *_trained(s_test.task, s_test.checkpoint), words)
    run = find_run("runs", norms)
    spec = run.spec
    _compare_norms(run, *_trained(spec.task, spec.checkpoints[0]), example.weights)


def _trained(spec: TaskSpec, checkpoint: Checkpoint) -> tuple[Task, nn.Module]:
    task = make_task(spec)
    model = task.model()
    load_checkpoint(model, "runs", checkpoint)
    return task, model.double().eval()


def _page(stem: str) -> list[str]:
    """The lines of a page's commands."""
    text = (PROJECT / "docs" / "examples" / f"{stem}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def _small(line: str, example: Example) -> list[str]:
    """The words of a command, with a tiny task, a short training and a known damping."""
    here = str(PROJECT / "examples")
    task = example.name.replace(":", ".py:")
    words = [
        f"{here}/{word}" if word == task else word for word in shlex.split(line, comments=True)[1:]
    ]
    given = [f"--{word}" for word in example.options]
    replaced = {**dict(zip(given, map(str, example.options.values()), strict=True))}
    replaced |= {"--epochs": "2", "--lr": str(example.lr), "--k": "2"}
    for i in range(len(words) - 1):
        words[i + 1] = replaced.get(words[i], words[i + 1])
    if words[0] in ("check", "submit"):
        words += [part for word in given if word not in words for part in (word, replaced[word])]
    if words[:2] == ["submit", "train"]:
        words += ["--batch-size", "4"]
    if words[:2] == ["submit", "grad-norms"]:
        words += [] if "--reduce" in words else ["--reduce", "layer"]
    if words[:2] == ["submit", "influence"] and "ek-fac" not in words:
        words += ["--damping", str(DAMPING)]
    return words


def _newest(folder: Path, word: str) -> str:
    """A run's name with a hash, as the newest run of its kind and task here."""
    if not re.fullmatch(r"[\w-]+-[0-9a-f]{12}", word):
        return word
    found = [*(folder / "runs").glob(f"{word[:-13]}-*")]
    return max(found, key=lambda run: run.stat().st_mtime_ns).name


def _run_in(out: str) -> str:
    (name,) = re.findall(r"^([\w-]+-[0-9a-f]{12}): done$", out, re.MULTILINE)
    return name


def _batch(task: Task, index: int) -> Any:
    """One sample alone, in float64."""
    return to_type(task.batch(torch.tensor([index]), DRAW), torch.float64)


def _compare_norms(run: Run, task: Task, model: nn.Module, weights: tuple[str, ...]) -> None:
    for name in weights:
        parameter = model.get_parameter(weight_named(model, name).parameter)
        found = run.read_rows(f"norms/{name}", 0, 3)
        for index in range(3):
            loss = task.losses(model, _batch(task, index)).sum()
            (gradient,) = torch.autograd.grad(loss, parameter)
            np.testing.assert_allclose(found[index], float(gradient.norm()), rtol=1e-4, atol=1e-7)


def _compare_scores(run: Run, task: Task, model: nn.Module, words: list[str]) -> None:
    asked = dict(pairwise(words))
    parameters = [
        p for name, p in model.named_parameters() if _counts(asked.get("--layer"), name, p)
    ]
    region = None
    if "--point" in asked:
        y, x = map(int, asked["--point"].split(","))
        region = (y, x, 1, 1)
    if "--region" in asked:
        y, x, height, width = map(int, asked["--region"].split(","))
        region = (y, x, height, width)
    if "--tokens" in asked:
        start, stop = map(int, asked["--tokens"].split(":"))
        region = (0, start, 1, stop - start)
    quantity = asked.get("--quantity", task.quantities[0])
    query = to_type(task.test_batch(torch.tensor([0]), DRAW), torch.float64)
    measured = task.measure(model, query, quantity, region)
    query_P = _gradient(measured.sum(), parameters)
    count = len(task.train_data())
    rows, gradients = [], []
    for index in range(count):
        batch = _batch(task, index)
        rows.append(_rooted_jacobian(task, model, batch, parameters))
        gradients.append(_gradient(task.losses(model, batch).sum(), parameters))
    # With G = A^T A / N: (G + l I)^-1 = (I - A^T (A A^T + N l I)^-1 A) / l.
    a_RP = torch.cat(rows)
    inner_RR = a_RP @ a_RP.T + count * DAMPING * torch.eye(len(a_RP), dtype=torch.float64)
    solved_P = (query_P - a_RP.T @ torch.linalg.solve(inner_RR, a_RP @ query_P)) / DAMPING
    expected_N = (torch.stack(gradients) @ solved_P).detach().numpy()
    (found_N,) = run.read_rows("scores", 0, count)
    assert np.abs(expected_N).max() > 0
    np.testing.assert_allclose(found_N, expected_N, atol=2e-3 * np.abs(expected_N).max())


def _counts(layer: str | None, name: str, parameter: Tensor) -> bool:
    return parameter.requires_grad and (layer is None or layer.strip("*") in name)


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def _rooted_jacobian(
    task: Task, model: nn.Module, batch: Any, parameters: list[nn.Parameter]
) -> Tensor:
    """A (R, P), of which A^T A is a sample's J^T H J."""
    outputs, targets = task.outputs(model, batch)[0], task.targets(batch)[0]
    jacobian_DP = torch.stack([_gradient(value, parameters) for value in outputs.flatten()])
    if task.output_loss == "mse":  # H is 2 / D
        return jacobian_DP * (2 / len(jacobian_DP)) ** 0.5
    p_TC = outputs.detach().reshape(-1, outputs.shape[-1]).softmax(1)
    counted_T = (targets.reshape(-1) != IGNORED).double()
    parts = []
    for p, counts, rows_CP in zip(p_TC, counted_T, jacobian_DP.split(p_TC.shape[1]), strict=True):
        # diag(p) - p p^T = R R^T with R = diag(sqrt p) - p sqrt(p)^T.
        root_CC = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        parts.append((counts / counted_T.sum()).sqrt() * (root_CC.T @ rows_CP))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["bert:Bert", "gpt:Gpt"])
def test_texts_are_removed_and_the_model_trained_anew(name: str, infl: Infl) -> None:
    words = ["--task", name, "--samples", 8, "--hidden", 4, "--epochs", 1, "--local"]
    asked = ["submit", "ablation", *words, "--test", 0, "--by", "random", "--k", 2]
    done = infl(*asked, "--mode", "remove")
    assert done.code == 0, done.err
    (row,) = find_run("runs", "ablation-").read_table("results").to_pylist()
    assert np.isfinite(row["loss"])
    assert (row["decision"] is None) == (name == "gpt:Gpt")  # each token has one
    if name == "gpt:Gpt":
        refused = infl(*asked, "--mode", "relabel")
        assert refused.code == 2
        assert "cannot be relabelled: the targets of a sample are (1, " in refused.err
