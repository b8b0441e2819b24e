import math

import torch

from influence_jobs.datasets.quality import psnr


def test_psnr_of_a_known_error_image_by_image() -> None:
    clean = torch.rand(3, 3, 4, 5, dtype=torch.float64)
    error = torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64)
    sign = torch.where(torch.rand(3, 3, 4, 5) < 0.5, -1.0, 1.0)
    other = clean + sign * error.view(3, 1, 1, 1)
    expected = torch.tensor([20.0, 40.0, 20 * math.log10(2)], dtype=torch.float64)
    torch.testing.assert_close(psnr(clean, other), expected)


def test_psnr_of_equal_images_is_infinite() -> None:
    clean = torch.rand(1, 1, 2, 2)
    assert psnr(clean, clean).tolist() == [math.inf]
