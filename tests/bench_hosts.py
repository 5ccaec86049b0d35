"""Several hosts on paper: what of a step crosses the network, and how evenly many ranks' rows are packed.

    python tests/bench_hosts.py

By the planner's own formulas (`common/zero/plan.py`) for 8B on hosts of eight cards of 80 GB; and by the packing that
every run uses, on Tulu-like lengths (`bench`'s). Nothing is run but the packing.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import LlamaConfig

from common.config import SFTConfig
from common.step.packing import plan_step
from common.verbs import bench
from common.zero.ds_config import RESIDENCY
from common.zero.memory import shape_of
from common.zero.plan import Card, Workload, plan_run, seconds_per_token

PER_HOST, PER_RANK, LINKS = 8, 64, (100, 400, 3200)  # ranks; samples a step; Gb/s of a host
CARD = Card(79.5e9, 240e9, 45e9, 760e12, spans_hosts=True)


def table() -> None:
    config = LlamaConfig(**dict(zip(bench.SIZES, bench.SHAPES["llama-8b"], strict=True)))
    settings = json.loads((Path(__file__).parents[1] / "ds_configs/zero3.json").read_text())["zero_optimization"]
    shape, zero = shape_of(config, SFTConfig(), True), DeepSpeedZeroConfig(**settings)
    mean = bench.generated_lengths(10_000, 660, 4096, np.random.default_rng(0)).mean()
    workload = Workload(4096, mean * PER_RANK, 16384, False, "", ((mean * PER_RANK, 4096, 4096),))
    print("| hosts | whole | GB each way | s of a step | s at 100, 400, 3,200 Gb/s | tokens a step for 95% at these |")
    for hosts in (2, 4, 8, 16):
        plan = plan_run(shape, CARD, workload, hosts * PER_HOST, zero, RESIDENCY)
        crossing = plan.bytes_between_hosts(workload, hosts)
        seconds = [crossing * 8 / (link * 1e9) for link in LINKS]
        # Were nothing of it hidden: t seconds of network in at least 20 t.
        tokens = [19 * s / seconds_per_token(shape, CARD) * hosts * PER_HOST for s in seconds]
        step = workload.tokens_per_rank * seconds_per_token(shape, CARD)
        times, needed = (", ".join(f"{value:.2f}" for value in values) for values in (seconds, np.divide(tokens, 1e6)))
        print(f"| {hosts} | {plan.residency} | {crossing / 1e9:.1f} | {step:.1f} | {times} | {needed} million |")


def packed(num_ranks: int, budget: int = 8192, steps: int = 20) -> None:
    lengths = bench.generated_lengths(num_ranks * PER_RANK * steps, 660, 4096, np.random.default_rng(0)).tolist()
    used, spread, seconds = [], [], []
    for step in range(steps):
        own = lengths[step * num_ranks * PER_RANK :][: num_ranks * PER_RANK]
        began = time.perf_counter()
        plan = plan_step(own, num_ranks, budget)
        seconds.append(time.perf_counter() - began)
        rows = [[sum(own[i] for i in row) for row in rank] for rank in plan]
        longest = [max(rank[m] for rank in rows) for m in range(len(rows[0]))]  # all wait for the longest of each turn
        used.append(sum(own) / (num_ranks * sum(longest)))
        spread.append(max(map(sum, rows)) / min(map(sum, rows)) - 1)
    values = f"{np.median(used):.2%} | {np.median(spread):.2%} | {np.median(seconds):.3f}"
    print(f"| {num_ranks} | {len(plan[0])} | {values} |")


if __name__ == "__main__":
    table()
    print("| ranks | micro-batches | tokens / those of each turn's longest row | most / least of a rank | seconds |")
    for ranks in (8, 64, 128):
        packed(ranks)
