"""Packed against one sample at a time, the same samples side by side, on whatever machine this is.

    python tests/bench_packing.py [sft|dpo]

The script itself, on `bench`'s tiny shape and generated lengths, in turn. SFT: packed as it is; with every sample a
micro-batch of its own; and with every sample padded to the step's longest. DPO: with prompts shared, and without.
Prints the median over the steps of the tokens a second that the first way has to take, and of how many times longer a
step of the same samples takes. A regression of packing shows in the ratios, whatever the machine.
"""

import sys
import tempfile
from pathlib import Path

import launch
import numpy as np

sys.path.insert(0, str(launch.REPO))
from common.step import packing
from common.verbs import bench

ROUNDS, STEPS, WARMUP = 3, 8, 2


def one_at_a_time(lengths: list[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-len(order) // num_ranks)
    return [[order[m * num_ranks + rank : m * num_ranks + rank + 1] for m in range(count)] for rank in range(num_ranks)]


def one_at_a_time_noting_the_longest(lengths: list[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    pack_padded.longest = max(lengths)
    return one_at_a_time(lengths, num_ranks, budget)


def pack_padded(samples: list) -> packing.MicroBatch:
    """A second document without targets takes the place of padding."""
    longest = pack_padded.longest  # of the step that is packed now, planned just before in the same thread
    length = sum(len(document.input_ids) for documents in samples for document in documents)
    nothing = np.zeros(0, np.int64)
    padding = packing.Document(np.zeros(longest - length, np.int32), longest - length, 0, nothing, nothing, [])
    return packing.pack([*samples, [padding]] if length < longest else samples)


PADDED = {"train_sft.plan_step": one_at_a_time_noting_the_longest, "train_sft.pack": pack_padded}
ALONE = {"train_sft.plan_step": one_at_a_time}
WAYS: dict[str, dict[str, tuple[dict, dict]]] = {  # method -> way -> (flags, patches)
    "sft": {"packed": ({}, {}), "one at a time": ({}, ALONE), "one at a time, padded": ({}, PADDED)},
    "dpo": {"prompts shared": ({}, {}), "prompts not shared": ({"share_prompt": False}, {})},
}


def main(method: str = "sft") -> None:
    ways = WAYS[method]
    first = next(iter(ways))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bench.write_model("tiny", folder / "model")
        bench.write_data(method, "tulu", 128, folder / "data.jsonl")
        seconds, tokens = {way: [] for way in ways}, []  # of each step after warm-up, round after round
        for i in range(ROUNDS):
            for way, (changes, patches) in ways.items():
                own = {"max_seq_length": 4096, "global_batch_size": 32, "max_train_steps": STEPS}
                own |= {"output_dir": folder / f"{way}-{i}", **changes}
                flags = launch.flags(folder / "model", folder / "data.jsonl", folder, **own)
                run = launch.launch(f"train_{method}", flags, 2, patches).succeeded()
                seconds[way] += run.column("step_seconds")[WARMUP:]
                if way == first:
                    tokens += [*np.diff(run.column("total_tokens")[WARMUP - 1 :])]
    for way in ways:
        ratio = np.median(np.divide(seconds[way], seconds[first]))
        speed = np.median(np.divide(tokens, seconds[way]))
        print(f"{way:24} {speed:8,.0f} tokens/s, a step takes {ratio:.2f} x the first one's time")


if __name__ == "__main__":
    main(*sys.argv[1:])
