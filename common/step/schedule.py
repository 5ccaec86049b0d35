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


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """int64 [num_samples]: the order in which epoch `epoch` (from 0) visits the kept samples."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))


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

    steps_per_epoch: the last of them may hold fewer than global_batch_size samples.
    num_steps: of the whole schedule, max_train_steps if given; last_step: after which this run ends; save_every: steps
    between two checkpoints; keeps_end: whether there is one of the last step, for a run that is to go on;
    samples(step), the indices of the samples, and learning_rate(step): of optimizer step `step`, from 0.
    """

    def __init__(self, config, num_samples: int):
        self.num_samples, self.batch, self.seed = num_samples, config.global_batch_size, config.seed
        self.steps_per_epoch = math.ceil(num_samples / self.batch)
        self.num_steps = config.max_train_steps or self.steps_per_epoch * config.num_train_epochs
        self.last_step = min(self.num_steps, config.stop_after_steps or self.num_steps)
        self.save_every = self.steps_per_epoch if config.checkpointing_steps == "epoch" else config.checkpointing_steps
        has_use = self.save_every < NEVER and not config.clean_checkpoints_at_end
        self.keeps_end, self.keeps_best = self.last_step < self.num_steps and has_use, config.keep_best is not None
        shape = self.num_steps, config.warmup_ratio
        self.learning_rate = learning_rate_schedule(config.lr_scheduler_type, config.learning_rate, *shape)

    def samples(self, step: int) -> list[int]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch
        return epoch_order(self.num_samples, self.seed, epoch)[start : start + self.batch].tolist()

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` steps, whatever else asks for one."""
        return step % self.save_every == 0 or (self.keeps_end and step == self.last_step)

    def warnings(self) -> list[str]:
        """Of a run that is never saved."""
        if self.save_every <= self.last_step or self.keeps_end or self.keeps_best:
            return []
        interval = f"--checkpointing_steps {self.save_every} is more than this run's {self.last_step} steps"
        return [f"warning: {interval}: no checkpoint will be written, and a crash loses everything"]
