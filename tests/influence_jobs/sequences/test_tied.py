"""A causal model with tied embeddings: every number against plain autograd, sample by sample."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from influence_jobs.curvature import ConjugateGradient, GaussNewton, Hessian
from influence_jobs.errors import ModelError
from influence_jobs.gradients import (
    GradDots,
    GradNorms,
    GradProjections,
    ParameterSpace,
    TokenDots,
    TokenNorms,
    several_uses,
)
from influence_jobs.gradients.projections import projections
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.gradients.rules import base
from influence_jobs.gradients.weights import weight_named
from influence_jobs.tasks.base import Batch, Draw, Task
from influence_jobs.tasks.sequences import TokenLosses
from influence_jobs.terms import Reduction

WORDS, N = 7, 4
IGNORED = -100


class Language(Task):
    """Four texts of up to five words; the third has a beginning that does not count."""

    output_loss = "cross-entropy"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(WORDS, (N, 5), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, 3:], self.mask[3, 4:] = 0, 0
        self.following = self.ids.masked_fill(self.mask == 0, IGNORED)[:, 1:].clone()
        self.following[2, :2] = IGNORED

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=WORDS, n_positions=6, n_embd=4, n_layer=1, n_head=2)
        return GPT2LMHeadModel(config)

    def train_data(self) -> Tensor:
        return self.ids

    def batch(self, ids: Tensor, draw: Draw) -> Batch:
        return self.ids[ids], self.mask[ids], self.following[ids]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        ids, mask, _ = batch
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1]

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch[2]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses_BT = F.cross_entropy(self.outputs(model, batch).mT, batch[2], reduction="none")
        return losses_BT.sum(1) / (batch[2] != IGNORED).sum(1)


TASK = Language()
BATCH = TASK.batch(torch.arange(N), Draw(0))
WEIGHTS = ["transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn"]
WEIGHTS += ["transformer.h.0.mlp.c_fc", "transformer.ln_f", "transformer.h.0.attn.c_attn.bias"]


@pytest.fixture
def model() -> nn.Module:
    found = TASK.model().double().eval()
    assert found.lm_head.weight is found.transformer.wte.weight
    return found


def dense(model: nn.Module, batch: Batch = BATCH) -> Tensor:
    """The gradient of each sample's loss by all parameters, (N, P)."""
    space = ParameterSpace(model)
    return space.join(gradients_one_by_one(model, [*space.shapes], TASK.losses, batch))


