"""Packing changes speed, never the numbers: pytest tests/test_packing.py"""

import itertools
import threading
import time

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from common.data.tokens import PreferencePair, SFTSample
from common.model.attention import attention_kwargs, registered_name
from common.model.logprobs import sequence_logps
from common.model.packed import PackedModel, model_inputs
from common.step.packing import one_ahead, pack, pair_documents, pair_lengths, plan_step, sft_documents

CPU = torch.device("cpu")


# ------------------------------------------------------------------ the plan of a step


@st.composite
def steps(draw):
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=60))
    return lengths, draw(st.integers(1, 9)), max(1, max(lengths) + draw(st.integers(-100, 400)))


@given(steps())
@example(([2, 2, 1], 1, 4))  # one token more than the budget
@settings(max_examples=300, deadline=None)
def test_every_sample_has_one_place_within_the_budget_in_few_micro_batches_and_ranks_are_alike(step):
    lengths, num_ranks, budget = step
    budget = max(budget, *lengths)
    plan = plan_step(lengths, num_ranks, budget)
    assert [len(rank) for rank in plan] == [len(plan[0])] * num_ranks, "an unequal number hangs the collectives"
    micro_batches = [members for m_th in zip(*plan, strict=True) for members in m_th]
    assert sorted(i for members in micro_batches for i in members) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in members) for members in micro_batches]
    assert max(tokens) <= budget
    assert tokens == sorted(tokens, reverse=True), "the fullest come first, and the ranks' m-th are alike"
    assert max(tokens) - min(tokens) <= max(lengths), "tokens are not spread evenly"
    enough = -(-sum(lengths) // (budget - max(lengths) + 1))  # any greedy filling closes a bin above budget - longest
    assert -(-sum(lengths) // (num_ranks * budget)) <= len(plan[0]) <= max(1, -(-enough // num_ranks))


@given(steps(), st.integers(0, 2000))
@settings(max_examples=300, deadline=None)
def test_the_first_micro_batch_of_a_rank_may_be_larger_and_holds_the_longest(step, opening):
    lengths, num_ranks, budget = step
    plan = plan_step(lengths, num_ranks, budget, opening)
    assert [len(rank) for rank in plan] == [len(plan[0])] * num_ranks, "an unequal number hangs the collectives"
    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    longest = sorted(lengths, reverse=True)
    budget = max([budget, *longest[num_ranks : num_ranks + 1]])
    tokens = [[sum(lengths[i] for i in members) for members in rank] for rank in plan]
    assert max(rank[0] for rank in tokens) <= max(opening, budget, longest[0])
    assert all(of_row <= budget for rank in tokens for of_row in rank[1:])
    assert len(plan[0]) <= len(plan_step(lengths, num_ranks, budget)[0]), "room that is not used"


def test_one_long_sample_leaves_the_other_micro_batches_as_they_were():
    lengths = [16384] + [660] * 127
    rows = [[sum(lengths[i] for i in row) for row in rank] for rank in plan_step(lengths, 2, 4096)]
    assert rows[0][0] == 16384 and max(of_row for rank in rows for of_row in rank[1:]) <= 4096
    assert rows[1][0] == pytest.approx(16384, rel=0.1), "a rank waits for the other one"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(2, 3))
@settings(max_examples=60, deadline=None)
def test_tokens_are_spread_almost_as_evenly_as_can_be(lengths, num_ranks):
    """Within a third of the best assignment there is (Graham 1969), found by trying all."""
    fullest = max(sum(lengths[i] for i in rank[0]) for rank in plan_step(lengths, num_ranks, 10**6))
    best = min(
        max(sum(n for n, r in zip(lengths, places, strict=True) if r == rank) for rank in range(num_ranks))
        for places in itertools.product(range(num_ranks), repeat=len(lengths))
    )
    assert fullest <= 4 / 3 * best


def test_an_empty_micro_batch_has_no_target_and_gradients_of_zero():
    row = pack([])
    assert (len(row.input_ids), len(row.target_rows), row.target_counts) == (2, 0, [])
    assert (row.num_tokens, row.sum_squared_lengths) == (0, 0)
    for share in (False, True):  # as the rank's other rows, so that it is compiled as they are
        keys = attention_kwargs(pack([], share), "varlen", CPU)["packed_key_index"]
        assert (keys is not None) == share
    sizes = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    config = models.make_config("gemma3n_text", **models.WINDOWS, **sizes, num_kv_shared_layers=0)
    lm = models.drawn(AutoModelForCausalLM.from_config(config, attn_implementation=registered_name("sdpa")))
    lm.get_input_embeddings().weight.data[0] = 0  # padding, at which Gemma 3n's root of a mean square has no gradient
    PackedModel(lm)(**model_inputs(row, "sdpa", CPU))[0].sum().backward()
    assert not any(parameter.grad.any() for parameter in lm.parameters() if parameter.grad is not None)


# ------------------------------------------------------------------ what a row holds


def test_targets_of_a_conversation_are_its_spans_and_positions_restart():
    first = SFTSample(np.arange(10, 20), np.array([[1, 2], [4, 7]]))
    second = SFTSample(np.arange(30, 34), np.array([[3, 4]]))
    row = pack([sft_documents(first), sft_documents(second)])
    assert row.position_ids.tolist() == [*range(10), *range(4)]
    assert (row.target_ids.tolist(), row.target_counts) == ([11, 14, 15, 16, 33], [4, 1])
    assert row.target_rows.tolist() == [0, 3, 4, 5, 12]
    assert (row.num_tokens, row.sum_squared_lengths) == (14, 10**2 + 4**2)
    with pytest.raises(AssertionError):  # nothing predicts the token at position 0: data/tokens.py makes no such span
        sft_documents(SFTSample(np.arange(10, 20), np.array([[0, 2]])))


@pytest.mark.parametrize("share", [True, False])
def test_targets_of_a_pair_are_the_scored_tokens_of_both_completions(share):
    pair = PreferencePair(np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8]), 0, 1)
    row = pack([pair_documents(pair, share)])
    assert (row.target_ids.tolist(), row.target_counts) == ([4, 5, 7, 8], [2, 2])
    assert row.num_tokens == len(row.input_ids) == pair_lengths(np.array([[3, 2, 3]]), share)[0] == (8 if share else 11)
    assert row.sum_squared_lengths == (8**2 - 2 * 2 * 3 if share else 5**2 + 6**2), (
        "what a query does not see is no work"
    )
    tokens = [1, 2, 3, 4, 5, 6, 7, 8] if share else [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]
    assert row.input_ids.tolist() == tokens
    assert row.position_ids.tolist() == ([0, 1, 2, 3, 4, 3, 4, 5] if share else [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5])
    predicted_from = {4: 3, 5: 4, 7: 6, 8: 7}  # 4 comes after the prompt's last token
    assert [tokens[r] for r in row.target_rows] == [predicted_from[t] for t in row.target_ids]


