"""FFDNet, a denoiser that takes the noise level as an input."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


class FFDNet(nn.Module):
    """FFDNet with batch normalisation; it predicts the denoised image itself, not the noise.

    Pixel-unshuffle by 2 reduces the image to half its size, and a constant map of the noise level
    is appended as the last channel. 3x3 convolutions work at that size, and pixel-shuffle restores
    the full size. Colour: 12 convolutions of 96 channels; grey: 15 of 64. Batch normalisation
    follows every convolution except the first and the last. Parameters are named as in the
    published colour weights: `main.0.weight` ... `main.32.bias`.

    The published weights were trained on images read by OpenCV, so colour images are BGR.
    `influence_jobs.datasets.images` loads them so.

    Zhang, Zuo, Zhang: "FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image Denoising",
    IEEE TIP 2018.

    Args:
        color: Three channels (BGR) if true, one (grey) if false.
        layers: Number of convolutions, at least 2; by default 12 in colour and 15 in grey.
        channels: Channels between them; by default 96 in colour and 64 in grey.
        batch_norm: Whether batch normalisation follows the inner convolutions. Without it, weights
            are initialised by the rule of He et al. (2015), for ReLU.
    """

    def __init__(
        self,
        color: bool = True,
        layers: int | None = None,
        channels: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        folded = 12 if color else 4
        convs = layers or (12 if color else 15)
        width = channels or (96 if color else 64)
        # ReLU is not in place, since hooks may keep a convolution's output.
        modules: list[nn.Module] = [nn.Conv2d(folded + 1, width, 3, padding=1), nn.ReLU()]
        for _ in range(convs - 2):
            modules.append(nn.Conv2d(width, width, 3, padding=1))
            modules += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        modules.append(nn.Conv2d(width, folded, 3, padding=1))
        self.main = nn.Sequential(*modules)
        if not batch_norm:
            for module in modules:
                if isinstance(module, nn.Conv2d):
                    last = module is modules[-1]
                    gain: Literal["linear", "relu"] = "linear" if last else "relu"
                    nn.init.kaiming_normal_(module.weight, nonlinearity=gain)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """Denoise.

        Args:
            noisy_BCHW: Noisy images, where white is 1. Odd heights and widths are padded by
                repeating the edge, and cropped again.
            sigma_B: Standard deviation of each image's noise, on the same scale.

        Returns:
            Denoised images of the input's shape, not clipped to [0, 1].
        """
        height, width = noisy_BCHW.shape[-2:]
        if height % 2 or width % 2:
            noisy_BCHW = F.pad(noisy_BCHW, (0, width % 2, 0, height % 2), mode="replicate")
        folded = F.pixel_unshuffle(noisy_BCHW, 2)
        noise_map = sigma_B.view(-1, 1, 1, 1).expand(-1, 1, *folded.shape[-2:])
        denoised = F.pixel_shuffle(self.main(torch.cat((folded, noise_map), dim=1)), 2)
        return denoised[..., :height, :width]
