"""Pairs a second with and without shared prompts, side by side, on real or generated preferences.

    python tests/bench_shared_prompts.py [PREFERENCES.jsonl]

Trains a small model with train_dpo.py, once each way, in turn, three times; prints the medians, the median ratio of
steps of the same pairs, and what the tokens say: 2 (p + c) / (p + 2 c) for prompts of p and answers of c tokens.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import launch
import models

SHARED = launch.REPO.parent / "shared/data/preferences.jsonl"
ROUNDS, STEPS, WARMUP, PAIRS = 3, 6, 1, 4


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
        if not data.is_file():
            data = models.write_jsonl(folder / "preferences.jsonl", models.preferences(200))
        model = models.make_model(folder / "model", hidden_size=128, intermediate_size=256)
        speeds, tokens = {True: [], False: []}, {}
        for _ in range(ROUNDS):
            for share in (True, False):
                own = {"max_seq_length": 1024, "global_batch_size": PAIRS, "max_train_steps": STEPS, "resume": "never"}
                own |= {"max_tokens_per_micro_batch": 2048, "share_prompt": share, "output_dir": folder / str(share)}
                records = launch.launch("train_dpo", launch.flags(model, data, folder, **own)).succeeded().metrics
                tokens[share] = records[-1]["total_tokens"]
                speeds[share].append([record["step_seconds"] for record in records[WARMUP:]])
    seconds = {share: [s for steps in speeds[share] for s in steps] for share in speeds}
    ratio = statistics.median(whole / shared for shared, whole in zip(seconds[True], seconds[False], strict=True))
    shared, whole = (PAIRS / statistics.median(seconds[share]) for share in (True, False))
    print(
        f"{data}: {shared:.2f} pairs/s shared, {whole:.2f} pairs/s whole; a step of the same pairs: {ratio:.2f}x; "
        f"tokens {tokens[True]:,} and {tokens[False]:,}: {tokens[False] / tokens[True]:.2f}x"
    )


if __name__ == "__main__":
    main()
