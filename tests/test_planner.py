"""The memory plan: a pure choice, and dry micro-batches that leave no trace in the gradient.

pytest tests/test_planner.py
"""

from types import SimpleNamespace

import models
import pytest
import torch

from common.config import SFTConfig
from common.model import num_parameters
from common.planner import RESIDENCY_KEYS, MemoryModel, choose, confirmed, is_resident, place_parameters, settle

GB = 1e9
LLAMA_8B_ON_2 = MemoryModel(fixed=44 * GB, per_token=0.6e6, per_token_and_layer=1e5, optimizer=32 * GB)


def test_with_room_nothing_is_recomputed_and_a_step_takes_few_micro_batches():
    budget, recomputing = choose(LLAMA_8B_ON_2, 500 * GB, 32, longest=4096, tokens_per_rank=42_000, budgets=None)
    assert recomputing == 0
    assert 42_000 / budget <= 2


def test_with_little_room_smaller_micro_batches_come_before_recomputation():
    budget, recomputing = choose(LLAMA_8B_ON_2, 110 * GB, 32, longest=4096, tokens_per_rank=42_000, budgets=None)
    assert recomputing == 0 and budget < 16384


@pytest.mark.parametrize("limit", [80, 90, 100, 120, 140])
@pytest.mark.parametrize("longest", [500, 4096, 9000])
def test_what_is_chosen_fits_and_holds_the_longest_sample(limit, longest):
    budget, recomputing = choose(LLAMA_8B_ON_2, limit * GB, 32, longest, tokens_per_rank=42_000, budgets=None)
    assert budget >= longest
    if recomputing < 32:
        assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing) <= limit * GB


def test_a_given_budget_is_kept_and_only_the_layers_are_chosen():
    budget, recomputing = choose(LLAMA_8B_ON_2, 110 * GB, 32, longest=4096, tokens_per_rank=42_000, budgets=[16384])
    assert budget == 16384 and 0 < recomputing < 32
    assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing) <= 110 * GB
    assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing + 1) > 110 * GB


def test_nothing_fits_gives_the_smallest_with_all_layers_recomputed():
    assert choose(LLAMA_8B_ON_2, 70 * GB, 32, 4096, 42_000, None) == (4096, 32)


