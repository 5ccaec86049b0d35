"""Which samples a step takes and at what learning rate: pure functions of the step (INTERFACE: "Order and arithmetic").

Nothing here depends on ranks, micro-batches or a resume, and nothing needs to be saved to continue.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from transformers import get_scheduler

from common.failures import as_user_error

NEVER = 10**9  # as --checkpointing_steps: no checkpoint, not even of the end


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one may hold fewer than global_batch_size samples."""
    return math.ceil(num_samples / global_batch_size)


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """int64 [num_samples]: the order in which epoch `epoch` (from 0) visits the kept samples."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))


def step_samples(step: int, num_samples: int, global_batch_size: int, seed: int) -> list[int]:
    """Indices of the samples of optimizer step `step` (from 0)."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    start = step_in_epoch * global_batch_size
    return epoch_order(num_samples, seed, epoch)[start : start + global_batch_size].tolist()


def learning_rate_schedule(name: str, peak: float, num_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """The learning rate as a function of the step (from 0): what transformers.get_scheduler gives at that step.

    Every schedule in config.LR_SCHEDULERS multiplies the peak by a function of the step alone, and that function is
    transformers' own. Raises UserError for a peak that it does not take: polynomial ends at a rate of 1e-7.
    """
    optimizer, num_warmup_steps = torch.optim.SGD([torch.zeros(1)], lr=peak), int(num_steps * warmup_ratio)
    with as_user_error(f"--lr_scheduler_type {name} with --learning_rate {peak}", ValueError):
        factor = get_scheduler(name, optimizer, num_warmup_steps, num_steps).lr_lambdas[0]
    return lambda step: peak * factor(step)


class Schedule:
    """The steps of one run over num_samples kept samples (pairs). config: common.config.TrainConfig.

    num_steps: of the whole schedule, max_train_steps if given; last_step: after which this run ends; save_every: steps
    between two checkpoints; keeps_end: whether there is one of the last step, for a run that is to go on;
    samples(step), learning_rate(step): of optimizer step `step`, from 0.
    """

    def __init__(self, config, num_samples: int):
        self.num_samples, self.batch, self.seed = num_samples, config.global_batch_size, config.seed
        self.steps_per_epoch = steps_per_epoch(num_samples, self.batch)
        self.num_steps = config.max_train_steps or self.steps_per_epoch * config.num_train_epochs
        self.last_step = min(self.num_steps, config.stop_after_steps or self.num_steps)
        self.save_every = self.steps_per_epoch if config.checkpointing_steps == "epoch" else config.checkpointing_steps
        has_use = self.save_every < NEVER and not config.clean_checkpoints_at_end
        self.keeps_end = self.last_step < self.num_steps and has_use
        shape = self.num_steps, config.warmup_ratio
        self.learning_rate = learning_rate_schedule(config.lr_scheduler_type, config.learning_rate, *shape)

    def samples(self, step: int) -> list[int]:
        return step_samples(step, self.num_samples, self.batch, self.seed)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps, whatever else asks for one."""
        return step % self.save_every == 0 or (self.keeps_end and step == self.last_step)

    def report(self, method: str, unit: str) -> str:
        """What will be trained, and how often it is saved, in a line; a second one if it is never saved."""
        text = (
            f"{method}: {self.num_samples:,} {unit}; {self.last_step:,} of {self.num_steps:,} steps of {self.batch} "
            f"{unit}; a checkpoint every {self.save_every} steps"
        )
        if self.save_every > self.last_step and not self.keeps_end:
            text += (
                f"\nwarning: --checkpointing_steps {self.save_every} is more than this run's {self.last_step} steps: "
                f"no checkpoint will be written, and a crash loses everything"
            )
        return text
