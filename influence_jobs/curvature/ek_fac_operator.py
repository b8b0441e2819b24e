"""curvlinops' EK-FAC for every layer that has a `MatrixRule`; importing it takes a second."""

from collections.abc import Sequence
from typing import Any

from curvlinops import EKFACLinearOperator
from torch import Tensor, nn

from influence_jobs.gradients.rules import MatrixRule, matrix_layers, nearest_rule


class RuleEKFAC(EKFACLinearOperator):  # type: ignore[misc]
    """Takes the rows of inputs and of output gradients from each layer's rule.

    curvlinops itself knows the rows of Linear (the input as it is) and of Conv2d (its patches). So
    it is given rows in place of either, and no module to look at: it then does as for Linear.
    """

    @classmethod
    def compute_parameter_mapping(
        cls, params: list[Tensor], model_func: nn.Module
    ) -> dict[str, dict[str, int]]:
        cls._SUPPORTED_MODULES = matrix_layers()  # only now, for a rule may be defined at any time
        mapping: dict[str, dict[str, int]] = super().compute_parameter_mapping(params, model_func)
        return mapping

    def _hook_accumulate_input_covariance(
        self, module: nn.Module, inputs: Sequence[Tensor], module_name: str
    ) -> None:
        rows = tuple(_rule(module).input_rows(a.detach()) for a in inputs)
        super()._hook_accumulate_input_covariance(None, rows, module_name)

    def _accumulate_gradient_covariance(
        self, grad_output: Tensor, module: nn.Module, module_name: str
    ) -> None:
        rows = _rule(module).output_rows(grad_output)
        super()._accumulate_gradient_covariance(rows, None, module_name)

    def _accumulate_corrected_eigenvalues(
        self, grad_output: Tensor, module: nn.Module, module_name: str
    ) -> None:
        rule, cached = _rule(module), self._cached_activations
        if module_name in cached:  # no weight, no inputs; as rows they are kept no longer than here
            cached[module_name] = rule.input_rows(cached[module_name])
        rows = rule.output_rows(grad_output)
        super()._accumulate_corrected_eigenvalues(rows, None, module_name)
        cached.pop(module_name, None)


def _rule(module: nn.Module) -> MatrixRule[Any]:
    rule = nearest_rule(module)
    assert isinstance(rule, MatrixRule)  # others are refused before
    return rule
