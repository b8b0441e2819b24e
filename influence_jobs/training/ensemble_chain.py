"""The samples of a task whose model is a `Chain`, as matrices."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from influence_jobs.gradients.pending import padded
from influence_jobs.tasks.base import Task, device_of
from influence_jobs.tasks.chain import Chain, first_inputs
from influence_jobs.training.ensemble_data import RESIDENT_BYTES, fixed_samples


@dataclass(frozen=True)
class ChainData:
    """The training set as the first layer meets it.

    Attributes:
        inputs_NI: Its inputs, a column of ones (a bias is the weight of an input that is always one), and `padded`.
        targets_N: Classes, int64.
    """

    inputs_NI: Tensor
    targets_N: Tensor


def chain_data(task: Task, model: nn.Module, chain: Chain) -> ChainData | None:
    """Run the task up to the first layer, for all samples; None where they change from epoch to epoch."""
    batch = fixed_samples(task, device_of(model))
    if batch is None:
        return None
    inputs_NI = first_inputs(task, model, chain, batch)
    if inputs_NI.ndim != 2 or inputs_NI.nbytes > RESIDENT_BYTES:
        return None
    return ChainData(padded(F.pad(inputs_NI, (0, 1), value=1.0)), task.targets(batch))
