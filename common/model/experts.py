"""Mixtures of experts on packed rows: grouped products, the routers' auxiliary loss, and what a token meets.

A token's router chooses `top_k` of a layer's experts. transformers keeps the weights of all experts of a layer in one
parameter, so that ZeRO-3 gathers and reduces the same parameters on every rank, whatever the routers choose.
"""

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from common.failures import UserError
from common.model.summing import grouped_product, summing_lookup
from common.step.packing import MicroBatch

GROUPED = "plaintune_grouped"  # name of grouped_experts among transformers' implementations
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in a config
NUM_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


# ------------------------------------------------------------------ the experts of a layer
def experts_in(lm: nn.Module) -> list[nn.Module]:
    """The modules that hold the experts of a layer, of those that compute by transformers' ExpertsInterface."""
    return [module for module in lm.modules() if hasattr(module, "has_gate") and hasattr(module, "is_transposed")]


class _Rows(torch.autograd.Function):
    """inputs[order // copies] of inputs [T, H]; order int64 [T copies]: a permutation, inverse: its inverse.

    The backward pass sums each row's copies in one order, and so to the same bits every time.
    """

    @staticmethod
    def forward(ctx, inputs, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return inputs[order // copies]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def grouped_experts(
    module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The sum over each token's experts of their outputs, times the router's weights; [T, H] in hidden's dtype.

    hidden [T, H]; top_k_index int64 [T, top_k], experts; top_k_weights [T, top_k]. The computation is transformers'
    grouped_mm_experts_forward; gradients of the parameters that `module.weight_sums` names are added to it in float32.
    """
    top_k, num_experts = top_k_index.shape[-1], module.num_experts
    expert, order = torch.sort(top_k_index.flatten(), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    of_experts = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(expert, of_experts, right=True).to(torch.int32)  # of each expert's rows
    sums = getattr(module, "weight_sums", {})

    def product(inputs: torch.Tensor, name: str) -> torch.Tensor:
        outputs = grouped_product(inputs, getattr(module, name), sums.get(name), ends, module.is_transposed)
        if not module.has_bias:
            return outputs
        return outputs + summing_lookup(expert, getattr(module, f"{name}_bias"), sums.get(f"{name}_bias"))

    rows = _Rows.apply(hidden, order, inverse, top_k)
    if module.has_gate:
        rows = module._apply_gate(product(rows, "gate_up_proj"))
    else:
        rows = module.act_fn(product(rows, "up_proj"))
    rows = product(rows, "down_proj")
    if getattr(module, "has_post_expert_norm", False):  # not before transformers 5.23
        rows = module.post_expert_norm(rows)
    rows = _Rows.apply(rows, inverse, order, 1) * top_k_weights.flatten()[:, None]
    return rows.unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_experts)


# ------------------------------------------------------------------ the routers' auxiliary loss
def sequence_weights(micro_batch: MicroBatch) -> np.ndarray:
    """float32 [Q, T]: of row q, 1 / its length at each token of sequence q, and 0 elsewhere.

    A sequence is a document; a document with branches is two, each the stem and one branch. Q is 0 without samples.
    """
    segments = micro_batch.segments if micro_batch.num_tokens else []
    is_member: np.ndarray = np.zeros((len(segments), len(micro_batch.input_ids)), np.float32)
    for row, (_, keys) in zip(is_member, segments, strict=True):
        row[keys] = 1
    return is_member / is_member.sum(1, keepdims=True)


def router_loss(router_logits: tuple, weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """float32 []: the sum over sequences of E sum_e f_e P_e, over E experts.

    f_e is the mean number of choices of expert e, and P_e the mean of its probability, over a sequence's tokens and all
    layers. Of one sequence this is what transformers' load_balancing_loss_func gives (Fedus et al. 2021, Switch
    Transformer, eq. 4 to 6, for top_k choices). f_e P_e is a product of two means: of a packed row it would depend on
    what was packed. Of each sequence alone, as DeepSeek-V3 balances (Liu et al. 2024, eq. 17 to 20), it does not, and
    is added up over rows and ranks.
    router_logits: [T, E] of each layer; weights: sequence_weights.
    """
    chosen = probability = torch.zeros(len(weights), router_logits[0].shape[-1], device=weights.device)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        choices = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
        chosen, probability = chosen + weights @ choices, probability + weights @ probabilities
    return (chosen * probability).sum() * (chosen.shape[1] / len(router_logits) ** 2)


def require_router_logits(coefficient: float, lm: nn.Module) -> None:
    """Raises UserError for an auxiliary loss of a model whose routers' logits transformers does not give."""
    if coefficient and "router_logits" not in (getattr(lm.get_decoder(), "_can_record_outputs", None) or {}):
        raise UserError(f"--router_aux_loss_coef {coefficient}: model type {lm.config.model_type} has no router logits")


# ------------------------------------------------------------------ counts
def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts of a layer a token's router chooses; 1 for a config without experts."""
    return _first_number(config, NUM_CHOSEN)


def part_met(config: PretrainedConfig, name: str) -> float:
    """Of the parameter of that name, the part that one token meets: of experts, those that it is routed to."""
    return experts_per_token(config) / _first_number(config, NUM_EXPERTS) if ".experts." in name else 1.0


def _first_number(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    """The first of these that a config has, or the part of it where dbrx keeps them; of a list, a number for each
    layer, the largest. 1 for none."""
    parts = (config, getattr(config, "ffn_config", None))
    found = next((number for part in parts for name in names if (number := getattr(part, name, None))), 1)
    return max(found) if isinstance(found, list) else found
