"""Preference losses: one pure function each, and one table of what the rest of the code must know of them.

With pi the policy, ref the reference, y_w the chosen and y_l the rejected completion of a prompt:
    chosen_logratio  = log pi(y_w) - log ref(y_w)
    rejected_logratio = log pi(y_l) - log ref(y_l)
Log-probabilities are sums over the completion's tokens, or their mean where `averages_over_length`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.config import DPOConfig
from common.failures import TrainingStopped, UserError


def logistic(chosen_logratio: torch.Tensor, rejected_logratio: torch.Tensor, config: DPOConfig) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected)): Rafailov et al. 2023 (DPO), eq. 7.

    With label_smoothing e: -(1 - e) log sigmoid(x) - e log sigmoid(-x): Mitchell 2023 (cDPO), eq. 3.
    On means over the completion instead of sums it is Lambert et al. 2024 (Tulu 3), eq. 6: dpo_norm.
    """
    x = config.beta * (chosen_logratio - rejected_logratio)
    return -(1 - config.label_smoothing) * F.logsigmoid(x) - config.label_smoothing * F.logsigmoid(-x)


def ipo(chosen_logratio: torch.Tensor, rejected_logratio: torch.Tensor, config: DPOConfig) -> torch.Tensor:
    """(chosen - rejected - 1 / (2 beta))^2: Azar et al. 2023 (IPO), eq. 17, beta being its tau."""
    return (chosen_logratio - rejected_logratio - 1 / (2 * config.beta)) ** 2


def simpo(chosen_logp: torch.Tensor, rejected_logp: torch.Tensor, config: DPOConfig) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma): Meng et al. 2024 (SimPO), eq. 6.

    gamma = gamma_beta_ratio * beta; log-probabilities of the policy alone.
    """
    return -F.logsigmoid(config.beta * (chosen_logp - rejected_logp - config.gamma_beta_ratio))


@dataclass(frozen=True)
class PreferenceLoss:
    """function(chosen, rejected, config): float32 [P], [P] -> losses float32 [P].

    is_logistic: it allows label smoothing, and is ln 2 for a policy that equals its reference.
    """

    function: Callable[[torch.Tensor, torch.Tensor, DPOConfig], torch.Tensor]
    needs_reference: bool
    averages_over_length: bool
    is_logistic: bool


LOSSES = {
    "sigmoid": PreferenceLoss(logistic, needs_reference=True, averages_over_length=False, is_logistic=True),
    "dpo_norm": PreferenceLoss(logistic, needs_reference=True, averages_over_length=True, is_logistic=True),
    "ipo": PreferenceLoss(ipo, needs_reference=True, averages_over_length=True, is_logistic=False),
    "simpo": PreferenceLoss(simpo, needs_reference=False, averages_over_length=True, is_logistic=False),
}


def preference_loss(config: DPOConfig) -> PreferenceLoss:
    """The loss that the config names. Raises UserError for a setting that the loss does not define."""
    loss = LOSSES[config.loss_type]
    if config.label_smoothing and not loss.is_logistic:
        raise UserError(f"--label_smoothing {config.label_smoothing}: {config.loss_type} has none; set it to 0")
    if config.ref_model_name_or_path and not loss.needs_reference:
        raise UserError(f"--ref_model_name_or_path: {config.loss_type} has no reference model; leave it out")
    return loss


FIRST_STEP_TOLERANCE = 0.01  # of a logistic loss at step 1, which is further than this from ln 2 only by a fault
BFLOAT16_ROUNDING = 2e-4  # error of a log-probability x over |x| between two ways to pack it; 6e-5 to 3e-4 were seen

# What preference_loss_and_sums adds up over a step's pairs; divided by their number, the fields of metrics.jsonl.
SUMMED = ["train_loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"]
SUMMED += ["logps/chosen", "logps/rejected"]


def preference_loss_and_sums(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, num_scored: torch.Tensor, config: DPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of P pairs, with its gradient, and float64 [7], their sums in the order of SUMMED.

    policy_logps, reference_logps: float32 [P, 2], summed over the completion's scored tokens, (chosen, rejected); a
    loss that needs no reference takes zeros. num_scored: int [P, 2], of those tokens. A loss that averages over length
    sees means per token. The scores, policy's minus reference's, are what the loss compares; a reward is beta times a
    score (Rafailov et al. 2023, section 5); an accuracy is 1 where the chosen one is the greater, 0.5 for a tie.
    """
    preference = LOSSES[config.loss_type]
    scores = policy_logps - reference_logps
    if preference.averages_over_length:
        policy_logps, scores = policy_logps / num_scored, scores / num_scored
    loss = preference.function(scores[:, 0], scores[:, 1], config).sum()
    with torch.no_grad():
        rewards = config.beta * scores.double()
        margins = rewards[:, 0] - rewards[:, 1]
        accuracy = torch.where(margins == 0, 0.5, (margins > 0).double())
        logps = policy_logps.double().sum(0)
        return loss, torch.stack([loss.double(), *rewards.sum(0), margins.sum(), accuracy.sum(), *logps])


def check_first_step(train_loss: float, means: dict[str, float], loss: PreferenceLoss, config: DPOConfig) -> None:
    """Step 1 of a logistic loss is ln 2, for policy and reference are the same model. Raises TrainingStopped.

    means: of the step's pairs, by the names of SUMMED. In bfloat16 the rounding of a pair's two log-probabilities is
    allowed as well: a loss whose slope is 1/2 carries over half of beta times it.
    """
    if not loss.is_logistic:
        return
    expected, tolerance = math.log(2), FIRST_STEP_TOLERANCE
    if config.dtype == "bfloat16":
        logps = abs(means["logps/chosen"]) + abs(means["logps/rejected"])
        tolerance += config.beta / 2 * BFLOAT16_ROUNDING * logps
    if abs(train_loss - expected) > tolerance:
        raise TrainingStopped(
            f"step 1: the loss is {train_loss:.4f} and must be {expected:.4f} (within {tolerance:.2g}), for the policy "
            f"still is its reference. The reference cache may not belong to these weights (delete {config.cache_dir}"
            f"/reference), or the attention kernel may be wrong for packed pairs (try --attn_implementation sdpa)"
        )
