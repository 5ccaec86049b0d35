"""Preference losses against the papers' formulas and hand-worked numbers: pytest tests/test_losses.py"""

import math

import pytest
import torch

from common.config import DPOConfig
from common.failures import TrainingStopped, UserError
from common.step.losses import LOSSES, SUMMED, check_first_step, preference_loss, preference_loss_and_sums

CHOSEN = torch.tensor([-1.5, 0.25, 3.0, 0.0, -40.0], dtype=torch.float64)
REJECTED = torch.tensor([0.5, -2.0, 2.75, 0.0, 40.0], dtype=torch.float64)


def loss(loss_type, chosen=CHOSEN, rejected=REJECTED, **settings):
    config = DPOConfig(loss_type=loss_type, **settings)
    return preference_loss(config).function(chosen, rejected, config)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss_type", ["sigmoid", "dpo_norm"])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (5.0, 0.0), (0.3, 0.1), (1.0, 0.5)])
def test_logistic_losses_are_the_papers(loss_type, beta, smoothing):
    """Rafailov et al. 2023, eq. 7; with smoothing Mitchell 2023: both labels, weighed by their probability."""
    seen = loss(loss_type, CHOSEN[:4], REJECTED[:4], beta=beta, label_smoothing=smoothing)
    for i in range(4):
        p = sigmoid(beta * (CHOSEN[i].item() - REJECTED[i].item()))
        assert seen[i].item() == pytest.approx(-(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_is_the_papers(beta):
    """Azar et al. 2023, eq. 17."""
    expected = [(c - r - 1 / (2 * beta)) ** 2 for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    assert loss("ipo", beta=beta).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("beta", "ratio"), [(2.0, 0.5), (5.0, 0.3), (1.0, 0.0)])
def test_simpo_is_the_papers(beta, ratio):
    """Meng et al. 2024, eq. 6, with gamma = ratio x beta."""
    seen = loss("simpo", CHOSEN[:4], REJECTED[:4], beta=beta, gamma_beta_ratio=ratio)
    for i in range(4):
        margin = beta * CHOSEN[i].item() - beta * REJECTED[i].item() - ratio * beta
        assert seen[i].item() == pytest.approx(-math.log(sigmoid(margin)), rel=1e-12)


def test_hand_worked_numbers():
    """Ratios 2 and 1, so a difference of 1."""
    two, one = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert loss("sigmoid", two, one, beta=math.log(3)).item() == pytest.approx(math.log(4 / 3))  # sigmoid(ln 3) = 3/4
    assert loss("dpo_norm", one, two, beta=math.log(3)).item() == pytest.approx(math.log(4))
    assert loss("sigmoid", two, one, beta=math.log(3), label_smoothing=0.25).item() == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )
    assert loss("ipo", two, one, beta=0.25).item() == pytest.approx(1.0)  # (1 - 2)^2
    assert loss("simpo", two, one, beta=2 * math.log(3), gamma_beta_ratio=0.5).item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_far_apart_log_probabilities_overflow_nothing(loss_type):
    chosen = CHOSEN.float().requires_grad_()
    value = loss(loss_type, chosen, REJECTED.float(), beta=5.0)
    value.sum().backward()
    assert value.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss_type", "dtype", "logps", "allowed"),
    [
        ("sigmoid", "float32", 2000, 0.01),
        ("dpo_norm", "float32", 2000, 0.01),
        ("sigmoid", "bfloat16", 2000, 0.21),
        ("sigmoid", "bfloat16", 3, 0.0103),
        ("simpo", "float32", 2000, None),
        ("ipo", "float32", 2000, None),
    ],
)
def test_a_first_step_that_is_not_ln_2_stops_the_run(loss_type, dtype, logps, allowed):
    """In bfloat16 it may be off by the rounding of long sums: 2e-4 of 2000 nats are 0.4, and at beta 1 they move the
    loss by half of that. A loss that is not ln 2 there (None) is not checked."""
    means = {"logps/chosen": -0.75 * logps, "logps/rejected": -0.25 * logps}
    arguments = means, LOSSES[loss_type], DPOConfig(loss_type=loss_type, beta=1.0, dtype=dtype)
    check_first_step(math.log(2) + (0.99 * allowed if allowed else 12.0), *arguments)
    for wrong in (1.01 * allowed, -1.01 * allowed, 5 * math.log(2)) if allowed else ():
        with pytest.raises(TrainingStopped, match="step 1"):
            check_first_step(math.log(2) + wrong, *arguments)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "simpo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "simpo", "ref_model_name_or_path": "x"}, "ref_model_name_or_path"),
    ],
)
def test_settings_that_a_loss_does_not_define_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        preference_loss(DPOConfig(**settings))


def sums_of(policy, reference, num_scored, **settings) -> tuple[float, dict[str, float]]:
    values = torch.tensor(policy, requires_grad=True), torch.tensor(reference), torch.tensor(num_scored)
    loss, sums = preference_loss_and_sums(*values, DPOConfig(dtype="float32", **settings))
    return loss.item(), dict(zip(SUMMED, sums.tolist(), strict=True))


def test_sums_by_hand():
    """Two pairs, beta 2: one right by 3, one a tie. The loss that is differentiated is the one that is reported."""
    policy, reference = [[-10.0, -20.0], [-1.0, -2.0]], [[-11.0, -18.0], [-1.5, -2.5]]
    loss, sums = sums_of(policy, reference, [[4, 5], [1, 2]], loss_type="sigmoid", beta=2.0)
    assert loss == sums.pop("train_loss") == pytest.approx(math.log(1 + math.exp(-6)) + math.log(2), rel=1e-6)
    chosen, rejected, margin, accuracy, *logps = sums.values()  # in the order of SUMMED
    assert (chosen, rejected, margin, accuracy, logps) == (3.0, -3.0, 6.0, 1.5, [-11.0, -22.0])


def test_means_by_hand():
    """A loss that averages over length sees each side per token of its own: 10 of -30 and -10, 5 of -20 and -15."""
    _, sums = sums_of([[-30.0, -20.0]], [[-10.0, -15.0]], [[10, 5]], loss_type="dpo_norm", beta=2.0)
    assert sums.pop("train_loss") == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
    assert list(sums.values()) == pytest.approx([-4.0, -2.0, -2.0, 0.0, -3.0, -4.0])


@pytest.mark.parametrize(("margin", "accuracy"), [(0.0, 0.5), (1e-6, 1.0), (-1e-6, 0.0)])
def test_a_tie_is_exactly_0(margin, accuracy):
    _, sums = sums_of([[margin, 0.0]], [[0.0, 0.0]], [[1, 1]], loss_type="sigmoid", beta=0.1)
    assert sums["rewards/accuracy"] == accuracy


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_an_empty_micro_batch_adds_nothing_and_has_a_gradient(loss_type):
    policy = torch.zeros(0, 2, requires_grad=True)
    loss, sums = preference_loss_and_sums(policy, torch.zeros(0, 2), torch.zeros(0, 2), DPOConfig(loss_type=loss_type))
    loss.backward()
    assert sums.tolist() == [0.0] * len(SUMMED) and policy.grad is not None
