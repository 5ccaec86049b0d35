"""What a run is expected to take, and that beside what it took."""

import math

import numpy as np
from transformers import PretrainedConfig

from common.ranks import Ranks
from common.run.metrics import device_peak_flops, flops_per_token
from common.step.schedule import Schedule
from common.zero.plan import Plan, Shape, Workload, seconds_per_token


def tokens_of(schedule: Schedule, lengths: np.ndarray) -> int:
    """Tokens of all steps of a run; lengths: int, of each of its samples (pairs), or of a draw of them."""
    taken = [schedule.samples(step) for step in range(schedule.last_step)]
    if len(lengths) < schedule.num_samples:
        return round(sum(map(len, taken)) * float(lengths.mean()))
    return sum(int(lengths[samples].sum()) for samples in taken)


def flops_of(shape: Shape, config: PretrainedConfig, lengths: np.ndarray) -> float:
    """FLOPs for each token, as metrics.jsonl's mfu counts them."""
    embedding = 0 if config.tie_word_embeddings else shape.vocab * shape.hidden
    mean_length = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    return flops_per_token(shape.num_met - embedding, config.get_text_config(), mean_length)


def forecast(
    plan: Plan,
    workload: Workload,
    schedule: Schedule,
    lengths: np.ndarray,
    config: PretrainedConfig,
    ranks: Ranks,
    peak_flops: float | None = None,
) -> dict:
    """`tokens` of the run; and `mfu`, `hours` of its steps and `memory_gb` where the peak of the device is known.

    peak_flops: FLOP/s of a rank's device, if it is not here.
    """
    peak_flops = peak_flops or device_peak_flops(ranks.device)
    planned: dict[str, float] = {"tokens": tokens_of(schedule, lengths)}
    if peak_flops and math.isfinite(plan.cost):
        seconds = plan.cost * seconds_per_token(plan.shape, plan.card)  # of a step
        tokens_per_second = workload.tokens_per_rank / seconds  # of a rank
        largest = max(plan.budget, workload.longest)
        activations = plan.memory.activations(largest, plan.shape.layers - plan.recomputing)
        planned["mfu"] = tokens_per_second * flops_of(plan.shape, config, lengths) / peak_flops
        planned["hours"] = planned["tokens"] / ranks.world_size / tokens_per_second / 3600
        planned["memory_gb"] = (plan.memory.fixed + activations) / 1e9
    return planned


def beside(planned: dict, records: list[dict]) -> str:
    """A line: what was planned, and what came by the records of metrics.jsonl."""
    last = records[-1]
    came = {"tokens": last["total_tokens"], "memory_gb": max(record["max_memory_gb"] for record in records)}
    came["hours"] = float(np.mean([record["step_seconds"] for record in records])) * last["step"] / 3600
    came["mfu"] = float(np.median([record.get("mfu", 0) for record in records]))
    written = {
        "tokens": "{:,} tokens",
        "hours": "{:,.3g} hours of steps",
        "memory_gb": "{:.1f} GB",
        "mfu": "{:.1%} MFU",
    }
    both = [
        f"{text.format(planned[name])} ({text.format(came[name])})" for name, text in written.items() if name in planned
    ]
    return f"planned (came): {', '.join(both)}"
