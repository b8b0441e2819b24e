"""Curvature of models and losses beyond classifiers, against dense float64 matrices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_jobs.curvature import ConjugateGradient, GaussNewton, Hessian
from influence_jobs.errors import DataError, ModelError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.tasks.base import Batch, Task

N = 6
IGNORED = -100


class Given(Task):
    """A model, rows, targets, and the loss of one sample's outputs and targets."""

    def __init__(
        self,
        network: Callable[[], nn.Module],
        rows: Tensor,
        targets: Tensor,
        loss_of_one: Callable[[Tensor, Tensor], Tensor],
        output_loss: Any,
    ):
        self.network, self.loss_of_one = network, loss_of_one
        self.data = TensorDataset(rows, targets)
        self.output_loss = output_loss  # type: ignore[misc]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.network().double()

    def train_data(self) -> TensorDataset:
        return self.data

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch[0])
        return found

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch[1]
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        pairs = zip(self.outputs(model, batch), batch[1], strict=True)
        return torch.stack([self.loss_of_one(o, t) for o, t in pairs])


def rows(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, (N, *shape), generator=torch.Generator().manual_seed(2))


def partly_ignored(targets: Tensor) -> Tensor:
    found = targets.clone()
    found[1, :2], found[4, 0] = IGNORED, IGNORED
    return found


def tokens(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: F.cross_entropy(o, t, reduction=reduction, ignore_index=IGNORED)


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))  # (B, T, 3) to (B, T, 5)


def vector(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 4, 1))


def huber(o: Tensor, t: Tensor) -> Tensor:
    return (1 + (o - t).square()).sqrt().sum() - 1