@pytest.mark.parametrize(
    ("flags", "is_kept", "expected"),
    [
        ({}, False, (14336, 0)),  # 56.5 GB for 3.8 MB a token
        ({"gradient_checkpointing": "full"}, False, (32768, 32)),
        ({"gradient_checkpointing": 5}, False, (16384, 5)),  # 3.3 MB a token
        ({"max_tokens_per_micro_batch": 16384}, False, (16384, 4)),  # 46.7 GB for layers of 1.64 GB
        ({}, True, (16384, 4)),
        ({"max_tokens_per_micro_batch": 16384, "gradient_checkpointing": 9}, False, (16384, 9)),
    ],
)
def test_what_is_measured_settles_what_the_flags_leave_open(monkeypatch, flags, is_kept, expected):
    """The dry runs are played by a memory model, on a device of 141 GB with 8B parameters on 2 ranks."""
    real, runs = LLAMA_8B_ON_2, []

    def dry_run(engine, policy, kernel, tokens, recomputing, longest, ranks):
        runs.append((tokens, recomputing))
        return real.peak(tokens, 32 - recomputing) - real.optimizer

    said, recomputed = [], []
    parameter = SimpleNamespace(ds_tensor=torch.empty(int(real.optimizer / 8), device="meta"))
    policy = SimpleNamespace(decoder_layers=lambda: [None] * 32, checkpoint_activations=recomputed.append,
                             parameters=lambda: [parameter])  # fmt: skip
    ranks = SimpleNamespace(device=torch.device("cuda"), world_size=2, say=said.append, gather=lambda work: [work()])
    monkeypatch.setattr("common.planner._dry_run", dry_run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (141 * GB - real.fixed, 141 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: real.fixed)
    config = SFTConfig(**flags)
    budget = settle(SimpleNamespace(module=policy), config, "varlen", 16384, is_kept, 832, 90_000, ranks)
    layers = runs[-1][1] if runs else recomputed[-1]
    assert (budget, layers) == expected
    if "max_tokens_per_micro_batch" in flags and "gradient_checkpointing" in flags:
        assert not runs and not said, "nothing is left to choose"
    else:
        assert runs[-1] == expected, "the last dry run is of what was chosen"
        assert real.peak(budget, 32 - layers) <= 0.94 * 141 * GB
        assert f"micro-batches of {budget:,} tokens, {layers} of 32 layers recomputed" in said[-1]


@pytest.mark.parametrize(
    ("num_parameters", "free", "world_size", "resident"),
    [
        (8.0e9, 140, 2, False),  # 16 GB of the 62 that the state leaves
        (8.0e9, 140, 8, False),
        (5.5e9, 140, 2, False),  # 11 GB of 82, though of 132 it were little
        (3.2e9, 140, 8, True),
        (1.2e9, 140, 2, True),
        (1.2e9, 24, 2, False),
        (1.2e9, 140, 1, False),  # nothing to gather
        (8.0e9, 80, 1, False),  # the state itself does not fit: what is left is negative
    ],
)
def test_parameters_stay_whole_where_they_take_little_of_what_activations_could_have(
    num_parameters, free, world_size, resident
):
    assert is_resident(int(num_parameters), 2, free * GB, world_size) is resident


def choice_within(limit: float):
    return lambda memory: choose(memory, limit, 32, 4096, 42_000, None)


TRIED = 4096 * (0.6e6 + 8 * 1e5)  # bytes of 4,096 tokens with 8 layers that keep


def test_a_choice_that_fits_is_taken_and_memory_at_most_doubles_on_the_way():
    peaks, sizes = [TRIED + 76 * GB], []

    def peak_of(tokens, recomputing):
        sizes.append((tokens, recomputing))
        peaks.append(LLAMA_8B_ON_2.peak(tokens, 32 - recomputing))
        assert peaks[-1] - 76 * GB <= 2 * (peaks[-2] - 76 * GB)
        return peaks[-1]

    choice = confirmed(LLAMA_8B_ON_2, 150 * GB, 32, TRIED, choice_within(150 * GB), peak_of)
    assert choice[:2] == sizes[-1] == choice_within(150 * GB)(LLAMA_8B_ON_2) and len(sizes) == 4


@pytest.mark.parametrize("factor", [1.02, 1.1, 1.5, 3.0])
def test_a_larger_peak_than_foretold_lowers_the_choice_before_memory_runs_out(factor):
    """Micro-batches that take more than three small ones foretold."""
    real = MemoryModel(44 * GB, factor * 0.6e6, factor * 1e5, 32 * GB)
    peaks = []

    def peak_of(tokens, recomputing):
        peaks.append(real.peak(tokens, 32 - recomputing))
        return peaks[-1]

    budget, recomputing, peak = confirmed(LLAMA_8B_ON_2, 110 * GB, 32, TRIED, choice_within(110 * GB), peak_of)
    assert peak <= 110 * GB and (budget, recomputing) == choice_within(110 * GB)(real)
    assert max(peaks) <= 118 * GB


def test_less_than_was_foretold_changes_no_choice():
    choice = confirmed(LLAMA_8B_ON_2, 150 * GB, 32, TRIED, choice_within(150 * GB), lambda *_: 77 * GB)
    assert choice == (*choice_within(150 * GB)(LLAMA_8B_ON_2), 77 * GB)


def test_if_even_the_smallest_choice_is_above_the_limit_it_is_tried_all_the_same():
    for seen in (72, 90):
        choice = confirmed(LLAMA_8B_ON_2, 70 * GB, 32, TRIED, choice_within(70 * GB), lambda *_, seen=seen: seen * GB)
        assert choice[:2] == (4096, 32)


@pytest.mark.parametrize("given", [0, 10, 32])
def test_given_layers_are_what_the_budget_is_chosen_for(given):
    budget, recomputing = choose(LLAMA_8B_ON_2, 110 * GB, 32, 4096, 42_000, None, given)
    assert recomputing == given and LLAMA_8B_ON_2.peak(budget, 32 - given) <= 110 * GB
    assert choose(LLAMA_8B_ON_2, 78 * GB, 32, 4096, 42_000, None, given) == (4096, given)


@pytest.mark.parametrize(
    ("device", "world_size", "frees", "own", "resident"),
    [
        ("cuda", 2, (10**9, 10**9), {}, True),
        ("cuda", 2, (10**5, 10**5), {}, False),
        ("cuda", 2, (10**9, 10**5), {}, False),
        ("cuda", 1, (10**9,), {}, False),
        ("cpu", 2, (10**9, 10**9), {}, False),
        ("cuda", 2, (10**9, 10**9), {RESIDENCY_KEYS[0]: 0}, False),
        ("cuda", 2, (10**9, 10**9), {"offload_param": {"device": "cpu"}}, False),
    ],
)
def test_the_configs_own_words_on_placement_stand(monkeypatch, device, world_size, frees, own, resident):
    said = []
    free = iter(frees)
    ranks = SimpleNamespace(device=torch.device(device), world_size=world_size, say=said.append,
                            gather=lambda work: [work() for _ in frees])  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 0))
    zero = {"stage": 3, **own}
    placed = place_parameters({"zero_optimization": zero}, models.make_config(), torch.bfloat16, ranks)
    assert zero == {"stage": 3, **own}, "what was given is left as it is"
    added = dict.fromkeys(RESIDENCY_KEYS, 2**62) if resident else {}
    assert placed["zero_optimization"] == zero | added
    measured = device == "cuda" and not own
    assert len(said) == measured and (not measured or ("resident" in said[0]) == resident)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once(tied):
    config = models.make_config(tie_word_embeddings=tied, vocab_size=100, hidden_size=8, intermediate_size=16,
                                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    assert num_parameters(config) == 100 * 8 * (1 if tied else 2) + 2 * layer + 8
