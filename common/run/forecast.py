"""What a run is expected to take, and that beside what it took."""

import math

import numpy as np

from common.config import DPOConfig
from common.run.metrics import device_peak_flops, flops_per_token
from common.step.losses import preference_loss
from common.step.schedule import Schedule
from common.zero.plan import Plan, Workload


def tokens_of(schedule: Schedule, lengths: np.ndarray) -> int:
    """Tokens of all steps of a run; lengths: int, of each of its samples (pairs), or of a draw of them."""
    num_epochs = schedule.last_step // schedule.steps_per_epoch
    rest = range(num_epochs * schedule.steps_per_epoch, schedule.last_step)
    taken = np.array([i for step in rest for i in schedule.samples(step)], int)
    if len(lengths) < schedule.num_samples:
        return round((num_epochs * schedule.num_samples + len(taken)) * float(lengths.mean()))
    return num_epochs * int(lengths.sum()) + int(lengths[taken].sum())


def forecast(
    plan: Plan, workload: Workload, schedule: Schedule, lengths, model_config, config, ranks, peak_flops=None, mfu=None
) -> dict:
    """`tokens` of the run; where the peak of the device is known also `mfu`, `hours` of its steps, `reference_hours` of
    DPO's pass over its pairs if no cache has it, `memory_gb` of a rank, and `cost` at --gpu_hour_price.

    lengths: int [samples or pairs]. peak_flops: FLOP/s of a rank's device, if it is not here. mfu: None for what the
    plan predicts.
    """
    peak_flops = peak_flops or device_peak_flops(ranks.device)
    planned: dict[str, float] = {"tokens": tokens_of(schedule, lengths)}
    if not peak_flops or not math.isfinite(plan.cost):
        return planned
    embedding = 0 if model_config.tie_word_embeddings else plan.shape.vocab * plan.shape.hidden
    mean_length = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    flops = flops_per_token(plan.shape.num_met - embedding, model_config.get_text_config(), mean_length)  # of a token
    planned["mfu"] = mfu or workload.tokens_per_rank / plan.step_seconds() * flops / peak_flops
    tokens_per_hour = planned["mfu"] * peak_flops / flops * ranks.world_size * 3600
    planned["hours"] = planned["tokens"] / tokens_per_hour
    if isinstance(config, DPOConfig) and preference_loss(config).needs_reference:
        num_pairs = min(schedule.num_samples, schedule.last_step * schedule.batch)
        planned["reference_hours"] = float(lengths.mean()) * num_pairs / tokens_per_hour / 3  # a forward pass alone
    planned["memory_gb"] = sum(plan.parts(max(plan.budget, workload.longest)).values()) / 1e9
    if config.gpu_hour_price is not None:
        hours = planned["hours"] + planned.get("reference_hours", 0.0)
        planned["cost"] = hours * ranks.world_size * config.gpu_hour_price
    return planned


def beside(planned: dict, records: list[dict]) -> str:
    """A line: what was planned, and what came by the records of metrics.jsonl."""
    last = records[-1]
    came = {"tokens": last["total_tokens"], "memory_gb": max(record["max_memory_gb"] for record in records)}
    came["hours"] = float(np.mean([record["step_seconds"] for record in records])) * last["step"] / 3600
    came["mfu"] = float(np.median([record.get("mfu", 0) for record in records]))
    came["cost"] = planned.get("cost", 0.0) * came["hours"] / planned.get("hours", 1.0)
    forms = {"tokens": "{:,} tokens", "hours": "{:,.3g} hours of steps", "memory_gb": "{:.1f} GB", "mfu": "{:.1%} MFU"}
    forms["cost"] = "{:,.2f} for the GPUs"
    both = [f"{form.format(planned[k])} ({form.format(came[k])})" for k, form in forms.items() if k in planned]
    return f"planned (came): {', '.join(both)}"