def vectors(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, ParameterSpace(model).size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("reduction", ["layer", "channel", "kernel"])
@pytest.mark.parametrize("gram", [True, False])
def test_norms_by_either_way(
    model: nn.Module, gram: bool, reduction: Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (base, several_uses):
        monkeypatch.setattr(module, "through_gram", lambda *_, **__: gram)
    names = [weight_named(model, name).parameter for name in WEIGHTS]
    gradients = gradients_one_by_one(model, names, TASK.losses, BATCH)
    with GradNorms(model, WEIGHTS, TASK.losses, reduction=reduction, precision="float64") as norms:
        found = norms(BATCH)
        assert norms.slow_layers(BATCH).keys() == {"transformer.wpe"}  # called without the batch
    for name, parameter in zip(WEIGHTS, names, strict=True):
        expected = weight_named(model, name).norms(gradients[parameter], reduction)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)


def test_dot_products_and_projections(model: nn.Module) -> None:
    space, gradients_NP, v_QP = ParameterSpace(model), dense(model), vectors(model)
    with GradDots(model, space, TASK.losses, v_QP, precision="float64") as dots:
        torch.testing.assert_close(dots.total(BATCH), gradients_NP @ v_QP.t())
    random = projections(
        model, space, outputs=3, inputs=3, distribution="gaussian", seed=0, whole=False
    )
    parts = space.split(gradients_NP)
    with GradProjections(model, space, TASK.losses, random, precision="float64") as projected:
        found = projected(BATCH)
        for group, of_group in random.items():
            sides = [one.to(gradients_NP.device, gradients_NP.dtype) for one in of_group.values()]
            expected = sum(
                side(parts[name]).flatten(1) for side, name in zip(sides, of_group, strict=True)
            )
            torch.testing.assert_close(found[group], expected)


def test_curvature_and_influence(model: nn.Module) -> None:
    """Against matrices written out: G of the tokens that count, and the Hessian."""
    space = ParameterSpace(model)
    rows, weights = [], []
    for i in range(N):
        one = tuple(part[i : i + 1] for part in BATCH)
        outputs_TV = TASK.outputs(model, one)[0]
        counted = (one[2][0] != IGNORED).nonzero().flatten()
        for t in counted:
            p = outputs_TV[t].softmax(0).detach()
            weights.append((torch.diag(p) - torch.outer(p, p)) / len(counted))
            jacobian = [
                space.join(
                    {
                        name: part.unsqueeze(0)
                        for name, part in zip(
                            space.shapes,
                            torch.autograd.grad(
                                logit, [*space.parameters().values()], retain_graph=True,
                                materialize_grads=True,
                            ),
                            strict=True,
                        )
                    }
                )
                for logit in outputs_TV[t]
            ]  # fmt: skip
            rows.append(torch.cat(jacobian))
    matrix_PP = sum(j.t() @ w @ j for j, w in zip(rows, weights, strict=True)) / N
    operator = GaussNewton(model, space, TASK, torch.arange(N), batch_size=3)
    v_QP = vectors(model)
    torch.testing.assert_close(operator @ v_QP, v_QP @ matrix_PP, rtol=1e-8, atol=1e-10)
    solved = torch.linalg.solve(matrix_PP + 0.1 * torch.eye(space.size), v_QP.t())
    found = ConjugateGradient(0.1, tolerance=1e-12).solve(operator, v_QP).x_QP
    torch.testing.assert_close(found, solved.t(), rtol=1e-6, atol=1e-7)

    def at(step: float) -> Tensor:
        moved = TASK.model().double().eval()
        with torch.no_grad():
            for name, part in space.split(v_QP[:1]).items():
                moved.get_parameter(name).add_(step * part[0])
        return dense(moved).mean(0)

    slope_P = (at(1e-6) - at(-1e-6)) / 2e-6
    product = Hessian(model, space, TASK, torch.arange(N)) @ v_QP[:1]
    assert (product[0] - slope_P).norm() <= 1e-6 * slope_P.norm()


def of_tokens(model: nn.Module) -> list[list[Tensor]]:
    """By sample and token the gradient (P,) of what the token brings to the sample's loss."""
    space, found = ParameterSpace(model), []
    for i in range(N):
        places = (BATCH[2][i] != IGNORED).nonzero().flatten().tolist()

        def loss(model: nn.Module, batch: Batch, place: int, many: int) -> Tensor:
            logits = TASK.outputs(model, batch)[:, place]
            return F.cross_entropy(logits, batch[2][:, place], reduction="none") / many

        one = tuple(part[i : i + 1] for part in BATCH)
        by_token = [
            gradients_one_by_one(
                model, [*space.shapes], partial(loss, place=t, many=len(places)), one
            )
            for t in places
        ]
        found.append([space.join(gradients)[0] for gradients in by_token])
    return found


def test_tokens_bring_parts_of_dot_products(model: nn.Module) -> None:
    space, v_QP, expected = ParameterSpace(model), vectors(model), of_tokens(model)
    parts = TokenLosses(TASK)
    assert parts.look(model, BATCH).tolist() == [4, 2, 2, 3]
    with GradDots(model, space, TASK.losses, v_QP, precision="float64") as dots:
        found_BTQ = TokenDots(model, space, parts, v_QP)(BATCH, dots.total(BATCH))
        for i, gradients in enumerate(expected):
            torch.testing.assert_close(
                found_BTQ[i, : len(gradients)], torch.stack(gradients) @ v_QP.t()
            )
            assert not found_BTQ[i, len(gradients) :].any()
        torch.testing.assert_close(found_BTQ.sum(1), dots.total(BATCH), rtol=1e-12, atol=1e-14)
        with pytest.raises(ModelError, match="do not add up to their sample's"):
            TokenDots(model, space, parts, v_QP)(BATCH, dots.total(BATCH) * 1.001)


def test_tokens_have_norms(model: nn.Module) -> None:
    expected, parts = of_tokens(model), TokenLosses(TASK)
    space = ParameterSpace(model)
    counts_B = parts.look(model, BATCH)
    norms = TokenNorms(model, WEIGHTS, parts, precision="float64")
    norms.check(BATCH)
    found = norms(BATCH, int(counts_B.max()))
    norms.close()
    for name in WEIGHTS:
        parameter = weight_named(model, name).parameter
        for i, gradients in enumerate(expected):
            by_token = [space.split(gradient[None])[parameter].norm() for gradient in gradients]
            torch.testing.assert_close(found[name][i, : len(gradients)], torch.stack(by_token))
            assert not found[name][i, len(gradients) :].any()


def test_a_tokens_gradient_is_not_what_its_position_adds(model: nn.Module) -> None:
    """The first words get gradient from the last token's loss: attention carries it there."""
    parts = TokenLosses(TASK)
    parts.look(model, BATCH)
    seen: list[Tensor] = []
    hook = model.get_submodule("transformer.wte").register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    last = parts(model, BATCH)[0, -1]
    hook.remove()
    (g_BTD,) = torch.autograd.grad(last, seen)
    assert (g_BTD[0].norm(dim=1)[:-1] > 1e-4).all()
