"""Self-influence runs, compared with dense matrices in float64."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from influence_jobs.errors import SpecError
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.reference import gradients_one_by_one
from influence_jobs.jobs.saved_state import SavedFactors
from influence_jobs.kinds import view_of
from influence_jobs.kinds.s_test.job import curvature_samples
from influence_jobs.kinds.self_influence.spec import SelfInfluenceSpec
from influence_jobs.kinds.self_influence.view import SelfInfluenceView
from influence_jobs.specs.base import make_spec
from influence_jobs.specs.solvers import (
    ConjugateGradientSettings,
    Curvature,
    EkFacSettings,
    IdentitySettings,
)
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import FACTORS
from influence_jobs.store.run import Run
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.base import Draw

MODULES = ("conv2", "head")
LAMBDA, N = 0.02, 1500
IDS = torch.tensor([0, 3, 77, 500, 1499])


@pytest.fixture(scope="module")
def of(grad_norms_spec, checkpoint):
    """Makes specs of self-influence runs in float64."""

    def make(**fields):
        chosen = {
            "task": grad_norms_spec.task,
            "checkpoint": checkpoint,
            "modules": MODULES,
            "curvature": Curvature(samples=60),
            "solver": EkFacSettings(damping=LAMBDA, targets="exact"),
            "precision": "float64",
        }
        return make_spec(SelfInfluenceSpec, **(chosen | fields))

    return make


@pytest.fixture(scope="module")
def network(digits_task, checkpoint, scores_root):
    model = digits_task.model()
    load_checkpoint(model, str(scores_root), checkpoint)
    return model.eval()


def gradients(digits_task, network, modules) -> torch.Tensor:
    """Of some samples, each by autograd alone, (5, P)."""
    space = ParameterSpace(network, modules)
    found = gradients_one_by_one(
        network, list(space.shapes), digits_task.losses, digits_task.batch(IDS, Draw(0))
    )
    return space.join(found)


def logit_hessian(logits_BC: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropy in the logits, (B, C, C)."""
    p_BC = logits_BC.softmax(1)
    return torch.diag_embed(p_BC) - p_BC.unsqueeze(2) * p_BC.unsqueeze(1)


def test_of_one_sample_the_inverse_is_that_of_the_dense_matrix(
    of, carry_out, digits_task, network
) -> None:
    """The curvature of one sample in one linear layer is a Kronecker product: EK-FAC is exact."""
    spec = of(modules=("head",), curvature=Curvature(samples=1, seed=3))
    run = carry_out(spec)
    exact = copy.deepcopy(network).double()
    images, labels = digits_task.batch(curvature_samples(digits_task, spec.curvature), Draw(0))
    parameters = dict(exact.head.named_parameters(prefix="head"))
    jacobians = jacrev(lambda given: functional_call(exact, given, (images.double(),))[0])(
        parameters
    )
    j_CP = torch.cat([jacobians[name].flatten(1) for name in parameters], dim=1)
    dense_PP = j_CP.T @ logit_hessian(exact(images.double()))[0] @ j_CP
    dense_PP += LAMBDA * torch.eye(len(dense_PP), dtype=torch.float64)
    g_BP = gradients(digits_task, network, ("head",))
    expected_B = (g_BP * torch.linalg.solve(dense_PP.detach(), g_BP.T).T).sum(1)
    found_B = run.read_rows("self_influence", 0, N)[IDS]
    np.testing.assert_allclose(found_B, expected_B, rtol=1e-8)
    assert len(labels) == 1


def test_of_many_samples_it_is_the_corrected_eigenbasis_written_out(
    of, carry_out, digits_task, network
) -> None:
    spec = of(modules=("head",))
    run = carry_out(spec)
    exact = copy.deepcopy(network).double()
    images, _ = digits_task.batch(curvature_samples(digits_task, spec.curvature), Draw(0))
    inputs = []
    exact.head.register_forward_hook(lambda _, given, __: inputs.append(given[0].detach()))
    hessians_BCC = logit_hessian(exact(images.double())).detach()
    a_BJ = torch.cat([inputs[0], torch.ones(len(images), 1)], dim=1)
    u_CC = torch.linalg.eigh(hessians_BCC.mean(0)).eigenvectors
    v_JJ = torch.linalg.eigh(a_BJ.T @ a_BJ / len(a_BJ)).eigenvectors
    curved_BC = torch.einsum("ck,bcd,dk->bk", u_CC, hessians_BCC, u_CC)
    d_CJ = curved_BC.T @ (a_BJ @ v_JJ).square() / len(a_BJ)
    g_BP = gradients(digits_task, network, ("head",))
    weights = g_BP[:, : -len(u_CC)].view(len(IDS), len(u_CC), -1)
    g_BCJ = torch.cat([weights, g_BP[:, -len(u_CC) :].unsqueeze(2)], dim=2)
    expected_B = ((u_CC.T @ g_BCJ @ v_JJ).square() / (d_CJ + LAMBDA)).sum((1, 2))
    np.testing.assert_allclose(run.read_rows("self_influence", 0, N)[IDS], expected_B, rtol=1e-6)
    (damping,) = run.read_table("curvature").column("damping").to_pylist()
    assert damping == LAMBDA
    assert not run.files.names(FACTORS)  # they are of no use once the run is done


