"""The memory plan: a pure choice, and dry micro-batches that leave no trace in the gradient.

pytest tests/test_planner.py
"""

import pytest

from common.planner import MemoryModel, choose

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
