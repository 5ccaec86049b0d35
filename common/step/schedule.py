"""Which samples a step takes and at what learning rate: pure functions of the step (INTERFACE: "Order and arithmetic").

Nothing here depends on ranks, micro-batches or a resume, and nothing needs to be saved to continue.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from transformers import get_scheduler

from common.failures import as_user_error


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one may hold fewer than global_batch_size samples."""
    return math.ceil(num_samples / global_batch_size)


def total_steps(num_samples: int, global_batch_size: int, num_train_epochs: int, max_train_steps: int | None) -> int:
    """Optimizer steps of the whole schedule; max_train_steps, if given, replaces the number of epochs."""
    return max_train_steps or steps_per_epoch(num_samples, global_batch_size) * num_train_epochs


def checkpoint_interval(checkpointing_steps: int | str, num_samples: int, global_batch_size: int) -> int:
    """Steps from one checkpoint to the next; `epoch` is as many as an epoch has."""
    is_epoch = checkpointing_steps == "epoch"
    return steps_per_epoch(num_samples, global_batch_size) if is_epoch else checkpointing_steps


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """int64 [num_samples]: the order in which epoch `epoch` (from 0) visits the kept samples."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))


def step_samples(step: int, num_samples: int, global_batch_size: int, seed: int) -> list[int]:
    """Indices of the samples of optimizer step `step` (from 0)."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    start = step_in_epoch * global_batch_size
    return epoch_order(num_samples, seed, epoch)[start : start + global_batch_size].tolist()


def samples_seen(step: int, num_samples: int, global_batch_size: int) -> int:
    """How many samples steps 0 .. step-1 took."""
    epochs, steps = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    return epochs * num_samples + steps * global_batch_size


def learning_rate_schedule(name: str, peak: float, num_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The learning rate as a function of the step (from 0): what transformers.get_scheduler gives at that step.

    Every schedule in config.LR_SCHEDULERS multiplies the peak by a function of the step alone; that
    function is transformers' own, so the values are equal by construction. Raises UserError for a peak that the schedule
    does not take.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    with as_user_error(
        f"--lr_scheduler_type {name} with --learning_rate {peak}", ValueError
    ):  # polynomial's last rate is 1e-7
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=int(num_steps * warmup_ratio), num_training_steps=num_steps
        )
    factor = scheduler.lr_lambdas[0]
    return lambda step: peak * factor(step)
