"""Order and learning rate are functions of the step alone, as the contract writes them.

pytest tests/test_schedule.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from common.config import LR_SCHEDULERS, SFTConfig
from common.failures import UserError
from common.step.schedule import NEVER, Schedule, learning_rate_schedule


@pytest.mark.parametrize(
    ("num_samples", "batch", "seed"), [(10, 3, 42), (10, 10, 0), (9, 3, 7), (5, 8, 1), (1, 1, 2**40)]
)
def test_order_is_the_contracts_formula(num_samples, batch, seed):
    visited = []
    for epoch in range(3):
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        while order:
            visited.append(order[:batch])
            del order[:batch]
    schedule = Schedule(SFTConfig(global_batch_size=batch, seed=seed), num_samples)
    assert [schedule.samples(step) for step in range(len(visited))] == visited
    assert schedule.samples(1) == visited[1], "a step asked for out of turn is the same step"


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_sample_once(num_samples, batch, seed):
    schedule = Schedule(SFTConfig(global_batch_size=batch, seed=seed), num_samples)
    steps = schedule.steps_per_epoch
    for epoch in range(2):
        epoch_steps = [schedule.samples(epoch * steps + step) for step in range(steps)]
        assert sorted(i for samples in epoch_steps for i in samples) == list(range(num_samples))
        assert {len(samples) for samples in epoch_steps[:-1]} <= {batch}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize(
    ("num_steps", "warmup_ratio"), [(40, 0.03), (40, 0.1), (19, 0.1), (33, 0.5), (1, 0.0), (7, 1.0), (20, 0.0)]
)
def test_learning_rates_are_those_of_a_stepped_transformers_scheduler(name, num_steps, warmup_ratio):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, int(num_steps * warmup_ratio), num_steps)
    rates = []
    for step in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < num_steps - 1:
            scheduler.step()
    learning_rate = learning_rate_schedule(name, 3e-4, num_steps, warmup_ratio)
    assert [learning_rate(step) for step in range(num_steps)] == pytest.approx(rates, rel=1e-12, abs=0)


@pytest.mark.parametrize("peak", [1e-7, 1e-9, 0.0])
def test_a_peak_below_polynomials_last_rate_is_refused(peak):
    with pytest.raises(UserError, match=f"--lr_scheduler_type polynomial with --learning_rate {peak}:"):
        learning_rate_schedule("polynomial", peak, 10, 0.0)


def test_linear_by_hand():
    """int(40 x 0.1) = 4 warm-up steps from 0, then down to 0 at step 40."""
    learning_rate = learning_rate_schedule("linear", 8e-4, 40, 0.1)
    assert [learning_rate(step) for step in (0, 1, 4, 22)] == pytest.approx([0, 2e-4, 8e-4, 4e-4])


@pytest.mark.parametrize(
    ("changes", "num_steps", "last_step", "save_every", "saved"),
    [
        ({}, 8, 8, 500, []),
        ({"max_train_steps": 5}, 5, 5, 500, []),
        ({"max_train_steps": 50}, 50, 50, 500, []),
        ({"stop_after_steps": 6, "checkpointing_steps": "epoch"}, 8, 6, 4, [4, 6]),
        ({"stop_after_steps": 6}, 8, 6, 500, [6]),
        ({"stop_after_steps": 6, "clean_checkpoints_at_end": True}, 8, 6, 500, []),
        ({"stop_after_steps": 6, "checkpointing_steps": NEVER}, 8, 6, NEVER, []),
        ({"stop_after_steps": 9, "checkpointing_steps": 2}, 8, 8, 2, [2, 4, 6, 8]),
    ],
)
def test_a_run_ends_early_on_the_whole_runs_schedule(changes, num_steps, last_step, save_every, saved):
    """10 samples, 3 a step, 2 epochs of 4 steps. stop_after_steps changes no learning rate, max_train_steps does.

    saved: the steps after which there is a checkpoint; what ends early keeps its end, to go on from."""
    config = SFTConfig(global_batch_size=3, lr_scheduler_type="cosine", seed=7, **changes)
    schedule, whole = Schedule(config, 10), Schedule(SFTConfig(global_batch_size=3, seed=7), 10)
    assert (schedule.num_steps, schedule.last_step, schedule.save_every) == (num_steps, last_step, save_every)
    rate = learning_rate_schedule("cosine", config.learning_rate, num_steps, config.warmup_ratio)
    for step in range(last_step):
        assert schedule.samples(step) == whole.samples(step) and schedule.learning_rate(step) == rate(step)
    assert [step for step in range(1, last_step + 1) if schedule.saves(step)] == saved
    warnings = schedule.warnings()
    assert bool(warnings) == (not saved) and all("--checkpointing_steps" in line for line in warnings)
