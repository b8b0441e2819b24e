"""Every refusal is a ModelError of one line that names the module."""

import copy

import pytest
import torch
from torch import nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients import GradNorms, require_supported


def sums(model, x):
    return model(x).flatten(1).sum(1)


def refused(message, model, layer, x=None, losses=sums, precision="float32", train=False):
    model.train(train)
    flags = [p.requires_grad for p in model.parameters()]
    with (
        pytest.raises(ModelError, match=message) as caught,
        GradNorms(model, [layer], losses, reduction="layer", precision=precision) as engine,
    ):
        engine(torch.randn(4, 6) if x is None else x)
    assert "\n" not in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_without_a_weight():
    model = nn.Sequential(nn.ModuleDict({"inner": nn.ReLU()}))
    refused(r"layer '0\.inner' \(ReLU\) has no weight of its own: leave it out", model, "0.inner")
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
    refused(r"layer '0' \(Sequential\) has no weight .* name what is inside, '0\.\*'", model, "0")


def test_several_weights():
    model = nn.Sequential(nn.LSTM(3, 3))
    refused(r"layer '0' \(LSTM\) has several weights: name one of 0\.weight_ih_l0, ", model, "0")


def test_unknown_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    refused("no layer 'fc' in Sequential; it has: 0, 2$", model, "fc")
    deep = nn.Sequential(*[nn.Linear(6, 6) for _ in range(20)])
    refused(r"it has: 0, 1, .*, 11 and 8 more$", deep, "fc")


def test_no_layers():
    with pytest.raises(ModelError, match="no layer was named"):
        GradNorms(nn.Sequential(nn.Linear(2, 2)).eval(), [], sums, reduction="layer")


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3, affine=False), nn.LayerNorm(3, elementwise_affine=False)]
)
def test_layer_without_weight(layer):
    refused(r"layer '0' \(\w+Norm\w*\) has no weight of its own", nn.Sequential(layer), "0")


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embedding_options(options):
    (option,) = options
    model = nn.Sequential(nn.Embedding(5, 3, **options))
    refused(rf"layer '0' \(Embedding\) uses {option}", model, "0", torch.tensor([[0, 1]]))


def test_weight_types():
    refused(
        "'0' has float64 weights, .* needs float32",
        nn.Sequential(nn.Linear(6, 6).double()),
        "0",
    )
    model = nn.Sequential(nn.Linear(6, 6))
    refused("has float32 weights, .* needs float64", model, "0", precision="float64")
    half = copy.deepcopy(model).half()
    refused("has float16 weights, .* needs float32 or bfloat16", half, "0", precision="bfloat16")
    refused("has bfloat16 weights, .* needs float32", model.bfloat16(), "0")
    integer = nn.Linear(6, 6)
    integer.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layer 'fc' \(Linear\) has int8 weights"):
        require_supported("fc", integer)


def test_train_mode():
    refused(
        r"the model \(Sequential\) is in train mode",
        nn.Sequential(nn.Linear(6, 6)),
        "0",
        train=True,
    )
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout())
    with GradNorms(model.eval(), ["0"], sums, reduction="layer") as engine:
        engine(torch.randn(2, 6))
        model[1].train()
        with pytest.raises(ModelError, match=r"module '1' \(Dropout\) is in train mode"):
            engine(torch.randn(2, 6))


def test_batch_statistics_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False))
    refused(r"module '1' \(BatchNorm1d\) has no running statistics", model, "0")


class Partial(nn.Module):
    """A layer that is not called, one whose output is dropped, one under no_grad."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)
        self.dropped = nn.Linear(6, 6)
        self.no_grad = nn.Linear(6, 6)

    def forward(self, x):
        self.dropped(x)
        with torch.no_grad():
            x = self.no_grad(x)
        return self.used(x)


def test_layer_not_reached():
    refused("layer 'idle' is not called in the forward", Partial(), "idle")
    for name in ("dropped", "no_grad"):
        refused(f"the losses do not depend on layer '{name}'", Partial(), name)
    # The other layer's graph does not hide it.
    with (
        GradNorms(Partial().eval(), ["used", "dropped"], sums, reduction="layer") as engine,
        pytest.raises(ModelError, match="do not depend on layer 'dropped'"),
    ):
        engine(torch.randn(4, 6))


@pytest.mark.parametrize(
    "losses,what",
    [
        (lambda model, x: model(x).mean(), r"has shape \(\), and one number for each sample is"),
        (lambda model, x: model(x), r"has shape \(4, 6\), and one number for each sample is"),
        (lambda model, x: 1.0, "gives float, and a tensor of one float for each sample is"),
    ],
)
def test_losses_shape(losses, what):
    refused(rf"losses\(\) {what} needed", nn.Sequential(nn.Linear(6, 6)), "0", losses=losses)


def test_losses_without_graph():
    model = nn.Sequential(nn.Linear(6, 6))
    refused("do not depend on layer '0'", model, "0", losses=lambda m, x: sums(m, x).detach())


def test_first_axis_is_not_the_sample():
    model = nn.Sequential(nn.Linear(6, 6))

    def folded(model, x):
        return model(x).view(2, 12).sum(1)

    refused(
        "a sample's loss cannot be computed alone: usual causes are",
        model,
        "0",
        losses=folded,
    )


@pytest.mark.parametrize("changes", [False, True])
def test_a_hook_that_changes_a_gradient(changes):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()
    model[0].weight.register_hook((lambda g: g / 2) if changes else (lambda g: None))
    with GradNorms(model, ["0"], sums, reduction="layer") as engine:
        if not changes:
            engine.check(torch.randn(4, 6))
            return
        with pytest.raises(ModelError, match=r"^parameter '0\.weight' has a gradient hook"):
            engine.check(torch.randn(4, 6))