LOSSES = {
    "mean over tokens": (sequence, rows(4, 3), classes(5, 4), tokens("mean"), "cross-entropy"),
    "sum over tokens": (sequence, rows(4, 3), classes(5, 4), tokens("sum"), "cross-entropy"),
    "tokens that do not count": (
        sequence, rows(4, 3), partly_ignored(classes(5, 4)), tokens("mean"), "cross-entropy",
    ),
    "mean over all tokens": (
        sequence, rows(4, 3), partly_ignored(classes(5, 4)),
        lambda o, t: tokens("sum")(o, t) / 4, "cross-entropy",
    ),
    "pixels": (
        image, rows(1, 3, 3), classes(4, 3, 3),
        lambda o, t: F.cross_entropy(o[None], t[None]), "cross-entropy",
    ),
    "one number": (
        lambda: nn.Sequential(vector(1)(), nn.Flatten(0)), rows(3), rows(),
        lambda o, t: (o - t).square(), "mse",
    ),
    "a sum of squares": (
        vector(3), rows(3), rows(3), lambda o, t: (o - t).square().sum(), "mse",
    ),
    "half a sum of squares": (
        vector(2), rows(3), rows(2), lambda o, t: 0.5 * (o - t).square().sum(), "mse",
    ),
    "one logit": (
        vector(1), rows(3), classes(2).double(),
        lambda o, t: F.binary_cross_entropy_with_logits(o[0], t), "binary-cross-entropy",
    ),
    "labels": (
        vector(3), rows(3), classes(2, 3).double(),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="sum"),
        "binary-cross-entropy",
    ),
    "a loss of one's own": (
        vector(2), rows(3), rows(2), huber,
        lambda outputs, targets: (1 + (outputs - targets).square()).sqrt().sum(1) - 1,
    ),
    "one's own without a forward mode": (
        vector(2), rows(3), rows(2), lambda o, t: F.huber_loss(o, t, reduction="sum"),
        lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none").sum(1),
    ),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        out: Tensor = self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class Tied(nn.Module):
    """The output layer has the weight of the first, which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.mid(self.first(x.mean(1)))))
        return out


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        super().__init__(layer, nn.Flatten(), nn.Linear(20, 3))


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3))
    model[1].weight.requires_grad_(False)
    return model


MODELS = {
    "attention": Attention,
    "encoder": Encoder,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "tied": Tied,
    "frozen": half_frozen,
}


def classifier(network: Callable[[], nn.Module]) -> Given:
    return Given(network, rows(5, 4), classes(3), F.cross_entropy, "cross-entropy")


def dense(task: Given, model: nn.Module, *, hessian: bool) -> Tensor:
    """The matrix by plain autograd, one sample and one output at a time, in float64."""
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in trained)
    total = torch.zeros(size, size, dtype=torch.float64)

    def flat(value: Tensor, *, graph: bool = False) -> Tensor:
        found = torch.autograd.grad(
            value, trained, retain_graph=True, create_graph=graph, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in found])

    # The kernels that have second derivatives, as a user would choose them.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),
    ):
        for i in range(N):
            x, t = task.data[i : i + 1]
            outputs = task.outputs(model, (x, t))[0]
            if hessian:
                slope = flat(task.loss_of_one(outputs, t[0]), graph=True)
                total += torch.stack([flat(value) for value in slope]) / N
                continue
            jacobian = torch.stack([flat(value) for value in outputs.reshape(-1)])
            curved = torch.autograd.functional.hessian(
                lambda o, t=t: task.loss_of_one(o, t[0]), outputs.detach()
            ).reshape(outputs.numel(), outputs.numel())
            total += jacobian.T @ curved @ jacobian / N
    return total


def operators(task: Given) -> tuple[nn.Module, GaussNewton, Hessian]:
    model = task.model().eval()
    space, ids = ParameterSpace(model), torch.arange(N)
    gauss_newton = GaussNewton(model, space, task, ids, batch_size=4)
    return model, gauss_newton, Hessian(model, space, task, ids, batch_size=4)


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_of_any_loss_of_the_outputs(name: str) -> None:
    task = Given(*LOSSES[name])
    model, operator, _ = operators(task)
    operator.require_finite()
    v_QP = torch.randn(3, operator.size, dtype=torch.float64)
    expected = v_QP @ dense(task, model, hessian=False)
    torch.testing.assert_close(operator @ v_QP, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_products_of_any_model(name: str) -> None:
    task = classifier(MODELS[name])
    model, gauss_newton, hessian = operators(task)
    v_QP = torch.randn(3, gauss_newton.size, dtype=torch.float64)
    for operator, exact in ((gauss_newton, False), (hessian, True)):
        expected = v_QP @ dense(task, model.train(False), hessian=exact)
        torch.testing.assert_close(operator @ v_QP, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_conjugate_gradients_solve_for_any_model(name: str) -> None:
    task = classifier(MODELS[name])
    model, operator, _ = operators(task)
    rhs_QP = torch.randn(2, operator.size, dtype=torch.float64)
    found = ConjugateGradient(0.1, tolerance=1e-10).solve(operator, rhs_QP).x_QP
    matrix = dense(task, model, hessian=False) + 0.1 * torch.eye(operator.size).double()
    torch.testing.assert_close(found, torch.linalg.solve(matrix, rhs_QP.T).T, rtol=1e-6, atol=1e-8)


def test_a_tied_weight_counts_once_under_the_layer_that_is_chosen() -> None:
    model = Tied()
    assert list(ParameterSpace(model).shapes) == [
        "first.weight", "first.bias", "mid.weight", "mid.bias", "last.bias",
    ]  # fmt: skip
    assert list(ParameterSpace(model, ["mid", "last"]).shapes) == [
        "first.weight", "mid.weight", "mid.bias", "last.bias",
    ]  # fmt: skip
    assert ParameterSpace(model, ["mid", "last"]).modules == ("mid", "last")


def test_frozen_parameters_do_not_count_and_a_frozen_layer_is_refused() -> None:
    model = half_frozen()
    assert list(ParameterSpace(model).shapes) == ["1.bias", "3.weight", "3.bias"]
    model[1].bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"^layer '1' is frozen \(requires_grad=False\)"):
        ParameterSpace(model, ["1"])
    with pytest.raises(ModelError, match="no trained parameters"):
        ParameterSpace(model.requires_grad_(False))


class Held(nn.Module):
    """Keeps handles of its weights where no transform finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)
        self.held = list(self.b.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x.mean(1))), *self.held)


class Packed(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out: Tensor = self.head(self.rnn(packed)[1][0][-1])
        return out


class _Cube(torch.autograd.Function):
    """Of one's own, with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(_Cube.apply(self.first(x.mean(1))))
        return out


def test_what_torch_cannot_differentiate_is_refused_by_name() -> None:
    _, operator, _ = operators(classifier(Cubed))
    with pytest.raises(ModelError, match=r"of Cubed differs from finite differences"):
        operator.product(torch.randn(1, operator.size, dtype=torch.float64), torch.arange(3))


class _Detached(torch.autograd.Function):
    """Torch takes its second derivative for zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


class Detached(Cubed):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(_Detached.apply(self.first(x.mean(1))))
        return out


class Sliced(nn.Module):
    """A slice of a ParameterList has parameters of its own, which no transform reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(a, b) / 2 for a, b in ((4, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        for weight in self.weights[:1]:
            x = torch.tanh(x @ weight)
        return x @ self.weights[1]


class WeightNormed(nn.Module):
    """Torch has no forward mode of weight_norm, and its second derivative is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x.mean(1))))
        return out


