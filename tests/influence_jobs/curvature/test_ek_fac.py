"""EK-FAC against a dense one: per-sample gradients by plain autograd, bases by definition."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs.curvature import EkFac, GaussNewton, Hessian, ek_fac, ek_fac_blocks
from influence_jobs.curvature.ek_fac_blocks import VectorBlock, _eigenvectors
from influence_jobs.curvature.output_roots import Doubts, exact_roots, random_root, random_signs
from influence_jobs.errors import DataError, ModelError, SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Draw
from influence_jobs.tasks.output_loss import FORMS, IGNORED, Form, forms_of

from .test_any_model import (
    LOSSES,
    MODELS,
    Encoder,
    Given,
    N,
    Tied,
    classes,
    classifier,
    dense,
    operators,
    rows,
)

LAMBDA = 0.05

# By layer: (module, its input (B, ...)) to rows (B, T, J). Written out here, not by the rules.
Rows = Callable[[nn.Module, Tensor], Tensor]


def linear_rows(_: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, x.shape[-1])


def conv_rows(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return F.unfold(x, module.kernel_size, padding=int(module.padding[0])).transpose(1, 2)


def roots_of(task: Given, model: nn.Module) -> list[list[Tensor]]:
    """By sample, the columns of a root of the loss's Hessian in the outputs, by autograd."""
    found = []
    for i in range(N):
        outputs, target = task.outputs(model, (task.data.tensors[0][i : i + 1],)), task.data[i][1]

        def loss(flat: Tensor, o: Tensor = outputs, t: Tensor = target) -> Tensor:
            return task.loss_of_one(flat.view_as(o)[0], t)

        hessian = torch.autograd.functional.hessian(loss, outputs.detach().flatten())
        values, vectors = torch.linalg.eigh(hessian)
        root = vectors * values.clamp(min=0).sqrt()
        found.append([root[:, k].view_as(outputs) for k in range(root.shape[1])])
    return found


def dense_ek_fac(
    task: Given, model: nn.Module, layers: list[str], v_QP: Tensor, *, damping: float
) -> Tensor:
    """The solution by definition, for Linear and Conv2d layers with a bias."""
    space = ParameterSpace(model, layers)
    columns = roots_of(task, model)
    parts = space.split(v_QP)
    found: dict[str, Tensor] = {}
    for layer in layers:
        module = model.get_submodule(layer)
        as_rows = conv_rows if isinstance(module, nn.Conv2d) else linear_rows
        x_rows, g_rows, gradients = [], [], []
        for i in range(N):
            calls: list[tuple[Tensor, Tensor]] = []
            hook = module.register_forward_hook(
                lambda m, args, out, c=calls: c.append((args[0], out))
            )
            outputs = task.outputs(model, (task.data.tensors[0][i : i + 1],))
            hook.remove()
            sizes = [torch.zeros(1, dtype=torch.float64) for _ in calls]
            for s in columns[i]:
                wanted = [*(y for _, y in calls), *module.parameters()]
                *gs, weight, bias = torch.autograd.grad(
                    (outputs * s).sum(), wanted, retain_graph=True
                )
                for call, g in enumerate(gs):
                    g_TC = (
                        g[0].flatten(1).t() if as_rows is conv_rows else linear_rows(module, g)[0]
                    )
                    g_rows.append(g_TC)
                    sizes[call] = sizes[call] + g_TC.square().sum(1)
                gradients.append(torch.cat([weight.flatten(1), bias.unsqueeze(1)], 1))
            for (x, _), size_T in zip(calls, sizes, strict=True):  # where an output depends on it
                x_rows.append(as_rows(module, x)[0].detach()[size_T > 1e-20])
        x, g = torch.cat(x_rows), torch.cat(g_rows)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        u, v = torch.linalg.eigh(g.t() @ g)[1], torch.linalg.eigh(x.t() @ x)[1]
        squares = sum((u.t() @ gradient @ v).square() for gradient in gradients) / N
        weight, bias = parts[f"{layer}.weight"], parts[f"{layer}.bias"]
        v_QCJ = torch.cat([weight.flatten(2), bias.unsqueeze(2)], 2)
        solved = u @ ((u.t() @ v_QCJ @ v) / (squares + damping)) @ v.t()
        found[f"{layer}.weight"] = solved[..., :-1].reshape(weight.shape)
        found[f"{layer}.bias"] = solved[..., -1]
    return space.join(found)