# ------------------------------------------------------------------ the numbers, through real architectures


@pytest.fixture(scope="module", params=sorted(models.ARCHITECTURES))
def folder(request, tmp_path_factory):
    return models.make_model(tmp_path_factory.mktemp(request.param), request.param)


def packed_model(folder) -> PackedModel:
    return PackedModel(reference.load(folder, attention=registered_name("sdpa")))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("lm."): p.grad.double() for name, p in model.named_parameters()}


def assert_same_gradients(seen: dict, expected: dict, tolerance: float = 2e-5) -> None:
    """A tensor's difference is judged by its own norm. Parameters of a single element (Apertus' alphas) are judged
    together, as one vector: alone, such a gradient can be the small rest of large terms that cancel, which says nothing
    of the size of their rounding."""
    assert seen.keys() == expected.keys()
    assert all(gradient.norm() > 0 for gradient in expected.values()), "a parameter is idle"
    single = [name for name, gradient in expected.items() if gradient.numel() == 1]
    for names in [[name] for name in expected if name not in single] + ([single] if single else []):
        ours, theirs = (torch.cat([side[name].flatten() for name in names]) for side in (seen, expected))
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), names


@pytest.fixture(scope="module")
def samples(folder):
    tokenizer = reference.load_tokenizer(folder)
    return [reference.conversation_tokens(tokenizer, row["messages"]) for row in models.conversations(5)]


@pytest.fixture(scope="module")
def pairs(folder):
    tokenizer = reference.load_tokenizer(folder)
    return [reference.pair_tokens(tokenizer, row) for row in models.preferences(5)]


def as_sft_sample(ids, targets) -> SFTSample:
    return SFTSample(np.array(ids), np.array([[t, t + 1] for t in targets]))


def as_pair(pair) -> PreferencePair:
    (chosen, chosen_targets), (rejected, rejected_targets) = pair
    prompt = min(chosen_targets[0], rejected_targets[0])
    return PreferencePair(*map(np.array, (chosen[:prompt], chosen[prompt:], rejected[prompt:])), 0, 0)


