"""What a checkpoint costs a training run, and what a resume costs beside the disk's own rate, measured in turns.

    python tests/bench_checkpoint.py [FOLDER] [--gigabytes 2] [--rounds 5]

One rank, a model of random weights and its moments on whatever device there is. Each round measures:
  blocked   seconds until training may go on, as a share of the whole write
  beside    steps (products of matrices) a second beside the write / without it
  write     bytes a second against those of one file of the same size, written and flushed
  resume    seconds of verifying and loading / seconds of `dd` for the same files; the page cache is told to drop them
Neighbours make a disk's rate swing: what is shown last are medians over rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import OneRank

from common.config import SFTConfig
from common.zero import checkpoint, residency
from common.zero.host_state import Shard

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


def steps_a_second(matrix: torch.Tensor, is_over) -> float:
    """Products of matrices a second, as long as is_over() is false; on one thread, for a GPU's leave the processor
    alone, while a checkpoint is copied by as many as in a run."""
    threads, count, started = torch.get_num_threads(), 0, time.perf_counter()
    torch.set_num_threads(1)
    while not is_over():
        (matrix @ matrix)[0, 0].item()
        count += 1
    torch.set_num_threads(threads)
    return count / (time.perf_counter() - started)


def without_cache(files: list[Path]) -> None:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def dd(files: list[Path]) -> float:
    started = time.perf_counter()
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M"], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    arguments.add_argument("--gigabytes", type=float, default=2)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = max(1, round(given.gigabytes * 1e9 / (12 * HIDDEN * HIDDEN)))
    parameters = {f"layer_{i}.weight": Parameter(device) for i in range(count)}
    num_bytes = 12 * HIDDEN * HIDDEN * count
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=given.folder))
    (folder / "checkpoints").mkdir()
    residency.state_shards = lambda engine: {p: Shard(p.local["master"], **p.local) for p in parameters.values()}
    residency.set_step = residency.round_master_weights = lambda *_: None
    ranks = OneRank()
    ranks.device = device
    config = SFTConfig(output_dir=str(folder), keep_last_n_checkpoints=1)
    writer = checkpoint.Writer(None, parameters, config, ranks)
    writer.memory.wait_until_pinned()  # which in a run is done long before a first checkpoint
    on_gpu = {"device": device, "dtype": torch.bfloat16}
    matrix = torch.randn(8192, 8192, **on_gpu) if device.type == "cuda" else torch.ones(512, 512)
    rows: dict[str, list[float]] = {name: [] for name in ("seconds_blocked", "blocked", "beside", "write", "resume")}
    try:
        for i in range(given.rounds):
            end = time.perf_counter() + 10  # by then what lies below a virtual disk has come to rest
            alone = steps_a_second(matrix, lambda: time.perf_counter() > end)
            os.sync()
            started = time.perf_counter()
            writer.save(checkpoint.RunState(step=i + 1))
            blocked = time.perf_counter() - started
            beside = steps_a_second(matrix, lambda: writer.proceed(writer.vote()) or writer.stage is None)
            written = time.perf_counter() - started
            disk = sequential_write(folder / "one_file", num_bytes)
            files = sorted(writer.path.glob("*.safetensors"))
            seconds = {}
            for what in ("dd", "load")[:: 1 if i % 2 else -1]:
                without_cache(files)
                started = time.perf_counter()
                if what == "dd":
                    dd(files)
                else:
                    state = checkpoint.RunState(step=i + 1)
                    checkpoint.load(None, parameters, writer.path, state, "auto", ranks)
                seconds[what] = time.perf_counter() - started
            measured = (blocked, blocked / written, beside / alone, disk / written, seconds["load"] / seconds["dd"])
            for values, value in zip(rows.values(), measured, strict=True):
                values.append(value)
            shown = ", ".join(f"{name} {values[-1]:.3f}" for name, values in rows.items())
            print(f"round {i + 1}: {shown}; written in {written:.2f} s, dd {seconds['dd']:.2f} s")
    finally:
        shutil.rmtree(folder)
    medians = {name: round(statistics.median(values), 4) for name, values in rows.items()}
    print(json.dumps({"gigabytes": num_bytes / 1e9, "device": device.type, **medians}))


if __name__ == "__main__":
    main()