def solved(task: Given, layers: list[str] | None, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Right-hand sides, the solution, and the model."""
    torch.manual_seed(0)
    model = task.model().eval()
    space = ParameterSpace(model, layers)
    ids, size = options.pop("ids", torch.arange(N)), options.pop("batch_size", 4)
    operator = GaussNewton(model, space, task, ids, batch_size=size)
    v_QP = torch.randn(2, space.size, dtype=torch.float64)
    return v_QP, EkFac(LAMBDA, **options).solve(operator, v_QP).x_QP, operator


def close(found: Tensor, expected: Tensor, error: float = 1e-8) -> None:
    assert (found - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_against_a_dense_ek_fac(name: str) -> None:
    task = Given(*LOSSES[name])
    model = task.model().eval()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    v_QP, found, _ = solved(task, layers)
    close(found, dense_ek_fac(task, model, layers, v_QP, damping=LAMBDA))


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_targets_come_to_the_exact_ones(name: str) -> None:
    task = Given(*LOSSES[name])
    ids = torch.arange(N).repeat(400)
    _, exact, _ = solved(task, None)
    _, sampled, _ = solved(task, None, ids=ids, batch_size=600, targets="sampled")
    close(sampled, exact, 0.05)


class Twice(nn.Module):
    """One layer, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.inner(x).tanh()).tanh().mean(1))
        return out


