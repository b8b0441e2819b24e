"""Measures of image quality."""

import torch


def psnr(clean_BCHW: torch.Tensor, other_BCHW: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of images in [0, 1].

    Nothing is clipped here. Published values are of images clipped to [0, 1], so clip a network's
    output before you compare with them.

    Args:
        clean_BCHW: The true images, white = 1.
        other_BCHW: Noisy or denoised images of the same shape.

    Returns:
        (B,) in dB; infinite where the images are equal.
    """
    mse_B = (clean_BCHW - other_BCHW).square().mean(dim=(1, 2, 3))
    return -10 * mse_B.log10()
