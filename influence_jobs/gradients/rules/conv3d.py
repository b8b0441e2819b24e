"""Rule of Conv3d."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from influence_jobs.gradients.rules.blocks import patches
from influence_jobs.gradients.rules.conv import ConvolutionRule


class Conv3dRule(ConvolutionRule[nn.Conv3d]):
    """Any stride, padding, padding mode, dilation and groups; EK-FAC factors one group."""

    layer = nn.Conv3d
    read_as = "(C, I, kd, kh, kw)"
    convolve = staticmethod(F.conv3d)
    gradient_of_one = staticmethod(grad.conv3d_weight)

    def input_rows(self, a: Tensor) -> Tensor:
        """The patches under the kernel; `F.unfold` is for images alone."""
        module = self.module
        return patches(self._padded(a), module.kernel_size, module.stride, module.dilation)
