"""Norms of, and dot products with, the gradient of each token's part of a sample's loss.

The gradient of one token's part flows, through attention or recurrence, to all positions that the
token sees. It is not what its own position adds to the sum over positions by which a layer's weight
gradient is computed. So each norm takes a backward pass of its own; dot products do not.

Letters: B batch, Q vectors, T positions, of which a sample's first ones are its tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from influence_jobs.errors import ModelError
from influence_jobs.gpu import in_tf32, may_round
from influence_jobs.gradients.engine import GradNorms
from influence_jobs.gradients.parameters import ParameterSpace
from influence_jobs.gradients.taps import TOLERANCE, thawed
from influence_jobs.gradients.transforms import all_derivatives
from influence_jobs.memory import is_out_of_memory
from influence_jobs.terms import Precision

#: (model, batch) to what each token brings to its sample's loss, (B, T); 0 behind the last.
Parts = Callable[[nn.Module, Any], Tensor]


class TokenNorms:
    """The norm of the gradient of each token's part, by all of a layer's weight.

    It takes a forward and a backward pass a token, for all samples of a batch.

    Args:
        model, layers, precision: As for `GradNorms`, whose parameters are frozen until `close`.
        parts: See `Parts`.

    Raises:
        ModelError: As `GradNorms`.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], parts: Parts, *, precision: Precision
    ) -> None:
        self._token = 0
        self._engine = GradNorms(
            model,
            layers,
            lambda model, batch: parts(model, batch)[:, self._token],
            reduction="layer",
            precision=precision,
        )

    def __call__(self, batch: Any, tokens: int) -> dict[str, Tensor]:
        """Norms {layer: (B, tokens)} of the first tokens; 0 where a sample has no such token.

        Raises:
            ModelError: As a call of `GradNorms`.
        """
        found, right = self.unwatched(batch, tokens)
        if right is None or right:
            return found
        by_token = []
        for self._token in range(tokens):
            by_token.append(self._engine(batch))
        return _together(by_token)

    def unwatched(self, batch: Any, tokens: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """The norms, and whether they are right, as `GradNorms.unwatched`.

        Raises:
            ModelError: As a call.
        """
        by_token, rights = [], []
        for self._token in range(tokens):
            norms, right = self._engine.unwatched(batch)
            by_token.append(norms)
            rights += [] if right is None else [right]
        return _together(by_token), torch.stack(rights).all() if rights else None

    def check(self, batch: Any) -> None:
        """Compare the norms of the first token with plain autograd, as `GradNorms` does.

        Raises:
            ModelError: They differ.
        """
        self._token = 0
        self._engine.check(batch)

    def close(self) -> None:
        """As `GradNorms.close`."""
        self._engine.close()


def _together(by_token: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([norms[name] for norms in by_token], 1) for name in by_token[0]}


class TokenDots:
    """Dot products of vectors with the gradient of each token's part.

    J^T w, J the Jacobian of the parts, is linear in weights w of the parts, so its derivative along
    a vector v is J v: the products of v with the gradients of all parts. That takes a forward and a
    backward pass for a batch, and one pass through both a vector, whatever the number of tokens.

    Args:
        model: In eval mode.
        space: The parameters of this model that the gradients are by.
        parts: See `Parts`.
        vectors_QP: The vectors in that space.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, parts: Parts, vectors_QP: Tensor
    ) -> None:
        self._model, self._parts = model, parts
        self._parameters = space.of(model).parameters()
        like = next(iter(self._parameters.values()))
        self._vectors = space.split(vectors_QP.detach().to(like.device, like.dtype))

    def __call__(self, batch: Any, totals_BQ: Tensor) -> Tensor:
        """Products of every token of a batch, (B, T, Q).

        Args:
            totals_BQ: Those of the samples' whole losses, found in another way.

        Raises:
            ModelError: Torch lacks a derivative, or the products do not add up to the totals.
        """
        found, right = self.unwatched(batch, totals_BQ)
        if not right:
            self.refuse_sums()
        return found

    def unwatched(self, batch: Any, totals_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """The products, and a scalar: whether they add up, for which a call waits for a GPU.

        Raises:
            ModelError: Torch lacks a derivative.
        """
        try:
            found = self._products(batch, totals_BQ.shape[1])
        except RuntimeError as error:  # NotImplementedError is one
            if is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
            raise ModelError(
                "scores of tokens need a derivative of the backward pass of "
                f"{type(self._model).__name__}, which torch cannot compute ({said}): leave "
                "--per-token out"
            ) from error
        return found, _add_up(found, totals_BQ)

    def refuse_sums(self) -> NoReturn:
        """Refuse products that do not add up.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"the scores of the tokens of {type(self._model).__name__} do not add up to their "
            "sample's: torch cannot differentiate the backward pass of one of its operations, or "
            "its forward pass is random; leave --per-token out"
        )

    def _products(self, batch: Any, count: int) -> Tensor:
        parameters = [*self._parameters.values()]
        device = parameters[0].device.type
        with (
            all_derivatives(self._model),
            thawed(parameters),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            parts_BT = self._parts(self._model, batch)
            weights_BT = torch.ones_like(parts_BT, requires_grad=True)
            gradients = torch.autograd.grad(
                parts_BT, parameters, weights_BT, create_graph=True, materialize_grads=True
            )
            used = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
            vectors = [*self._vectors.values()]
            products = [
                torch.autograd.grad(
                    [gradients[i] for i in used],
                    weights_BT,
                    [vectors[i][q] for i in used],
                    retain_graph=q + 1 < count,
                )[0]
                for q in range(count)
            ]
        return torch.stack(products, dim=2)


def _add_up(found_BTQ: Tensor, totals_BQ: Tensor) -> Tensor:
    double = found_BTQ.dtype == torch.float64
    rounded = in_tf32() or may_round(found_BTQ.device)
    limit = TOLERANCE["float64" if double else "tf32" if rounded else "float32"]
    error_Q = (found_BTQ.sum(1) - totals_BQ).norm(dim=0)
    # Parts may cancel, so rounding is relative to the sum of their sizes.
    size_Q = found_BTQ.abs().sum(1).norm(dim=0)
    right: Tensor = ~(error_Q > limit * size_Q + torch.finfo(found_BTQ.dtype).tiny).any()
    return right
