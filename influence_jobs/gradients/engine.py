"""Per-sample gradient norms of chosen layers from one forward and one truncated backward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gradients.requirements import find_rule
from influence_jobs.gradients.rules import LayerRule, reduce_gradient
from influence_jobs.gradients.taps import TappedModel
from influence_jobs.terms import Precision, Reduction


class GradNorms(TappedModel):
    """Per-sample weight-gradient norms of chosen layers: one forward, one truncated backward.

    With G_b the gradient of sample b's loss by a layer's weight (its bias does not count), read as
    (C, I, *kernel), the reductions are: `kernel`, the L2 norm over I, (B, C, *kernel); `channel`,
    the kernel norms summed over the kernel, (B, C); `layer`, the L2 norm of all of G_b, (B,). Losses
    must not be averaged over the batch: an average scales every norm by 1/B.

    The model's parameters have `requires_grad` off until `close`. The engine leaves global settings
    alone; on CUDA, convolutions run in TF32 unless `torch.backends.cudnn.allow_tf32` is False.

    Args:
        model: In eval mode, with weights of float32, or of float64 for `precision="float64"`.
        layers: Names of modules, each called once in a forward with the batch as first axis.
        losses: (model, batch) to one loss per sample (B,). A batch is any pytree.
        reduction: See above.
        precision: `bfloat16` runs forward and backward in mixed precision (autocast); norms are
            always accumulated in the type of the weights.

    Raises:
        ModelError: A layer is missing or not supported, or the model is in train mode.
    """

    _result = "norms"
    _relative_to = "the largest"

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        losses: Callable[[nn.Module, Any], Tensor],
        *,
        reduction: Reduction,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, losses, precision)
        self._reduction: Reduction = reduction
        found = {name: find_rule(model, name, self._dtype) for name in layers}
        if not found:
            raise ModelError("no layer was named: name at least one")
        self._freeze()
        self._attach(found)

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Norms of every sample of a batch.

        Args:
            batch: What `losses` understands.

        Returns:
            {layer: norms} in the order of `layers`: (B, C, *kernel), (B, C) or (B,); float32, or
            float64 under precision float64. Not checked for NaN.

        Raises:
            ModelError: A layer is not called exactly once, is not reached by the gradient, or its
                input was overwritten; the losses are not (B,); the model went into train mode.
        """
        norms: dict[str, Tensor] = {}

        def visit(name: str, rule: LayerRule[Any], a: Tensor, g: Tensor) -> None:
            norms[name] = rule.norms(a, g, self._reduction)

        self._run(batch, visit)
        return {name: norms[name] for name in self._layers}

    def _parameters(self) -> dict[str, Tensor]:
        return {name: self._model.get_parameter(f"{name}.weight") for name in self._layers}

    def _of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, rule in self._layers.items():
            norms = reduce_gradient(rule.module, gradients[name].unsqueeze(0), self._reduction)
            parts[name] = norms, norms.nan_to_num(nan=0, posinf=0).amax().expand_as(norms)
        return parts
