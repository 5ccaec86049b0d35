"""What the start-up check finds, and that it leaves no trace: pytest tests/test_packed.py"""

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.failures import UserError
from common.model import attention, experts
from common.model.attention import registered_name
from common.model.packed import PackedModel, verify_packed_model
from common.model.summing import SummingLinear


class Engine:
    """What of DeepSpeed's engine the check uses."""

    def __init__(self, module: PackedModel):
        self.module, self.set_gradient_accumulation_boundary = module, lambda is_last: None

    def __call__(self, *arguments, **named):
        return self.module(*arguments, **named)


def engine_of(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Engine:
    config = models.make_config(architecture)
    torch.manual_seed(seed)
    kernel = registered_name("sdpa")
    lm = models.drawn(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel))
    lm.config._experts_implementation = experts.GROUPED
    return Engine(PackedModel(lm.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_what_is_computed_right_passes_and_no_trace_is_left(architecture, dtype):
    engine = engine_of(architecture, dtype)
    lm = engine.module.lm
    windows = [getattr(module, "sliding_window", None) for module in lm.modules()]
    verify_packed_model(engine, "sdpa", models.OneRank())
    assert [getattr(module, "sliding_window", None) for module in lm.modules()] == windows
    assert lm.config._attn_implementation == registered_name("sdpa")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.parameters())


WRONG = {  # what is broken -> (where, by what)
    "samples see each other": ("block_mask", lambda document, branch: BLOCK_MASK(torch.zeros_like(document), branch)),
    "windows are not kept": ("_sdpa", lambda *args, **kwargs: SDPA(*args, **kwargs | {"sliding_window": None})),
    "scores are not capped": ("_sdpa", lambda *args, **kwargs: SDPA(*args, **kwargs | {"softcap": None})),
    "a gradient is wrong": ("_sdpa", lambda module, q, *rest, **kwargs: SDPA(module, q.detach(), *rest, **kwargs)),
}
SDPA, BLOCK_MASK = attention._sdpa, attention.block_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_computed_wrongly_is_refused(monkeypatch, name, dtype):
    where, broken = WRONG[name]
    engine = engine_of("gemma2", dtype)
    if where == "block_mask":
        monkeypatch.setattr(attention, "block_mask", broken)
    else:
        monkeypatch.setitem(attention.AttentionInterface._global_mapping, registered_name("sdpa"), broken)
    with pytest.raises(UserError, match="model type gemma2") as error:
        verify_packed_model(engine, "sdpa", models.OneRank())
    assert ("in one row" in str(error.value)) == (where == "block_mask")


@pytest.mark.parametrize("is_wrong", [False, True])
@pytest.mark.parametrize("architecture", sorted(models.WITH_EXPERTS))
def test_a_token_may_go_to_another_expert_where_scores_are_rounded_but_a_wrong_product_is_found(
    monkeypatch, architecture, is_wrong
):
    """In bfloat16: one token of twelve is sent elsewhere, or experts' outputs are three times as large."""
    engine, grouped = engine_of(architecture, torch.bfloat16), experts.grouped_experts

    def computed(module, hidden, top_k_index, top_k_weights):
        if is_wrong:
            return 3 * grouped(module, hidden, top_k_index, top_k_weights)
        others = top_k_index.clone()
        others[3::12, -1] = 3 - others[3::12, -1]
        return grouped(module, hidden, others, top_k_weights)

    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS, experts.GROUPED, computed)
    if not is_wrong:
        return verify_packed_model(engine, "sdpa", models.OneRank())
    with pytest.raises(UserError, match="differ from transformers' own"):
        verify_packed_model(engine, "sdpa", models.OneRank())


def test_the_sums_of_gradients_stay_zeros():
    """As residency.py has them: a layer's linear module and the head add to theirs in a backward pass."""
    engine = engine_of("llama")
    linear, head = engine.module.decoder_layers()[0].mlp.up_proj, engine.module.lm.get_output_embeddings()
    linear.__class__ = SummingLinear
    for module in (linear, head):
        module.weight_sum = torch.zeros(module.weight.shape)
    verify_packed_model(engine, "sdpa", models.OneRank())
    assert not linear.weight_sum.any() and not head.weight_sum.any()
