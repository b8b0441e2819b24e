"""Attribution and baseline runs, compared with loops over stored arrays."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from influence_jobs.kinds.attribution.spec import AttributionSpec
from influence_jobs.kinds.baseline.spec import BaselineSpec
from influence_jobs.requests.rankings import gradients_alone
from influence_jobs.requests.subject import Subject
from influence_jobs.specs.base import make_spec
from influence_jobs.store.checkpoints import load_checkpoint
from influence_jobs.store.layout import SCORES, norms_name, part_name
from influence_jobs.store.verify import find_damage
from influence_jobs.tasks.base import Draw


@pytest.fixture(scope="module")
def network(digits_task, checkpoint, scores_root):
    model = digits_task.model()
    load_checkpoint(model, str(scores_root), checkpoint)
    return model.eval()


def attribution(grad_norms_spec, checkpoint, queries, **fields):
    return make_spec(
        AttributionSpec,
        task=grad_norms_spec.task,
        norms=grad_norms_spec,
        checkpoint=checkpoint,
        layers=("conv1", "conv2"),
        queries=queries,
        **fields,
    )


def test_scores_are_activations_times_the_stored_norms(
    carry_out, grad_norms_spec, checkpoint, queries, network, digits_task
):
    run = carry_out(attribution(grad_norms_spec, checkpoint, queries, keep_layers=True))
    norms = type(run)(run.root, grad_norms_spec)
    stored = {name: norms.read_rows(norms_name(name), 0, 1500) for name in ("conv1", "conv2")}
    scores = run.read_rows(SCORES, 0, 1500)
    assert scores.shape == (3, 1500)
    for row, query in enumerate(queries.items):
        images, _ = digits_task.test_batch(torch.tensor([query.test]), Draw(0))
        with torch.no_grad():
            first = network.conv1(images)
            second = network.conv2(F.relu(network.norm(first)))
        for name, output in (("conv1", first), ("conv2", second)):
            activation = output[0].clamp(min=0).mean(dim=(1, 2)).numpy()
            part = run.read_rows(part_name(name), 0, 1500)[row]
            np.testing.assert_allclose(part, stored[name] @ activation, rtol=1e-5)
    parts = [run.read_rows(part_name(name), 0, 1500) for name in ("conv1", "conv2")]
    np.testing.assert_allclose(scores, np.add(*parts), rtol=1e-6)
    assert run.array_names() == ["parts/conv1", "parts/conv2", "scores"]
    assert run.read_table("queries").column("test").to_pylist() == [5, 0, 111]
    assert "label" in run.read_table("queries").column_names
    assert find_damage(run).damaged == {}


def test_the_bytes_do_not_depend_on_shards(
    carry_out, fresh_root, grad_norms_spec, checkpoint, queries
):
    spec = attribution(grad_norms_spec, checkpoint, queries, normalize=True)
    whole = carry_out(spec).read_rows(SCORES, 0, 1500)
    cut = carry_out(spec, shard_rows=256, root=fresh_root()).read_rows(SCORES, 0, 1500)
    assert np.array_equal(whole, cut)


def test_samples_of_large_norm_are_left_out(
    carry_out, grad_norms_spec, checkpoint, queries, finished_run
):
    total = sum(
        finished_run.read_rows(norms_name(name), 0, 1500).sum(axis=1, dtype=np.float64)
        for name in ("conv1", "conv2")
    )
    limit = float(np.sort(total)[-10:-8].mean())
    spec = attribution(grad_norms_spec, checkpoint, queries, exclude_norm_above=limit)
    scores = carry_out(spec).read_rows(SCORES, 0, 1500)
    assert np.array_equal(np.isnan(scores), np.tile(total > limit, (3, 1)))
    assert np.isnan(scores[0]).sum() == 9


@pytest.mark.parametrize("method", ["random", "loss", "norm", "nearest"])
def test_baselines_are_the_same_in_any_shards(
    carry_out, fresh_root, grad_norms_spec, checkpoint, queries, method
):
    spec = make_spec(
        BaselineSpec,
        task=grad_norms_spec.task,
        method=method,
        queries=queries,
        checkpoint=checkpoint,
    )
    whole = carry_out(spec).read_rows(SCORES, 0, 1500)
    cut = carry_out(spec, shard_rows=256, root=fresh_root()).read_rows(SCORES, 0, 1500)
    assert np.array_equal(whole, cut)
    assert np.isfinite(whole).all()
    assert spec.checkpoint == (checkpoint if method in ("loss", "norm") else None)


def test_the_loss_baseline_is_the_loss(carry_out, loss, network, digits_task):
    scores = carry_out(loss.scores[0]).read_rows(SCORES, 0, 1500)
    with torch.no_grad():
        losses = digits_task.losses(network, digits_task.batch(torch.arange(1500), Draw(0)))
    np.testing.assert_allclose(scores, np.tile(losses, (3, 1)), rtol=1e-5, atol=1e-6)


def test_the_norm_baseline_is_the_norm_by_the_weights_of_all_layers(
    carry_out, grad_norms_spec, checkpoint, queries, network, digits_task
):
    spec = make_spec(
        BaselineSpec,
        task=grad_norms_spec.task,
        method="norm",
        queries=queries,
        checkpoint=checkpoint,
    )
    scores = carry_out(spec).read_rows(SCORES, 0, 1500)
    weights = [
        module.weight
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    for sample in (0, 7, 1499):
        loss = digits_task.losses(network, digits_task.batch(torch.tensor([sample]), Draw(0))).sum()
        found = torch.autograd.grad(loss, weights)
        expected = torch.cat([gradient.flatten() for gradient in found]).norm()
        np.testing.assert_allclose(scores[:, sample], float(expected), rtol=1e-4)


def test_the_cosine_is_the_dot_product_of_gradients_of_length_one(
    carry_out, grad_norms_spec, checkpoint, queries, network, digits_task
):
    task = grad_norms_spec.task
    subject = Subject(task, digits_task, (checkpoint,))
    found = {}
    for method in ("dot-product", "cosine"):
        spec = gradients_alone(method, subject, queries, lambda _: None, seed=0)
        found[method] = carry_out(spec).read_rows(SCORES, 0, 1500)
    parameters = [
        p
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        for p in module.parameters()
    ]
    for sample in (3, 900):
        loss = digits_task.losses(network, digits_task.batch(torch.tensor([sample]), Draw(0))).sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        np.testing.assert_allclose(
            found["cosine"][:, sample], found["dot-product"][:, sample] / norm, rtol=1e-4
        )
