"""Each example from its check to its scores, at tiny size.

Norms are compared with plain autograd in float64, one sample at a time. Scores are compared with
(G + lambda I) x = gradient solved directly in float64, with G made of the Jacobians of every
sample's outputs, row by row, and of the loss's Hessian written out by hand.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_jobs.contract import jobs, parameters
from influence_jobs.gradients.weights import weight_named
from influence_jobs.kinds.train.spec import TrainedCheckpoint
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.find import find_run
from influence_jobs.store.run import Run
from influence_jobs.tasks.base import Draw, Task, to_type
from influence_jobs.tasks.registry import task_class

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

Infl = Callable[..., Any]
DAMPING = 0.3
IGNORED = -100
DRAW = Draw(0)


@dataclass(frozen=True)
class Example:
    """An example, and what is asked of it.

    Attributes:
        name: Of the task.
        options: Of the task, which make it small.
        norms: The layers of grad-norms.
        weights: Some of the weights whose norms these are.
        layers: The layers of influence; without any, all parameters that are trained.
        query: Words of the query beside its id.
        lr: Learning rate.
        warned: Words in the lines of the check that are marked `warn`.
    """

    name: str
    norms: tuple[str, ...]
    weights: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: {"samples": 8, "hidden": 4})
    layers: tuple[str, ...] = ()
    query: tuple[str, ...] = ()
    lr: float = 0.01
    warned: tuple[str, ...] = ()


EXAMPLES = [
    Example(
        "resnet:ResNet",
        ("all",),
        ("conv1", "layer4.1.conv2", "fc"),
        {"images": "images", "size": 32},
        layers=("fc",),
        lr=1e-4,  # else the running statistics of BatchNorm are far from the samples'
    ),
    Example(
        "bert:Bert",
        ("all", "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"),
        ("bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings", "classifier"),
        warned=("position_embeddings",),
    ),
    Example(
        "gpt:Gpt",
        ("all", "transformer.wte"),
        ("transformer.h.0.attn.c_attn", "transformer.wte"),
        query=("--region", "0,2,1,2"),
        warned=("wte.weight = lm_head.weight", "transformer.wpe"),
    ),
    Example(
        "vit:ViT",
        ("all", "class_token", "*self_attention"),
        (
            "conv_proj",
            "class_token",
            "encoder.layers.encoder_layer_0.self_attention",
        ),
        warned=("self_attention",),
    ),
    Example(
        "tabular:Tabular",
        ("all", "module:1"),
        ("0", "1", "6"),
        {"samples": 20, "width": 4},
        query=("--quantity", "prediction"),
    ),
    Example(
        "unet:UNet",
        ("all", "*norm"),
        ("down.conv", "middle.norm", "up"),
        {"samples": 6, "width": 2},
        query=("--region", "4,5,3,2"),
    ),
    Example("lstm:Lstm", ("rnn", "head"), ("rnn.weight_hh_l0", "head"), warned=("(LSTM)",)),
    Example(
        "lstm:Lstm",
        ("embed", "rnn"),
        ("embed", "rnn.weight_ih_l0"),
        {"samples": 8, "hidden": 4, "cell": "gru"},
        warned=("(GRU)",),
    ),
    Example(
        "lora:Lora",
        ("*lora*",),
        (
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default",
            "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.default",
        ),
        {"samples": 8, "hidden": 4, "rank": 1},
        layers=("*lora*",),
        warned=("frozen",),
    ),
]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda e: f"{e.name} {e.options.get('cell', '')}".strip()
)
def test_an_example(
    example: Example, infl: Infl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROBE_S", 0.0)
    monkeypatch.setattr(parameters, "_REPEATS", 1)
    if "images" in example.options:
        from resnet import write_digits

        monkeypatch.setattr(jobs, "ASKED", {"grad-norms": jobs.ASKED["grad-norms"]})  # seconds each
        write_digits(tmp_path / "images", count=8, tests=6, classes=3)
    options = [word for name, value in example.options.items() for word in (f"--{name}", value)]

    checked = infl("check", example.name, *options, "--json")
    assert checked.code == 0, checked.out
    said = [f["said"] for f in checked.json["findings"] if f["mark"] == "warn"]
    assert [line for line in said if not any(word in line for word in example.warned)] == []

    train = ["--epochs", 2, "--optimizer", "adam", "--lr", example.lr, "--batch-size", 4]
    words = ["--task", example.name, *options, "--local"]
    name = example.name.partition(":")[2].lower()
    for line in (
        ["submit", "train", *words, *train],
        ["submit", "grad-norms", *words, "--checkpoint", f"train-{name}", "--reduce", "layer"]
        + [word for layer in example.norms for word in ("--layer", layer)],
        ["submit", "influence", *words, "--checkpoint", f"train-{name}", "--test", 0]
        + [word for layer in example.layers for word in ("--layer", layer)]
        + [*example.query, "--damping", DAMPING],
    ):
        done = infl(*line)
        assert done.code == 0, (line, done.err)
    top = infl("top", f"influence-{name}", "--k", 2, "--json")
    assert top.code == 0, top.err

    task = task_class(example.name)(**example.options)
    train_run = find_run("runs", f"train-{name}").spec
    model = task.model()
    load_checkpoint(model, "runs", TrainedCheckpoint(train=train_run, epoch=2))
    model = model.double().eval()
    _compare_norms(find_run("runs", f"grad-norms-{name}"), task, model, example.weights)
    _compare_scores(find_run("runs", f"influence-{name}"), task, model, example)


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


def _compare_scores(run: Run, task: Task, model: nn.Module, example: Example) -> None:
    parameters = [p for name, p in model.named_parameters() if _counts(example, name, p)]
    region = tuple(map(int, example.query[1].split(","))) if "--region" in example.query else None
    quantity = example.query[1] if "--quantity" in example.query else "loss"
    query = to_type(task.test_batch(torch.tensor([0]), DRAW), torch.float64)
    measured = task.measure(model, query, quantity, region)  # type: ignore[arg-type]
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


def _counts(example: Example, name: str, parameter: Tensor) -> bool:
    wanted = [layer.strip("*") for layer in example.layers]
    return parameter.requires_grad and (not wanted or any(layer in name for layer in wanted))


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
