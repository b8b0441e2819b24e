"""Rule of Conv3d."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from influence_jobs.gradients.rules.conv import ConvolutionRule


class Conv3dRule(ConvolutionRule[nn.Conv3d]):
    """Any stride, padding, dilation, groups and padding mode; EK-FAC with one group and zeros."""

    layer = nn.Conv3d
    read_as = "(C, I, kd, kh, kw)"
    convolve = staticmethod(F.conv3d)
    gradient_of_one = staticmethod(grad.conv3d_weight)

    def input_rows(self, a: Tensor) -> Tensor:
        """The patches under the kernel; `F.unfold` is for images alone."""
        module, patches = self.module, self._padded(a)
        for axis in range(3):
            dilation = module.dilation[axis]
            reach = dilation * (module.kernel_size[axis] - 1) + 1
            patches = patches.unfold(2 + axis, reach, module.stride[axis])[..., ::dilation]
        # (B, I, depth, height, width, *k): positions before inputs
        return patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