def test_a_layer_called_twice_has_the_positions_of_both_calls() -> None:
    task = classifier(Twice)
    v_QP, found, operator = solved(task, ["inner", "head"])
    model = operator.model
    close(found, dense_ek_fac(task, model, ["inner", "head"], v_QP, damping=LAMBDA))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_side_that_is_too_large_keeps_its_own_axes(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the moments of that side are diagonal anyway, so EK-FAC is the whole matrix."""
    monkeypatch.setattr(ek_fac_blocks, "MOST_SIDE", 3)
    x = torch.eye(8, dtype=torch.float64)[:N] if side == "inputs" else rows(2)
    inputs, outputs = (8, 2) if side == "inputs" else (2, 8)
    task = Given(lambda: nn.Sequential(nn.Linear(inputs, outputs, bias=False)), x, rows(outputs),
                 lambda o, t: (o - t).square().sum(), "mse")  # fmt: skip
    v_QP, found, operator = solved(task, None)
    whole = dense(task, operator.model, hessian=False)
    close(
        found,
        torch.linalg.solve(
            whole + LAMBDA * torch.eye(len(whole), dtype=torch.float64), v_QP.t()
        ).t(),
    )


@pytest.mark.parametrize("most", [2**20, 40, 1])
def test_what_is_no_matrix_has_its_own_block(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, by row or a diagonal: blocks cut from the dense Gauss-Newton matrix."""
    monkeypatch.setattr(ek_fac_blocks, "MOST_MOMENTS", most)
    task = Given(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()
        ),
        rows(2, 3, 3),
        classes(16),
        F.cross_entropy,
        "cross-entropy",
    )
    v_QP, found, operator = solved(task, None)
    whole = dense(task, operator.model, hessian=False)
    expected, start = torch.empty_like(v_QP), 0
    for shape in operator.space.shapes.values():
        size = math.prod(shape)
        cuts = [1, shape[0], size]
        blocks = next((r for r in cuts if size**2 // r <= most), size)
        for _ in range(blocks):
            own = slice(start, start + size // blocks)
            block = whole[own, own] + LAMBDA * torch.eye(size // blocks, dtype=torch.float64)
            expected[:, own] = torch.linalg.solve(block, v_QP[:, own].t()).t()
            start = own.stop
    close(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_any_model_has_its_trace(name: str) -> None:
    """Eigenvalues of all blocks add up to the trace of the dense matrix, whatever the blocks."""
    task = classifier(MODELS[name])
    v_QP, _, operator = solved(task, None)
    solver = EkFac(LAMBDA)
    solver.solve(operator, v_QP)
    assert solver._last is not None
    eigenvalues = sum(float(b.eigenvalues.sum()) for b in solver._last[1].blocks.values())
    trace = float(dense(task, operator.model, hessian=False).trace())
    assert eigenvalues == pytest.approx(trace, rel=1e-6)


def test_biases_alone_count_though_that_of_the_keys_is_rounding() -> None:
    """BitFit: a softmax over keys does not change with their bias."""

    def biases_alone() -> nn.Module:
        model = Encoder()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bias" in name)
        return model

    class InFloat32(Given):
        def model(self) -> nn.Module:
            return super().model().float()

        def train_data(self) -> TensorDataset:
            return TensorDataset(rows(5, 4).float(), classes(3))

    task = InFloat32(biases_alone, rows(5, 4), classes(3), F.cross_entropy, "cross-entropy")
    model = task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(N))
    found = EkFac(LAMBDA).solve(operator, torch.randn(1, operator.size)).x_QP
    assert found.isfinite().all()


class Across(nn.Module):
    """A layer that is called with the samples on another axis than the first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inner, self.head, self.first = nn.Linear(3, 4), nn.Linear(4, 2), first

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.first else x.flatten(0, 1)
        found = self.inner(x).tanh()
        found = found.transpose(0, 1) if self.first else found.view(-1, 3, 4)
        result: Tensor = self.head(found.mean(1))
        return result


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_whose_first_axis_is_not_the_sample_has_a_whole_block(first: bool) -> None:
    task = Given(lambda: Across(first), rows(3, 3), classes(2), F.cross_entropy, "cross-entropy")
    require_own_blocks(task, ["inner"])


def test_attention_whose_out_proj_is_never_called() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
            return found

    task = Given(Attends, rows(3, 4), classes(2), F.cross_entropy, "cross-entropy")
    require_own_blocks(task, ["attention.out_proj"])


def require_own_blocks(task: Given, layers: list[str]) -> None:
    """Each parameter has its whole block of the dense Gauss-Newton matrix."""
    v_QP, found, operator = solved(task, layers)
    whole = dense(task, operator.model, hessian=False)
    space, all_of_it = operator.space, ParameterSpace(operator.model)
    where = all_of_it.split(torch.arange(all_of_it.size))
    for name in space.shapes:
        own = where[name].flatten()
        block = whole[own][:, own] + LAMBDA * torch.eye(len(own), dtype=torch.float64)
        v_QD, x_QD = (space.split(part)[name].flatten(1) for part in (v_QP, found))
        close(x_QD, torch.linalg.solve(block, v_QD.t()).t())


def test_a_tied_weight_is_one_block() -> None:
    require_own_blocks(classifier(Tied), ["first"])


class Transposed(nn.Module):
    """Kernels that do not overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x)
        return out


class AtEveryPixel(nn.Module):
    """The same map as a Linear layer at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 8, bias=False)
        torch.manual_seed(0)
        with torch.no_grad():
            self.up.weight.copy_(Transposed().up.weight.flatten(1).t())

    def forward(self, x: Tensor) -> Tensor:
        patches = self.up(x.movedim(1, -1)).unflatten(-1, (2, 2, 2))  # (B, H, W, C, kh, kw)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), 2, 4, 4)


def test_a_transposed_convolution_equals_a_linear_layer() -> None:
    task, twin = (
        Given(kind, rows(3, 2, 2), classes(2, 4, 4), lambda o, t: F.cross_entropy(o[None], t[None]),
              "cross-entropy")
        for kind in (Transposed, AtEveryPixel)
    )  # fmt: skip
    v_QP, found, operator = solved(task, None)
    linear = twin.model().eval()
    batch = task.batch(torch.arange(N), None)
    torch.testing.assert_close(linear(batch[0]), operator.model(batch[0]))
    twin_operator = GaussNewton(linear, ParameterSpace(linear), twin, torch.arange(N))
    turned = v_QP.view(2, 3, 8).transpose(1, 2).reshape(2, 24)
    expected = EkFac(LAMBDA).solve(twin_operator, turned).x_QP
    close(found.view(2, 3, 8).transpose(1, 2).reshape(2, 24), expected)
    assert (found - v_QP / LAMBDA).norm() > 0.1


def test_a_layer_that_is_not_called_is_damped_alone() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.head = nn.Linear(20, 2), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x.flatten(1))
            return out

    v_QP, found, operator = solved(classifier(Unused), None)
    size = 20 * 2 + 2
    close(found[:, :size], v_QP[:, :size] / LAMBDA)
    assert (found[:, size:] - v_QP[:, size:] / LAMBDA).norm() > 0.1
    assert operator.space.size == v_QP.shape[1]


@pytest.mark.parametrize("targets", ["exact", "sampled"])
def test_batches_do_not_matter(targets: str) -> None:
    task = Given(*LOSSES["tokens that do not count"])
    _, one, _ = solved(task, None, batch_size=1, targets=targets)
    _, four, _ = solved(task, None, batch_size=4, targets=targets)
    close(one, four, 1e-10)


def test_the_seed_is_of_the_sampled_targets() -> None:
    task = Given(*LOSSES["mean over tokens"])
    found = [
        solved(task, None, seed=seed, targets=targets)[1]
        for seed in (0, 1)
        for targets in ("sampled", "exact")
    ]
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_many_outputs_or_many_samples_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    _, operator, _ = operators(Given(*LOSSES["mean over tokens"]))  # 20 outputs a sample
    v_QP = torch.randn(1, operator.size, dtype=torch.float64)

    def chosen() -> str:
        found: str = EkFac(LAMBDA).solve(operator, v_QP).record["targets"]
        return found

    assert chosen() == "exact"
    monkeypatch.setattr(ek_fac, "AUTO_OUTPUTS", 19)
    assert chosen() == "sampled"
    monkeypatch.setattr(ek_fac, "AUTO_OUTPUTS", 20)
    monkeypatch.setattr(ek_fac, "AUTO_PASSES", 20 * N - 1)
    assert chosen() == "sampled"


def test_a_trial_does_the_work_and_counts_it() -> None:
    _, operator, _ = operators(Given(*LOSSES["mean over tokens"]))  # 6 samples, 4 in a batch
    v_QP = torch.randn(1, operator.size, dtype=torch.float64)
    before = [p.requires_grad for p in operator.model.parameters()]
    trial = EkFac(LAMBDA).trial(operator, v_QP, 3)
    assert trial.said == ("exact targets: 20 outputs, two sweeps over 6 samples",)
    assert [next(trial.pieces) for _ in range(3)] == [4 / 12, 2 / 12, 4 / 12]
    trial.pieces.close()  # type: ignore[attr-defined]
    assert [p.requires_grad for p in operator.model.parameters()] == before
    sampled = EkFac(LAMBDA, targets="sampled").trial(operator, v_QP, 3)
    assert sampled.said == ("sampled targets, two sweeps over 6 samples",)


def test_factors_are_fitted_once_for_given_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    fit = EkFac._fit
    monkeypatch.setattr(EkFac, "_fit", lambda *args: fits.append(1) or fit(*args))
    _, operator, _ = operators(classifier(Twice))
    v_QP = torch.randn(2, operator.size, dtype=torch.float64)
    solver = EkFac(LAMBDA)
    first = solver.solve(operator, v_QP).x_QP
    assert torch.equal(solver.solve(operator, v_QP).x_QP, first)
    assert len(fits) == 1
    with torch.no_grad():
        operator.model.head.weight.mul_(2)
    assert not torch.equal(solver.solve(operator, v_QP).x_QP, first)
    assert len(fits) == 2


# -- roots -----------------------------------------------------------------------------------------


def of_one(form: Form, outputs: Tensor, targets: Tensor) -> Tensor:
    """The Hessian (D, D) of the first sample's loss, by autograd."""

    def loss(flat: Tensor) -> Tensor:
        found: Tensor = form.losses(flat.view_as(outputs[:1]), targets[:1]).sum()
        return found

    hessian: Tensor = torch.autograd.functional.hessian(loss, outputs[:1].flatten())
    return hessian


TOKENS = (torch.randn(2, 3, 3, dtype=torch.float64), torch.tensor([[0, 2, IGNORED], [1, 1, 1]]))
EXAMPLES = {
    "cross-entropy": [
        (torch.randn(2, 4, dtype=torch.float64), torch.tensor([1, 3])),
        (torch.randn(2, 4, dtype=torch.float64), torch.tensor([IGNORED, 3])),
        *[TOKENS] * 6,
    ],
    "mse": [(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))] * 4,
    "binary-cross-entropy": [(torch.randn(2, 3, dtype=torch.float64), torch.ones(2, 3))] * 2,
}
ROOTS = [
    (form, *example)
    for name, examples in EXAMPLES.items()
    for form, example in zip(
        [FORMS[name][0], *FORMS[name]] if name == "cross-entropy" else FORMS[name],
        examples,
        strict=True,
    )
]


@pytest.mark.parametrize(
    ("form", "outputs", "targets"), ROOTS, ids=lambda v: getattr(v, "words", "")
)
def test_roots_add_up_to_the_hessian(form: Form, outputs: Tensor, targets: Tensor) -> None:
    expected = of_one(form, outputs, targets)
    columns = [s[0].flatten() for s in exact_roots(form, outputs, targets, Doubts())]
    found = sum((torch.outer(s, s) for s in columns), torch.zeros_like(expected))
    torch.testing.assert_close(found, expected)
    many = 40_000
    outputs, targets = (one[:1].expand(many, *one.shape[1:]) for one in (outputs, targets))
    signs = random_signs(0, range(many), outputs)
    s_ND = random_root(form, outputs, targets, signs, Doubts()).flatten(1)
    assert ((s_ND.t() @ s_ND) / many - expected).abs().max() <= 0.03 * expected.abs().max()


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    squares = (outputs - targets).square().sum(1)
    return squares + squares.square()


def of_sums(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sum(1) - targets.sum(1)).square()  # of rank one


def linear(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum(1)


@pytest.mark.parametrize("own", [steep, of_sums, linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_a_loss_of_ones_own(
    own: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    outputs, targets = torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    (form,) = forms_of(Given(lambda: nn.Linear(1, 1), outputs, targets, lambda o, t: o, own))
    doubts = Doubts()
    columns = [s[0] for s in exact_roots(form, outputs, targets, doubts)]
    doubts.settle()
    found = sum((torch.outer(s, s) for s in columns), torch.zeros(6, 6, dtype=dtype))
    torch.testing.assert_close(found, of_one(form, outputs, targets))


def test_there_are_no_more_columns_than_are_needed() -> None:
    """A softmax has one direction less than classes; positions that do not count have none."""
    outputs = torch.randn(3, 20, 4, dtype=torch.float64)
    targets = torch.full((3, 20), IGNORED)
    targets[0, [3, 17]], targets[1, 5] = 1, 2
    form = next(form for form in FORMS["cross-entropy"] if "last axis, sum" in form.words)
    assert len([*exact_roots(form, outputs, targets, Doubts(), 2)]) == 2 * 3
    (first, *_), classes = FORMS["cross-entropy"], torch.tensor([0, 1, 2])
    assert len([*exact_roots(first, outputs[:, 0], classes, Doubts())]) == 3


class Roots(nn.Module):
    """Its gradient is NaN where an input is zero, though its value is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x).abs().sqrt())
        return logits


def test_samples_whose_gradient_is_not_finite_are_named() -> None:
    x, y = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    x[17] = 0
    task = Given(Roots, x, y, F.cross_entropy, "cross-entropy")
    model = task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(24), batch_size=8)
    with pytest.raises(DataError, match="the curvature of samples 16 to 23 is not finite"):
        EkFac(LAMBDA).solve(operator, torch.ones(1, operator.size, dtype=torch.float64))


def test_signs_are_a_function_of_seed_and_position() -> None:
    like = torch.empty(7, 3, 100)
    whole = random_signs(5, range(7), like)
    assert torch.equal(whole[2:6], random_signs(5, range(2, 6), like[2:6]))
    assert not torch.equal(whole, random_signs(6, range(7), like))
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    flat_ND = random_signs(0, range(4000), torch.empty(4000, 300)).double()
    assert (flat_ND.t() @ flat_ND / 4000 - torch.eye(300)).abs().max() < 0.1  # 6 standard errors


# -- refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gauss_newton, hessian = operators(classifier(Twice))
    v_QP = torch.randn(1, gauss_newton.size, dtype=torch.float64)
    assert isinstance(hessian, Hessian)
    with pytest.raises(
        SpecError, match="EK-FAC works with the Gauss-Newton matrix only: leave --operator"
    ):
        EkFac(LAMBDA).solve(hessian, v_QP)

    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).square().sum(1)

    def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).square()

    def task_of(own: Callable[[Tensor, Tensor], Tensor]) -> Given:
        return Given(lambda: nn.Sequential(nn.Linear(3, 3)), rows(3), rows(3),
                     lambda o, t: own(o[None], t[None])[0], own)  # fmt: skip

    for own, targets, match in (
        (concave, "exact", "the loss is not convex in the outputs"),
        (concave, "sampled", "the loss is not convex in the outputs"),
        (coupled, "sampled", "which mixes the 3 outputs of a sample: give output_loss"),
    ):
        task = task_of(own)
        (form,) = forms_of(task)
        assert form.root is None
        with pytest.raises(ModelError, match=match):
            solved(task, None, targets=targets)
    monkeypatch.setattr("influence_jobs.curvature.output_roots.MOST_EXACT", 19)
    with pytest.raises(SpecError, match="--targets exact takes up to 19 outputs a sample"):
        solved(Given(*LOSSES["mean over tokens"]), None, targets="exact")
    with pytest.raises(ModelError, match=r"'rnn\.weight_ih_l0' has no Kronecker eigenbasis"):
        operator = solved(classifier(MODELS["LSTM"]), None)[2]
        EkFac(LAMBDA).metrics(operator, power=1)


@pytest.mark.parametrize("targets", ["exact", "sampled"])
def test_a_loss_that_is_not_convex_is_refused_after_its_first_batch(
    targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).square().sum(1)

    task = Given(lambda: nn.Sequential(nn.Linear(3, 3)), rows(3), rows(3),
                 lambda o, t: concave(o[None], t[None])[0], concave)  # fmt: skip
    model = task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(N), batch_size=1)
    v_QP = torch.randn(1, operator.size, dtype=torch.float64)
    solver = EkFac(LAMBDA, targets=targets)
    with pytest.raises(ModelError, match="not convex"):
        next(iter(solver.trial(operator, v_QP, 1.0).pieces))
    told: list[float] = []
    with pytest.raises(ModelError, match="not convex"):
        solver.solve(operator, v_QP, told.append)
    assert max(told, default=0.0) == 0.0


def test_data_that_end_too_soon_are_no_smaller_data() -> None:
    def reads_of_a_solve(most: int) -> int:
        task, reads = Given(*LOSSES["a sum of squares"]), 0
        plain = task.batch

        def batch(ids: Tensor, draw: Draw) -> Any:
            nonlocal reads
            reads += 1
            return plain(ids, draw) if reads <= most else next(iter(()))  # the user's, used up

        task.batch = batch  # type: ignore[method-assign]
        model = task.model().eval()
        operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(N), batch_size=1)
        EkFac(LAMBDA).factors_of([operator])
        return reads

    needed = reads_of_a_solve(10_000)
    for most in range(needed):
        with pytest.raises((RuntimeError, StopIteration)):
            reads_of_a_solve(most)


def test_a_coarse_block_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ek_fac_blocks, "MOST_MOMENTS", 4)
    _, operator, _ = operators(classifier(MODELS["GRU"]))
    v_QP = torch.randn(1, operator.size, dtype=torch.float64)
    (line,) = EkFac(LAMBDA).solve(operator, v_QP).record["messages"]
    assert "or as a diagonal: rnn.weight_ih_l0, rnn.weight_hh_l0" in line
    monkeypatch.setattr(ek_fac_blocks, "MOST_MOMENTS", 2**20)
    assert EkFac(LAMBDA).solve(operator, v_QP).record["messages"] == []


def test_numbers_that_are_always_zero_are_axes_of_their_own() -> None:
    live = torch.zeros(12, dtype=torch.bool)
    live[[1, 4, 5, 9]] = True
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * live
    moment = x.t() @ x
    vectors = _eigenvectors(moment, 4)
    torch.testing.assert_close(vectors.t() @ vectors, torch.eye(12, dtype=torch.float64))
    rotated = vectors.t() @ moment @ vectors
    torch.testing.assert_close(rotated, rotated.diagonal().diag())
    assert torch.equal(vectors[~live], torch.eye(12, dtype=torch.float64)[~live])
    zero = torch.zeros(3, 3)
    assert torch.equal(_eigenvectors(zero, 0), torch.eye(3))


def test_a_block_with_many_numbers_that_are_always_zero() -> None:
    g = torch.Generator().manual_seed(0)
    size, live = 512, 10
    sizes = 10 ** -torch.empty(size).uniform_(0, 8, generator=g)
    gradients = torch.randn(200, size, generator=g) * sizes
    gradients[:, torch.randperm(size, generator=g)[live:]] = 0
    block = VectorBlock("spare", torch.Size([size]), gradients.device, torch.float32)
    block.add(gradients)
    moment = gradients.double().t() @ gradients.double()
    block.diagonalise([])  # LAPACK's own way fails for it in float32
    damping = 0.1 * float(moment.diagonal().max())
    v = torch.randn(1, size, generator=g)
    found = block.times({"spare": v}, lambda values: 1 / (values + damping))["spare"]
    wanted = torch.linalg.solve(moment + damping * torch.eye(size).double(), v[0].double())
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-3, atol=1e-5 / damping)
