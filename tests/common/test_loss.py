from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss

from common.loss import dice_focal_loss


def sample(seed: int = 0, batch: int = 3, side: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, 4, side, side, side + 1, generator=generator)
    labels = torch.randint(0, 3, (batch, side, side, side + 1), generator=generator)  # no ET
    return logits, labels


def by_hand(logits, labels, focal_weight, gamma, alpha, include_background=True) -> float:
    """The formulas of segmentation-models-3D in float64, per subject, one voxel at a time."""
    alpha = [alpha] * 4 if isinstance(alpha, float) else alpha
    totals = []
    for scores, truth in zip(logits.double().numpy(), labels.numpy(), strict=True):
        overlap, predicted, true, focal = np.zeros(4), np.zeros(4), np.zeros(4), 0.0
        for voxel in np.ndindex(truth.shape):
            values = np.exp(scores[(slice(None), *voxel)])
            p = values / values.sum()
            g = np.eye(4)[truth[voxel]]
            overlap += p * g
            predicted += p
            true += g
            focal += sum(-g[c] * alpha[c] * (1 - p[c]) ** gamma * np.log(p[c]) for c in range(4))
        dice = (2 * overlap + 1e-5) / (predicted + true + 1e-5)
        first = 0 if include_background else 1
        totals.append(1 - dice[first:].mean() + focal_weight * focal / (4 * truth.size))
    return float(np.mean(totals))


@pytest.mark.parametrize("focal_weight", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [0.25, [0.1, 0.5, 0.2, 0.7]])
@pytest.mark.parametrize("include_background", [True, False])
def test_equals_the_hand_computation(focal_weight, gamma, alpha, include_background):
    logits, labels = sample()
    options = {"focal_weight": focal_weight, "gamma": gamma, "alpha": alpha}
    loss = dice_focal_loss(logits, labels, include_background=include_background, **options)
    expected = by_hand(logits, labels, *options.values(), include_background)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_alpha_is_one_factor_for_all_classes_and_defaults_are_the_reference_study():
    logits, labels = sample()
    assert dice_focal_loss(logits, labels).item() == pytest.approx(
        by_hand(logits, labels, 1.0, 2.0, 0.25), rel=1e-5
    )
    whole = dice_focal_loss(logits, labels, alpha=1.0) - dice_focal_loss(logits, labels, alpha=0.0)
    quarter = dice_focal_loss(logits, labels, alpha=0.25) - dice_focal_loss(logits, labels, alpha=0)
    assert quarter.item() == pytest.approx(whole.item() / 4, rel=1e-4)
    all_alike = dice_focal_loss(logits, labels, alpha=[0.25] * 4)
    torch.testing.assert_close(all_alike, dice_focal_loss(logits, labels))


def test_is_not_monais_dice_focal_loss():
    """MONAI's `softmax=True` leaves the focal term a sigmoid of each channel."""
    logits, labels = sample()
    monai = DiceFocalLoss(softmax=True, to_onehot_y=True, gamma=2.0)(logits, labels.unsqueeze(1))
    ours = dice_focal_loss(logits, labels, alpha=1.0)
    assert abs(monai.item() - ours.item()) > 0.05


def test_a_subjects_gradient_does_not_depend_on_another_subject():
    logits, labels = sample()
    other_logits, other_labels = logits.clone(), labels.clone()
    other_logits[2] *= 50
    other_labels[2] = 3
    gradients = []
    for scores, truth in ((logits, labels), (other_logits, other_labels)):
        scores = scores.clone().requires_grad_()
        dice_focal_loss(scores, truth).backward()
        gradients.append(scores.grad)
    assert torch.equal(gradients[0][:2], gradients[1][:2])
    assert not torch.equal(gradients[0][2], gradients[1][2])


def test_is_the_mean_of_the_subjects_losses():
    logits, labels = sample()
    single = [dice_focal_loss(logits[i : i + 1], labels[i : i + 1]).item() for i in range(3)]
    assert dice_focal_loss(logits, labels).item() == pytest.approx(np.mean(single), rel=1e-6)


def test_computes_in_fp32_under_autocast_and_from_bf16_logits():
    logits, labels = sample()
    logits = logits.bfloat16()
    expected = dice_focal_loss(logits.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dice_focal_loss(logits.requires_grad_(), labels.to(torch.uint8))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    found.backward()
    assert logits.grad.isfinite().all()


def test_a_perfect_and_a_confidently_wrong_segmentation():
    """Confident logits must not give NaN: log(0) and 0/0 are near."""
    labels = sample()[1]
    right = 200 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    for logits, low, high in ((right, 0, 1e-6), (-right, 1, 50)):
        logits = logits.clone().requires_grad_()
        loss = dice_focal_loss(logits, labels)
        loss.backward()
        assert low <= loss.item() <= high
        assert logits.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_named():
    logits, labels = sample()
    with pytest.raises(ValueError, match=r"\(3, 1, 5, 5, 6\)"):
        dice_focal_loss(logits, labels.unsqueeze(1))
    with pytest.raises(ValueError, match=r"\(3, 3, 5, 5, 6\)"):
        dice_focal_loss(logits[:, :3], labels)