@pytest.mark.parametrize("network", [Detached, WeightNormed])
def test_second_derivatives_that_are_wrong_are_refused(network: Callable[[], nn.Module]) -> None:
    task = classifier(network)
    model, gauss_newton, hessian = operators(task)
    v_QP = torch.randn(1, hessian.size, dtype=torch.float64)
    torch.testing.assert_close(gauss_newton @ v_QP, v_QP @ dense(task, model, hessian=False))
    with pytest.raises(ModelError, match=r"differs from finite differences.* use --operator gauss"):
        hessian.product(v_QP, torch.arange(3))


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        *((Packed, GaussNewton), (Packed, Hessian), (WeightNormed, GaussNewton)),
        *((Held, GaussNewton), (Held, Hessian), (Sliced, GaussNewton), (Sliced, Hessian)),
    ],
)
def test_what_transforms_cannot_do_plain_autograd_does(
    network: Callable[[], nn.Module],
    kind: type[GaussNewton] | type[Hessian],
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = classifier(network)
    torch.manual_seed(0)
    model = task.model().eval()
    operator = kind(model, ParameterSpace(model), task, torch.arange(N))
    v_QP = torch.randn(2, operator.size, dtype=torch.float64)
    matrix = dense(task, model, hessian=kind is Hessian)
    torch.testing.assert_close(operator @ v_QP, v_QP @ matrix)
    assert "the curvature is computed by plain autograd, one vector at a time" in caplog.text
    ids_EB = torch.arange(4).view(2, 2)  # as LiSSA, which would map over mini-batches
    v_EQP = torch.stack([v_QP, 2 * v_QP])
    together = operator.space.join(operator.products(v_EQP, ids_EB))
    for v, ids, found in zip(v_EQP, ids_EB, together, strict=True):
        torch.testing.assert_close(found, operator.product(v, ids))


class HardSwish(nn.Module):
    """Torch knows its first derivative only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.hardsigmoid(self.first(x.mean(1))))
        return out


def test_without_second_derivatives_gauss_newton_works_and_the_hessian_names_it() -> None:
    task = classifier(HardSwish)
    model = task.model().eval()
    gauss_newton, hessian = (
        kind(model, ParameterSpace(model), task, torch.arange(N)) for kind in (GaussNewton, Hessian)
    )
    v_QP = torch.randn(1, hessian.size, dtype=torch.float64)
    assert (gauss_newton @ v_QP).isfinite().all()
    with pytest.raises(ModelError, match=r"use --operator gauss-newton, or replace the"):
        hessian.product(v_QP, torch.arange(3))


def test_a_loss_that_is_none_of_the_forms_is_refused() -> None:
    def weighted(o: Tensor, t: Tensor) -> Tensor:
        return 0.3 * F.cross_entropy(o, t)

    task = Given(sequence, rows(4, 3), classes(5, 4), weighted, "cross-entropy")
    with pytest.raises(
        ModelError, match=r"losses\(\) of Given does not give the cross-entropy of outputs\(\) \(6"
    ):
        operators(task)[1].require_finite()
    task = Given(sequence, rows(4, 3), classes(5, 4), weighted, "entropy")
    with pytest.raises(
        ModelError, match="output_loss of Given is 'entropy': set it to 'cross-entr"
    ):
        operators(task)[1].require_finite()


def test_a_form_that_a_later_sample_contradicts_is_not_kept() -> None:
    """The first eight samples have no token that does not count, so two forms give their losses."""
    targets = classes(5, 4).repeat(2, 1)
    targets[10, :2] = IGNORED
    data = rows(4, 3).repeat(2, 1, 1)
    task = Given(sequence, data, targets, lambda o, t: tokens("sum")(o, t) / 4, "cross-entropy")
    model = task.model().eval()
    operator = GaussNewton(model, ParameterSpace(model), task, torch.arange(12), batch_size=4)
    operator.look()
    before = operator._forms[0].words
    operator.require_finite()
    assert "mean over counted" in before
    assert "mean over all" in operator._forms[0].words


def test_a_query_whose_gradient_is_zero_is_refused() -> None:
    from influence_jobs.jobs.queries import query_gradients
    from influence_jobs.specs.queries import Queries, Query

    class MixedBatch(Given):
        def test_data(self) -> TensorDataset:
            return self.data

        def losses(self, model: nn.Module, batch: Batch) -> Tensor:
            logits = self.outputs(model, batch)
            return F.nll_loss(F.log_softmax(logits, dim=0), batch[1], reduction="none")

    task = MixedBatch(vector(3), rows(3), classes(3), F.cross_entropy, None)
    model = task.model().eval()
    queries = Queries(items=(Query(test=2),))
    with pytest.raises(DataError, match="loss of test sample 2 is exactly zero"):
        query_gradients(task, model, ParameterSpace(model), queries, 0, 1)


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, ignore_index=IGNORED, reduction="sum")


def test_classes_that_do_not_count() -> None:
    targets = classes(2).index_fill(0, torch.tensor([1, 4]), IGNORED)
    task = Given(lambda: nn.Sequential(nn.Linear(3, 2)), rows(3), targets, cross_entropy,
                 "cross-entropy")  # fmt: skip
    _, gauss_newton, hessian = operators(task)
    v_QP = torch.randn(2, gauss_newton.size, dtype=torch.float64)
    torch.testing.assert_close(gauss_newton @ v_QP, hessian @ v_QP)  # the model is linear


class NoiseByRow(Given):
    """A sample's loss depends on its place in the batch."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        noise = torch.rand(len(batch[0]), generator=torch.Generator().manual_seed(0))
        return super().losses(model, batch) * (1 + noise.double())


def test_losses_that_depend_on_the_place_in_the_batch_are_refused() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[None], target[None])

    task = NoiseByRow(lambda: nn.Linear(3, 4), rows(3), classes(4), loss, None)
    model = task.model().eval()
    operator = Hessian(model, ParameterSpace(model), task, torch.arange(N))
    with pytest.raises(ModelError, match=r"a sample's loss is .* alone and .* in a batch"):
        operator @ torch.ones(1, operator.size, dtype=torch.float64)


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_a_hook_that_changes_a_gradient_is_refused(kind: type[Any], changes: bool) -> None:
    network = partial(nn.Sequential, nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    task = Given(network, rows(3), classes(4), F.cross_entropy, "cross-entropy")
    model = task.model().eval()
    operator = kind(model, ParameterSpace(model), task, torch.arange(N))
    v_QP = torch.randn(1, operator.size, dtype=torch.float64)
    plain = operator @ v_QP
    model[0].weight.register_hook((lambda g: g / 2) if changes else (lambda g: None))
    hooked = kind(model, ParameterSpace(model), task, torch.arange(N))
    if changes:
        with pytest.raises(ModelError, match=r"^parameter '0\.weight' has a gradient hook"):
            hooked @ v_QP
    else:
        torch.testing.assert_close(hooked @ v_QP, plain)


class Padded(nn.Module):
    """Sums over words, padding among them, of which torch gives the embedding no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3, padding_idx=2)
        nn.init.normal_(self.words.weight)
        self.head = nn.Linear(3, 4)

    def forward(self, texts: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(texts).sum(1).tanh())
        return found


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_the_row_of_padding_counts_as_frozen(kind: type[Any]) -> None:
    texts = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(3))
    assert (texts == 2).any()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[None], target[None])

    task = Given(Padded, texts, classes(4), loss, "cross-entropy")
    model = task.model().eval()
    space = ParameterSpace(model)
    v_QP = torch.randn(2, space.size, generator=torch.Generator().manual_seed(4)).double()
    found_QP = kind(model, space, task, torch.arange(N)) @ v_QP

    moves = torch.ones(space.size, dtype=torch.float64)
    space.split(moves[None])["words.weight"][0, 2] = 0
    theta_P = space.join({n: p.detach()[None] for n, p in model.named_parameters()})[0]

    def outputs(moved_P: Tensor) -> Tensor:
        values_P = torch.where(moves > 0, moved_P, theta_P)
        p = {name: part[0] for name, part in space.split(values_P[None]).items()}
        hidden = p["words.weight"][texts].sum(1).tanh()
        return F.linear(hidden, p["head.weight"], p["head.bias"])

    if kind is Hessian:
        matrix_PP = torch.autograd.functional.hessian(
            lambda theta: F.cross_entropy(outputs(theta), task.data.tensors[1]), theta_P
        )
    else:
        jacobian_NCP = torch.autograd.functional.jacobian(outputs, theta_P)
        p_NC = outputs(theta_P).softmax(1)
        h_NCC = torch.diag_embed(p_NC) - p_NC[:, :, None] * p_NC[:, None, :]
        matrix_PP = torch.einsum("ncp,ncd,ndq->pq", jacobian_NCP, h_NCC, jacobian_NCP) / N
    torch.testing.assert_close(found_QP, v_QP @ matrix_PP)
