"""Packed against one sample at a time, the same samples side by side, on whatever machine this is.

    python tests/bench_packing.py

train_sft.py itself, on `bench`'s tiny shape and generated lengths, in turn: packed as it is; with every sample a
micro-batch of its own; and with every sample padded to the step's longest. Prints the medians over the steps of how
many times longer a step of the same samples takes.
"""

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import launch
import numpy as np

sys.path.insert(0, str(launch.REPO))
from common import bench, packing

ROUNDS, STEPS, WARMUP = 3, 8, 2


def one_at_a_time(lengths: list[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-len(order) // num_ranks)
    return [[order[m * num_ranks + rank : m * num_ranks + rank + 1] for m in range(count)] for rank in range(num_ranks)]


def pack_padded(longest: int, samples: list) -> packing.MicroBatch:
    """A second document without targets takes the place of padding."""
    length = sum(len(document.input_ids) for documents in samples for document in documents)
    nothing = np.zeros(0, np.int64)
    padding = packing.Document(np.zeros(longest - length, np.int32), longest - length, 0, nothing, nothing, [])
    return packing.pack([*samples, [padding]] if length < longest else samples)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bench.write_model("tiny", folder / "model")
        bench.write_data("sft", "tulu", 128, folder / "data.jsonl")
        longest = 4096 // bench.SCALE
        ways = {
            "packed": {},
            "one at a time": {"train_sft.plan_step": one_at_a_time},
            "one at a time, padded": {"train_sft.plan_step": one_at_a_time, "train_sft.pack": partial(pack_padded, longest)},
        }
        seconds = {way: [] for way in ways}
        for round_ in range(ROUNDS):
            for way, patches in ways.items():
                flags = {"model_name_or_path": folder / "model", "dataset_mixer": folder / "data.jsonl",
                         "dtype": "float32", "global_batch_size": 32, "max_train_steps": STEPS,
                         "output_dir": folder / f"{way}-{round_}", "cache_dir": folder / "cache"}  # fmt: skip
                run = launch.launch("train_sft", flags, 2, patches).succeeded()
                seconds[way].append(run.column("step_seconds")[WARMUP:])
        result = {}
        for way in ways:
            ratios = [other / packed for theirs, ours in zip(seconds[way], seconds["packed"], strict=True)
                      for other, packed in zip(theirs, ours, strict=True)]  # fmt: skip
            result[way] = statistics.median(ratios)
            typical = statistics.median(value for steps in seconds[way] for value in steps)
            print(f"{way:24} {typical:.3f} s a step, {result[way]:.2f} x the time packed takes")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
