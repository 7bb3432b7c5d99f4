from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss, DiceLoss, FocalLoss

import common.loss
from common.loss import dice_focal_loss

OPTIONS = [
    {},
    {"focal_weight": 0.0},
    {"focal_weight": 4.0, "gamma": 0.0},
    {"gamma": 1.0, "alpha": [0.1, 0.5, 0.2, 0.7]},
    {"gamma": 2.5, "include_background": False},
    {"focal_weight": 0.0, "include_background": False},
]
LAYOUTS = {
    "contiguous": lambda logits: logits.contiguous(),
    "channels_last": lambda logits: logits.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda logits: logits.transpose(2, 4).contiguous().transpose(2, 4),
    "a part": lambda logits: torch.cat([logits, logits], dim=3)[..., :5, :],
}


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


def by_monai(logits, labels, focal_weight=1.0, gamma=2.0, alpha=0.25, include_background=True):
    dice = DiceLoss(softmax=True, to_onehot_y=True, include_background=include_background)
    focal = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, weight=alpha)
    truth = labels.unsqueeze(1)
    return dice(logits, truth) + focal_weight * focal(logits, truth)


def in_float64(logits, labels, focal_weight=1.0, gamma=2.0, alpha=0.25, include_background=True):
    """The formulas of the module docstring, term by term, for autograd."""
    p = torch.softmax(logits.double(), dim=1).flatten(2)
    g = torch.nn.functional.one_hot(labels.long(), 4).movedim(-1, 1).double().flatten(2)
    dice = (2 * (p * g).sum(2) + 1e-5) / (p.sum(2) + g.sum(2) + 1e-5)
    weights = torch.tensor(alpha if isinstance(alpha, list) else [alpha] * 4)[:, None]
    focal = -(weights * g * (1 - p) ** gamma * p.log()).mean()
    return (1 - dice)[:, 0 if include_background else 1 :].mean() + focal_weight * focal


def with_gradient(loss, logits, labels, **options):
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels, **options)
    (3 * value).backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_value_and_gradient_are_monais_and_those_of_float64(options, batch):
    logits, labels = sample(batch=batch)
    value, gradient = with_gradient(dice_focal_loss, logits, labels, **options)
    for reference, tolerance in ((by_monai, 1e-6), (in_float64, 1e-6)):
        expected, slope = with_gradient(reference, logits, labels, **options)
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)
        assert (gradient - slope).norm() < tolerance * slope.norm()
        assert (gradient - slope).abs().max() < 5 * tolerance * slope.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_layout_and_the_blocks_do_not_matter(layout, elsewhere, monkeypatch):
    logits, labels = sample()
    expected, slope = with_gradient(by_monai, logits, labels)
    if elsewhere:  # the whole batch at once, as on a GPU
        monkeypatch.setattr(common.loss, "_blocks", lambda truth: [(slice(None), slice(None))])
    else:
        monkeypatch.setattr(common.loss, "BLOCK", 7)
    laid_out = LAYOUTS[layout](logits)
    value, gradient = with_gradient(dice_focal_loss, laid_out, labels)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6 * slope.abs().max().item())
    if layout in ("contiguous", "channels_last"):
        assert gradient.stride() == laid_out.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_on_another_device_it_never_waits_for_a_value(layout):
    """A tensor without values: to ask for one raises, and so would a tensor of the CPU among them."""
    logits, labels = sample()
    logits = LAYOUTS[layout](logits.bfloat16()).to("meta").requires_grad_()
    loss = dice_focal_loss(logits, labels.to("meta"), alpha=[0.1, 0.5, 0.2, 0.7], gamma=2.5)
    loss.backward()
    assert (loss.device.type, loss.dtype, logits.grad.dtype) == (
        "meta",
        torch.float32,
        torch.bfloat16,
    )
    assert logits.grad.stride() == logits.stride()


def test_keeps_no_more_than_the_logits_for_the_gradient():
    logits, labels = sample()
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dice_focal_loss(logits.requires_grad_(), labels)
    storages = logits.untyped_storage().nbytes() + labels.untyped_storage().nbytes()
    assert storages <= sum(held.values()) < storages + 1000


def test_is_the_same_to_the_bit_without_a_gradient():
    logits, labels = sample()
    with torch.no_grad():
        value = dice_focal_loss(logits, labels)
    assert not value.requires_grad
    logits.requires_grad_()
    loss = dice_focal_loss(logits, labels)
    assert torch.equal(loss.detach(), value)


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


@pytest.mark.parametrize("label", [4, -1, 255])
def test_labels_that_are_none_are_refused(label):
    logits, labels = sample()
    labels[0, 0, 0, 0] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        dice_focal_loss(logits, labels)


@pytest.mark.parametrize("alpha", [[0.2, 0.2], [0.2] * 5, [0.2, -0.2, 0.2, 0.2], -1.0])
def test_alphas_that_do_not_fit_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be one factor or 4"):
        dice_focal_loss(*sample(), alpha=alpha)
