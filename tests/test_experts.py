"""Experts compute what transformers' own do; their float32 sums and balance are exact: pytest tests/test_experts.py"""

from functools import partial

import models
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from common.data.tokens import PreferencePair
from common.failures import UserError
from common.model import experts
from common.model.packed import PackedModel, model_inputs
from common.model.summing import add_grouped_product
from common.step.packing import pack, pair_documents

TYPES = sorted(models.WITH_EXPERTS - {"gpt_oss"})


def drawn(name: str):
    """A tiny model in float32."""
    torch.manual_seed(0)
    config = models.make_config(name)
    return models.drawn(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"))


@pytest.mark.parametrize("name", sorted(models.WITH_EXPERTS))
def test_outputs_and_gradients_are_those_of_transformers_own_loop_over_experts(name):
    """With autograd's gradients and with sums, after two backward passes; some experts get no token."""
    lm, rows, seen = drawn(name), [torch.randint(320, (1, length)) for length in (40, 3)], {}
    for how in ("eager", "grouped", "summed"):
        lm.zero_grad()
        lm.config._experts_implementation = "eager" if how == "eager" else experts.GROUPED
        sums = {}
        for prefix, module in lm.named_modules():
            if how == "summed" and module in experts.experts_in(lm):
                module.weight_sums = {n: torch.zeros_like(p) for n, p in module.named_parameters(recurse=False)}
                sums |= {f"{prefix}.{n}": total for n, total in module.weight_sums.items()}
        logits = [lm(input_ids=row).logits for row in rows]
        for values in logits:
            values.logsumexp(-1).sum().backward()
        seen[how] = torch.cat(logits, 1), {n: sums.get(n, p.grad) for n, p in lm.named_parameters()}
        assert all(p.grad is None for n, p in lm.named_parameters() if n in sums)
        assert how != "summed" or len(sums) == sum(len([*m.parameters()]) for m in experts.experts_in(lm)) > 0
    for how in ("grouped", "summed"):
        torch.testing.assert_close(seen[how][0], seen["eager"][0], rtol=1e-5, atol=1e-6)
        for n, gradient in seen["eager"][1].items():
            torch.testing.assert_close(seen[how][1][n], gradient, rtol=1e-4, atol=2e-5, msg=n)


def test_experts_products_are_added_in_float32():
    """bfloat16 operands; the second and the last expert have no row."""
    torch.manual_seed(0)
    grad, inputs, total = torch.randn(40, 5).bfloat16(), torch.randn(40, 7).bfloat16(), torch.randn(4, 5, 7)
    expected, parts = total.double(), [(0, 25), (25, 25), (25, 40), (40, 40)]
    for i, (start, end) in enumerate(parts):
        expected[i] += grad[start:end].double().T @ inputs[start:end].double()
    add_grouped_product(total, grad, inputs, torch.tensor([end for _, end in parts], dtype=torch.int32))
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("share_prompt", [False, True])
def test_the_routers_loss_of_a_packed_row_is_the_sum_over_its_sequences_alone(name, share_prompt):
    """transformers' own function on each sequence alone; and the gradients of its router weights."""
    lm, rng = drawn(name), np.random.default_rng(0)
    sizes = ((9, 4, 7), (3, 8, 2), (12, 1, 1))
    pairs = [PreferencePair(*(rng.integers(1, 320, n) for n in size), 0, 0) for size in sizes]
    expected = []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, completion]).astype(np.int64))[None]
            logits = lm(input_ids=ids, output_router_logits=True).router_logits
            num_experts = logits[0].shape[-1]
            expected.append(load_balancing_loss_func(logits, num_experts, 2))
    sum(expected).backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    assert len(gradients) > 5
    lm.zero_grad()
    lm.config._attn_implementation = "plaintune_block_mask"
    packed = PackedModel(lm)
    for row, count in ((pack([pair_documents(p, share_prompt) for p in pairs], share_prompt), 6), (pack([]), 0)):
        _, balance = packed(**model_inputs(row, "sdpa", torch.device("cpu"), 0.1))
        assert balance.item() == pytest.approx(sum(loss.item() for loss in expected[:count]), rel=1e-5)
        balance.backward()
    for n, gradient in gradients.items():
        torch.testing.assert_close(lm.get_parameter(n).grad, gradient, rtol=1e-4, atol=1e-5, msg=n)
    assert packed(**model_inputs(row, "sdpa", torch.device("cpu")))[1] == 0.0, "it was not asked for"


@pytest.mark.parametrize("with_sums", [True, False])
def test_layers_compile_once_for_rows_of_any_length(monkeypatch, with_sums):
    lm, counters = drawn("qwen3_moe"), torch._dynamo.utils.counters
    lm.config._experts_implementation, lm.config._attn_implementation = experts.GROUPED, "plaintune_block_mask"
    packed = PackedModel(lm)
    for module in experts.experts_in(lm) if with_sums else ():
        module.weight_sums = {n: torch.zeros_like(p) for n, p in module.named_parameters(recurse=False)}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    packed.compile_layers()
    for length in (30, 71, 200):
        pair = PreferencePair(*(np.arange(n) for n in (length, 7, 9)), 0, 0)
        row = pack([pair_documents(pair, share_prompt=True)], share_prompt=True)
        packed(**model_inputs(row, "sdpa", torch.device("cpu")))[0].sum().backward()
    assert (counters["stats"]["unique_graphs"], counters["graph_break"]) == (3, {}), "the layers', the head's two"


def test_a_balance_of_experts_is_refused_for_a_model_without_them():
    for name in TYPES:
        experts.require_router_logits(0.1, drawn(name))
    experts.require_router_logits(0.0, drawn("llama"))
    with pytest.raises(UserError, match="--router_aux_loss_coef"):
        experts.require_router_logits(0.1, drawn("llama"))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("dbrx", {"ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}}),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [1, 2]}),
    ],
)
def test_numbers_of_experts_are_found_wherever_a_config_has_them(name, numbers):
    config = AutoConfig.for_model(name, **numbers)
    assert experts.experts_per_token(config) == 2 and experts.part_met(config, "layers.0.experts.up") == 0.25