def test_without_curvature_it_is_the_squared_norm(of, carry_out, digits_task, network) -> None:
    run = carry_out(of(solver=IdentitySettings()))
    expected_B = gradients(digits_task, network, MODULES).square().sum(1)
    np.testing.assert_allclose(run.read_rows("self_influence", 0, N)[IDS], expected_B, rtol=1e-9)
    assert "curvature" not in run.table_names()


def test_the_evidence_is_what_the_model_says(of, carry_out, digits_task, network) -> None:
    run = carry_out(of())
    images, labels = digits_task.batch(torch.arange(N), Draw(0))
    with torch.no_grad():
        logits = copy.deepcopy(network).double()(images.double())
    probability, predicted = logits.softmax(1).max(1)
    np.testing.assert_array_equal(run.read_rows("labels", 0, N), labels)
    np.testing.assert_array_equal(run.read_rows("predicted", 0, N), predicted)
    np.testing.assert_allclose(run.read_rows("probability", 0, N), probability)
    losses = F.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(run.read_rows("losses", 0, N), losses)


def test_shards_change_no_byte(of, carry_out, fresh_root) -> None:
    spec = of(precision="float32", modules=("conv1", *MODULES), curvature=Curvature())
    whole = carry_out(spec, shard_rows=N, root=fresh_root())
    parts = carry_out(spec, shard_rows=1, root=fresh_root())
    assert len(parts.plan()["shards"]) > len(whole.plan()["shards"]) == 1
    for name in whole.array_names():
        a, b = whole.read_rows(name, 0, N), parts.read_rows(name, 0, N)
        assert a.tobytes() == b.tobytes()
    assert find_damage(parts).damaged == {}


@pytest.mark.slow
def test_a_run_that_is_cut_off_ends_with_the_same_bytes(
    of, carry_out, fresh_root, monkeypatch
) -> None:
    spec, root = of(precision="float32", curvature=Curvature()), fresh_root()
    whole = carry_out(spec)
    real, written = Run.write_rows, []

    def write_rows(run, name, start, values):
        written.append(name)
        if len(written) == 7:  # five arrays a shard: within the second
            raise KeyboardInterrupt
        return real(run, name, start, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_rows", write_rows)
        with pytest.raises(KeyboardInterrupt):
            carry_out(spec, root=root, shard_rows=1)
    cut = Run.open(str(root), spec.run_id)
    assert len(cut.manifest.done()) == 1
    assert cut.files.names(FACTORS)
    with monkeypatch.context() as patch:  # the factors are those of before
        patch.setattr(SavedFactors, "write", lambda *_: pytest.fail("factors are made again"))
        again = carry_out(spec, root=root)
    for name in whole.array_names():
        assert whole.read_rows(name, 0, N).tobytes() == again.read_rows(name, 0, N).tobytes(), name
    assert again.read_table("curvature").equals(whole.read_table("curvature"))
    assert find_damage(again).damaged == {}


def test_the_largest_come_first_with_the_evidence(of, carry_out) -> None:
    run = carry_out(of())
    view = view_of(run)
    assert isinstance(view, SelfInfluenceView)
    values, losses = run.read_rows("self_influence", 0, N), run.read_rows("losses", 0, N)
    (rows,) = view.top(7).values()
    assert [row["sample"] for row in rows] == np.argsort(-values, kind="stable")[:7].tolist()
    first = view.suspects(5, by="loss")
    assert [row["sample"] for row in first] == np.argsort(-losses, kind="stable")[:5].tolist()
    assert [row["rank"] for row in first] == [1, 2, 3, 4, 5]
    assert [*first[0]] == [
        "rank", "sample", "label", "predicted", "probability", "loss", "self_influence",
    ]  # fmt: skip
    for row in first:
        assert row["loss"] == losses[row["sample"]]
        assert row["self_influence"] == values[row["sample"]]
    names = [name for name, _ in view.numbers_of(3)]
    assert names == ["label", "predicted", "probability", "loss", "self-influence"]
    _, *sheets = view.figures(print)
    assert [shown.name for shown in sheets] == ["largest-self-influence", "largest-loss"]
    for shown in sheets:
        cells = [cell for line in shown.rows for cell in line.samples]
        assert [cell.sample for cell in cells] == shown.data.column("sample").to_pylist()
        assert max(len(text) for cell in cells for text in cell.lines) <= 32  # or they overlap
    with pytest.raises(SpecError, match="leave --layer"):
        view.top(3, layer="head")
    with pytest.raises(SpecError, match="choose self-influence, loss"):
        view.suspects(3, by="norm")  # type: ignore[arg-type]


def test_only_solvers_with_a_form_are_taken(of) -> None:
    with pytest.raises(SpecError, match="ek-fac or identity"):
        of(solver=ConjugateGradientSettings(damping=0.1))
