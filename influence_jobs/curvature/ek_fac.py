"""EK-FAC: the Gauss-Newton matrix of each layer, diagonal in a Kronecker-factored eigenbasis."""

from collections import UserDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from influence_jobs.curvature.operators import LOOKED_AT, Operator
from influence_jobs.curvature.output_loss import FORMS, IGNORED, forms_of
from influence_jobs.curvature.requirements import require_output_loss
from influence_jobs.curvature.solver import (
    AUTOMATIC_DAMPING,
    Progress,
    Solution,
    Solver,
    no_progress,
    relative_residual,
)
from influence_jobs.errors import ModelError
from influence_jobs.gradients import MatrixRule, Metric
from influence_jobs.gradients.rules import matrix_layers, names_of, nearest_rule
from influence_jobs.gradients.taps import thawed
from influence_jobs.gradients.usage import Usage
from influence_jobs.tasks.base import Task
from influence_jobs.terms import OutputLoss

if TYPE_CHECKING:
    from curvlinops import EKFACLinearOperator


_CURE = "leave its layer out (--layer), or use --solver cg"

LOSSES: dict[OutputLoss, type[nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
}


class EkFac(Solver):
    """Inverts the EK-FAC approximation of the Gauss-Newton matrix, as computed by curvlinops.

    It takes two passes over the operator's samples, with one target sampled from the model for each
    sample, and no iterations. It supports layers whose rule is a `MatrixRule` and that are called
    once in a forward pass.

    George, Laurent, Bouthillier, Ballas, Vincent: "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", NeurIPS 2018; for influence Grosse et al.: "Studying Large
    Language Model Generalization with Influence Functions", 2023.

    Args:
        damping: Lambda, added to the corrected eigenvalues; None for `AUTOMATIC_DAMPING` times the
            largest of them.
        seed: Seed of the sampled targets.
    """

    def __init__(self, damping: float | None = None, seed: int = 0):
        super().__init__(damping)
        self.seed = seed

    def _solve(self, operator: Operator, rhs_QP: Tensor, progress: Progress) -> Solution:
        from curvlinops import KFACInverseLinearOperator  # takes a second to import

        operator.require_finite()
        factors = self._fitted(operator, progress)
        damping = self._damping_of(factors)
        inverse = KFACInverseLinearOperator(factors, damping=damping, use_exact_damping=True)
        columns = [
            part.movedim(0, -1).contiguous() for part in operator.space.split(rhs_QP).values()
        ]
        solved = [part.movedim(-1, 0) for part in inverse @ columns]
        x_QP = operator.space.join(dict(zip(operator.space.shapes, solved, strict=True)))
        _, relative_Q = relative_residual(operator, x_QP, rhs_QP, damping)
        steps_Q = torch.ones(len(rhs_QP), dtype=torch.int64)
        # A forward and backward pass over all samples for the factors, and one for the eigenvalues.
        return Solution(x_QP, relative_Q.cpu(), steps_Q, damping, 2.0, {"seed": self.seed})

    def metrics(self, operator: Operator, *, power: int) -> dict[str, Metric]:
        """The quadratic form g^T (G + lambda I)^-power g of each layer, for relative influence.

        Raises:
            ModelError: As `solve`.
        """
        factors = self._fitted(operator, no_progress)
        damping, state = self._damping_of(factors), factors.state_dict()
        prefix = len("model.")
        return {
            name[prefix:]: Metric(
                state["gradient_covariances_eigenvectors"][name],
                state["input_covariances_eigenvectors"][name],
                # Without a bias the eigenvalues are a dict with one entry, for the weight.
                (_only(eigenvalues) + damping) ** -power,
            )
            for name, eigenvalues in state["corrected_eigenvalues"].items()
        }

    def _damping_of(self, factors: "EKFACLinearOperator") -> float:
        if self._damping is not None:
            return self._damping
        eigenvalues = factors.state_dict()["corrected_eigenvalues"].values()
        return AUTOMATIC_DAMPING * max(float(_only(layer).max()) for layer in eigenvalues)

    def _fitted(self, operator: Operator, progress: Progress) -> "EKFACLinearOperator":
        from influence_jobs.curvature.ek_fac_operator import RuleEKFAC

        model, task, space = operator.model, operator.task, operator.space
        for name in space.shapes:
            _require_factored(name, model.get_submodule(name.rpartition(".")[0]))
        loss = _require_loss(operator)
        parameters = list(space.parameters().values())
        with thawed(parameters), torch.enable_grad():
            _require_called_once(operator)
            factors = RuleEKFAC(
                _Outputs(model, task),
                loss,
                parameters,
                _Batches(operator, progress),
                check_deterministic=False,
                seed=self.seed,
                separate_weight_and_bias=False,
                num_per_example_loss_terms=1,
                num_data=operator.num_samples,
                batch_size_fn=lambda X: X["size"],
            )
            factors.compute_kronecker_factors()
            factors.compute_eigenvalue_correction()
        return factors


def _require_loss(operator: Operator) -> nn.Module:
    """The task's loss as curvlinops knows it; any other is refused.

    Raises:
        ModelError: The loss is another one, or none is declared.
    """
    task, model, batch = operator.task, operator.model, operator.batch(operator.ids[:LOOKED_AT])
    (form, *_) = require_output_loss(task, model, batch, forms_of(task))
    for name, loss in LOSSES.items():
        if task.output_loss == name and form is FORMS[name][0]:
            return loss()
    known = " and ".join(FORMS[name][0].words for name in LOSSES)
    raise ModelError(
        f"EK-FAC knows {known}, but the losses of {type(task).__name__} are {form.words}: use "
        "--solver cg"
    )


def _only(eigenvalues: Tensor | dict[int, Tensor]) -> Tensor:
    if isinstance(eigenvalues, Tensor):
        return eigenvalues
    (weight,) = eigenvalues.values()
    return weight


def _require_factored(name: str, module: nn.Module) -> None:
    rule = nearest_rule(module)
    if not isinstance(rule, MatrixRule):
        raise ModelError(
            f"EK-FAC supports {names_of(matrix_layers())} layers, but parameter {name} is of "
            f"{type(module).__name__}: {_CURE}"
        )
    if (what := rule.unfactored(name)) is not None:
        raise ModelError(f"EK-FAC cannot factor {what}: {_CURE}")


def _require_called_once(operator: Operator) -> None:
    """Refuse weights that the model uses otherwise than in one call of their layer."""
    model, parameters = operator.model, operator.space.parameters()
    owners = {name: name.rpartition(".")[0] for name in parameters}
    modules = {owner: model.get_submodule(owner) for owner in owners.values()}
    batch = operator.batch(operator.ids[:3])
    usage = Usage(lambda batch: operator.task.losses(model, batch), batch, modules)
    for name, parameter in parameters.items():
        uses, calls = usage.uses(parameter), usage.calls(owners[name])
        if (uses, calls) != (1, 1):
            raise ModelError(
                f"EK-FAC cannot factor {name}: a forward uses it {uses} times and calls its layer "
                f"{calls} times, and only one use in one call is right (MultiheadAttention never "
                f"calls its out_proj): {_CURE}"
            )
        if not usage.plain(owners[name], [parameter]):
            raise ModelError(
                f"EK-FAC cannot factor {name}: the first axis of its layer's output is not the "
                f"sample: {_CURE}"
            )


class _Outputs(nn.Module):
    """The task's outputs (B, D) for a batch in the form that curvlinops expects."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, X: UserDict[str, Any]) -> Tensor:
        return self.task.outputs(self.model, X["batch"]).reshape(X["size"], -1)


class _Batches:
    """The operator's samples, batch by batch; curvlinops iterates over them twice."""

    def __init__(self, operator: Operator, progress: Progress):
        self._operator, self._progress = operator, progress
        self._done = 0

    def __iter__(self) -> Iterator[tuple[UserDict[str, Any], Tensor]]:
        operator = self._operator
        for ids in torch.split(operator.ids, operator.batch_size):
            self._progress(min(1.0, self._done / (2 * operator.num_samples)))
            self._done += len(ids)
            batch = operator.batch(ids)
            targets = operator.task.targets(batch)
            if operator.task.output_loss == "cross-entropy" and (targets == IGNORED).any():
                raise ModelError(
                    f"EK-FAC counts samples of class {IGNORED}, which the loss ignores: leave them "
                    "out of the data, or use --solver cg"
                )
            if operator.task.output_loss == "mse":
                targets = targets.reshape(len(ids), -1)  # (B,) too, where outputs are (B, 1)
            yield UserDict(batch=batch, size=len(ids)), targets
