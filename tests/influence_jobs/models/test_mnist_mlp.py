import torch

from influence_jobs.models.mnist_mlp import MnistMLP


def test_layers_in_forward_order() -> None:
    shapes = {name: tuple(p.shape) for name, p in MnistMLP().named_parameters()}
    assert list(shapes.items()) == [
        ("fc1.weight", (128, 784)),
        ("fc1.bias", (128,)),
        ("fc2.weight", (64, 128)),
        ("fc2.bias", (64,)),
        ("fc3.weight", (10, 64)),
        ("fc3.bias", (10,)),
    ]


def test_forward_is_the_closed_form() -> None:
    torch.manual_seed(0)
    model = MnistMLP().double()
    images = torch.randn(5, 28, 28, dtype=torch.float64)
    p = dict(model.named_parameters())
    hidden = (images.reshape(5, -1) @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    hidden = (hidden @ p["fc2.weight"].T + p["fc2.bias"]).clamp(min=0)
    logits = hidden @ p["fc3.weight"].T + p["fc3.bias"]
    expected = (logits.exp() / logits.exp().sum(1, keepdim=True)).log()
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(images.unsqueeze(1)), expected)