def packed_logps(model, documents) -> torch.Tensor:
    return model(**model_inputs(pack(documents), "sdpa", CPU))[0]


def test_packed_gradient_is_that_of_samples_one_at_a_time(folder, samples):
    plain, packed = reference.load(folder), packed_model(folder)
    losses = [-reference.token_logps(plain, *sample).sum() for sample in samples]
    sum(losses).backward()
    loss = 0
    for part in (samples[:3], samples[3:]):
        micro_batch_loss = -packed_logps(packed, [sft_documents(as_sft_sample(*sample)) for sample in part]).sum()
        micro_batch_loss.backward()
        loss += micro_batch_loss.item()
    assert loss == pytest.approx(sum(x.item() for x in losses), rel=1e-6)
    assert_same_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("share", [True, False])
def test_packed_pair_gradient_is_that_of_sides_one_at_a_time(folder, pairs, share):
    plain, packed = reference.load(folder), packed_model(folder)
    weights = torch.linspace(-1, 2, 2 * len(pairs))  # every side pulls differently
    expected = torch.stack([reference.token_logps(plain, *side).sum() for pair in pairs for side in pair])
    (weights * expected).sum().backward()
    micro_batch = pack([pair_documents(as_pair(pair), share) for pair in pairs])
    logps = sequence_logps(packed(**model_inputs(micro_batch, "sdpa", CPU))[0], micro_batch.target_counts)
    (weights * logps).sum().backward()
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_sample_sees_another(folder, samples, dtype):
    """Other tokens of the same length in one sample leave every other sample's log-probabilities bitwise the same."""
    packed = packed_model(folder).to(dtype)
    sizes = [len(targets) for _, targets in samples]
    before = packed_logps(packed, [sft_documents(as_sft_sample(*s)) for s in samples]).split(sizes)
    for changed in (0, 2, len(samples) - 1):
        other = [((np.array(ids) + 7) % 300).tolist() for ids, _ in samples]
        mixed = [(other[i] if i == changed else ids, targets) for i, (ids, targets) in enumerate(samples)]
        after = packed_logps(packed, [sft_documents(as_sft_sample(*s)) for s in mixed]).split(sizes)
        for i in range(len(samples)):
            assert is_unmoved(packed, before[i], after[i]) == (i != changed), (i, changed)


def is_unmoved(packed, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Bitwise; with experts to rounding."""
    if packed.lm.config.model_type in models.WITH_EXPERTS:
        tolerance = 1e-5 if packed.lm.dtype == torch.float32 else 0.1
        return torch.allclose(before, after, rtol=tolerance, atol=tolerance)
    return torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [True, False])
def test_no_completion_sees_the_other(folder, pairs, share, dtype):
    """Other tokens in one completion leave the other completion, and every other pair, bitwise the same; not shared,
    a side is a document as a conversation is."""
    packed = packed_model(folder).to(dtype)
    sizes = [len(targets) for pair in pairs for _, targets in pair]
    originals = [as_pair(pair) for pair in pairs]
    before = packed_logps(packed, [pair_documents(p, share) for p in originals]).split(sizes)
    for changed in (0, 3, len(sizes) - 1):
        mixed = list(originals)
        field = ("chosen_ids", "rejected_ids")[changed % 2]
        pair = originals[changed // 2]
        mixed[changed // 2] = pair._replace(**{field: (getattr(pair, field) + 7) % 300})
        after = packed_logps(packed, [pair_documents(p, share) for p in mixed]).split(sizes)
        for i in range(len(sizes)):
            assert is_unmoved(packed, before[i], after[i]) == (i != changed), (i, changed)


def test_one_step_is_prepared_ahead_in_order_and_never_two():
    """And what goes wrong in the thread comes out at the step that it belongs to."""
    started, main = [], threading.get_ident()

    def prepared(step):
        started.append(step)
        assert threading.get_ident() != main
        if step == 5:
            raise ValueError("five")
        return step * 10

    seen = []
    with pytest.raises(ValueError, match="five"):
        for step, value in one_ahead(prepared, range(2, 9)):
            seen.append((step, value))
            time.sleep(0.05)
            assert started == list(range(2, step + 2))
    assert seen == [(2, 20), (3, 30), (4, 40)]
    assert list(one_ahead(prepared, range(0))) == []
    assert list(one_ahead(prepared, range(8, 9))) == [(8, 80)]
