"""curvlinops' EK-FAC for every layer with a `MatrixRule`; importing this takes a second."""

from collections.abc import Sequence
from typing import Any

from curvlinops import EKFACLinearOperator
from torch import Tensor, nn

from influence_jobs.gradients.rules import MatrixRule, matrix_layers, nearest_rule


class RuleEKFAC(EKFACLinearOperator):  # type: ignore[misc]
    """Takes the rows of inputs and of output gradients from each layer's rule.

    curvlinops itself knows the rows of Linear (the input itself) and of Conv2d (its patches). Here
    it gets the rows instead of the layer's input, and None instead of the module. It then handles
    them like those of Linear.
    """

    @classmethod
    def compute_parameter_mapping(
        cls, params: list[Tensor], model_func: nn.Module
    ) -> dict[str, dict[str, int]]:
        cls._SUPPORTED_MODULES = matrix_layers()  # read late, as rules may be defined at any time
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
        if module_name in cached:  # inputs are cached only if the weight is wanted
            cached[module_name] = rule.input_rows(cached[module_name])
        rows = rule.output_rows(grad_output)
        super()._accumulate_corrected_eigenvalues(rows, None, module_name)
        cached.pop(module_name, None)


def _rule(module: nn.Module) -> MatrixRule[Any]:
    rule = nearest_rule(module)
    assert isinstance(rule, MatrixRule)  # `EkFac` has refused all others
    return rule
