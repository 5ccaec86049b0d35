"""How long a save blocks training, and its bytes/s against the disk's own sequential rate, measured in turns.

    python tests/bench_checkpoint.py [FOLDER] [--gigabytes 2] [--rounds 5]

One rank, a model of random weights and its moments on whatever device there is. The disk's own rate is that of one
file of the same size, written in blocks of 16 MB and flushed, like `dd conv=fsync`. Neighbours make a
disk's rate swing: the ratio is the median over rounds, each of which measures both, in changing order.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import OneRank

from common.zero import checkpoint

HIDDEN = 2048


class Parameter:
    """A whole partition of HIDDEN x HIDDEN elements with its moments."""

    def __init__(self, device):
        self.ds_shape, self.ds_numel = torch.Size((HIDDEN, HIDDEN)), HIDDEN * HIDDEN
        self.local = {kind: torch.randn(self.ds_numel, device=device) for kind in checkpoint.KINDS}


def sequential_write(path: Path, num_bytes: int) -> float:
    """Seconds to write and flush num_bytes."""
    block = os.urandom(16 * 2**20)  # a virtual disk may leave zeros out
    os.sync()
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def save(parameters: dict, folder: Path, step: int) -> float:
    """Seconds that training would have been blocked; deleting the checkpoint before is part of it."""
    os.sync()
    started = time.perf_counter()
    checkpoint.save(parameters, checkpoint.RunState(step=step), str(folder), 1, OneRank())
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    arguments.add_argument("--gigabytes", type=float, default=2)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(1, round(given.gigabytes * 1e9 / (12 * HIDDEN * HIDDEN)))
    parameters = {f"layer_{i}.weight": Parameter(device) for i in range(count)}
    num_bytes = 12 * HIDDEN * HIDDEN * count
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=given.folder))
    (folder / "checkpoints").mkdir()
    rows = []
    checkpoint.safe_get_local_fp32_param = lambda p: p.local["master"]
    checkpoint.safe_get_local_optimizer_state = lambda p, kind: p.local[kind]
    try:
        for i in range(given.rounds):
            measures = [("save", lambda: save(parameters, folder, i + 1))]
            measures += [("disk", lambda: sequential_write(folder / "one_file", num_bytes))]
            seconds = {what: measure() for what, measure in measures[:: 1 if i % 2 else -1]}
            rows.append((seconds["save"], seconds["disk"]))
            print(f"round {i + 1}: blocked {rows[-1][0]:.2f} s; ratio to the disk {rows[-1][1] / rows[-1][0]:.0%}")
    finally:
        shutil.rmtree(folder)
    blocked, ratio = statistics.median(s for s, _ in rows), statistics.median(d / s for s, d in rows)
    result = {"gigabytes": num_bytes / 1e9, "device": device, "seconds_blocked": blocked, "ratio_to_disk": ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
