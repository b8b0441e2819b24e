"""Projected gradients of GPT-2 by other libraries: what they need beside forward + backward.

dattri (LoGra), Bergson and traker get the network, the sequences and the batches of `gradients.py
gpt2`; 16 x 16 numbers a layer where a layer has numbers of its own. The layers of GPT-2 are written
as nn.Linear, which both know. Each method has a process of its own, for its peak memory.

    python benchmarks/gradients_peers.py dattri
    python benchmarks/gradients_peers.py bergson
    python benchmarks/gradients_peers.py traker     # its projection of all parameters, a part of it
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIDE = 16  # numbers of a side of a layer's projection
TRAKER_DIM = 8  # of its projection; the time is proportional to it


def gpt2() -> nn.Module:
    """GPT-2 of 124 million parameters, its Conv1D layers as nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.data.T.contiguous()
                linear.bias.data = child.bias.data
                setattr(module, name, linear)
    return model


def layers_of(model: nn.Module) -> list[str]:
    """The layers of the blocks; the embeddings are left out, which dattri has no hook for."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer.h.")
    ]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The sum of the sequences' mean losses."""
    scores = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").mean(1).sum()


def dattri(model: nn.Module, ids: Tensor, batch: int) -> Callable[[], object]:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(network: nn.Module, rows: Any, device: Any) -> Tensor:
        return loss_of(network, rows["input_ids"])

    task = AttributionTask(
        loss_func=loss, target_func=loss, model=model, checkpoints=model.state_dict()
    )

    def once() -> None:
        attributor = LoGraAttributor(
            task, layer_names=layers_of(model), hessian="Identity", proj_dim=SIDE**2
        )
        rows: list[Any] = [{"input_ids": row} for row in ids]
        attributor.cache(DataLoader(rows, batch))

    return once


def bergson(model: nn.Module, ids: Tensor, batch: int) -> Callable[[], object]:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
    batches = [list(range(i, min(i + batch, len(ids)))) for i in range(0, len(ids), batch)]
    wanted = {name.removeprefix("transformer.") for name in layers_of(model)}

    def once() -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(run_path=folder, projection_dim=SIDE)
            collect_gradients(
                model,  # type: ignore[arg-type]
                data,
                GradientProcessor(projection_dim=SIDE),
                config,
                batches=batches,
                target_modules=wanted,
            )

    return once


def traker(model: nn.Module, ids: Tensor, batch: int) -> Callable[[], object]:
    """The projection alone, of one gradient of all parameters a sequence."""
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in model.parameters())

    def once() -> None:
        projector = BasicProjector(
            size, TRAKER_DIM, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=1
        )
        for part in ids.split(batch):
            rows = []
            for one in part:
                found = torch.autograd.grad(loss_of(model, one[None]), list(model.parameters()))
                rows.append(torch.cat([g.flatten() for g in found]))
            projector.project(torch.stack(rows), model_id=0)

    return once


def main(
    method: Annotated[Literal["dattri", "bergson", "traker"], typer.Argument(help="Which.")],
    sequences: Annotated[int, typer.Option(help="Sequences a round.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
) -> None:
    """Time forward + backward and the method in turn; print seconds, ratio and peak memory."""
    model = gpt2()
    ids = torch.randint(0, 50257, (sequences, tokens))

    def plain() -> None:
        for part in ids.split(batch):
            model.zero_grad(set_to_none=True)
            loss_of(model, part).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    once = {"dattri": dattri, "bergson": bergson, "traker": traker}[method](model, ids, batch)
    taken: dict[str, list[float]] = {"plain": [], "method": []}
    for _ in range(rounds + 1):
        for name, run in (("plain", plain), ("method", once)):
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    # The first round warms up.
    middle = {name: statistics.median(times[1:]) for name, times in taken.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{method}: {middle['method']:.2f} s, {sequences / middle['method']:.2f} sequences/s, "
        f"{middle['plain'] / middle['method']:.2f} of forward + backward, peak {peak:,} MB"
    )


if __name__ == "__main__":
    typer.run(main)
