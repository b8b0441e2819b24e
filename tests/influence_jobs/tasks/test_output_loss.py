"""Losses of outputs: targets that are no classes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from influence_jobs.tasks.output_loss import FORMS, IGNORED, which_forms_give


def test_a_target_that_is_no_class_reaches_no_kernel_and_gives_no_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it would end the process."""
    plain, given = F.cross_entropy, list[tuple[int, Tensor]]()

    def noted(outputs: Tensor, targets: Tensor, **how: Any) -> Tensor:
        given.append((outputs.shape[1], targets))
        return plain(outputs, targets, **how)

    monkeypatch.setattr(F, "cross_entropy", noted)
    forms, outputs_BTC = FORMS["cross-entropy"], torch.randn(4, 5, 3)
    targets_BT = torch.tensor([[0, 1, 2, IGNORED, 0]]).repeat(4, 1)
    losses_BT = plain(outputs_BTC.mT, targets_BT, reduction="none")
    right = which_forms_give(losses_BT.sum(1), outputs_BTC, targets_BT, forms)
    assert [f.words for f, gives in zip(forms, right.tolist(), strict=True) if gives] == [
        "cross-entropy, classes on the last axis, sum positions"
    ]
    for odd in (255, 3, -1):
        targets_BT[2, 1] = odd
        for outputs in (outputs_BTC, outputs_BTC.mT):
            assert not which_forms_give(losses_BT.sum(1), outputs, targets_BT, forms).any()
    outputs_BC, targets_B = outputs_BTC[:, 0], torch.tensor([0, 1, 2, 1])
    losses_B = plain(outputs_BC, targets_B, reduction="none")
    assert which_forms_give(losses_B, outputs_BC, targets_B, forms)[0]
    assert which_forms_give(losses_B, outputs_BC, targets_B.byte(), forms)[0]
    assert not which_forms_give(losses_B, outputs_BC, targets_B.byte() + 2, forms)[0]
    soft_BC = F.one_hot(targets_B, 3).float()
    assert which_forms_give(losses_B, outputs_BC, soft_BC, forms)[0]
    assert len(given) > 10
    for classes, targets in given:
        if not targets.is_floating_point():
            assert all(one == IGNORED or 0 <= one < classes for one in targets.flatten().tolist())
