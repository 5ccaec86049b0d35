"""`run.sh bench` measures the training scripts and leaves nothing running: pytest tests/test_bench.py"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest

from common.verbs import bench
from common.verbs.bench import WARMUP_STEPS, generated_lengths

ENVIRONMENT = os.environ | launch.CPU_ENVIRONMENT | {"PYTHONPATH": str(launch.REPO)}
BENCH = [sys.executable, "-m", "common.verbs", "bench"]


def run_bench(folder, *words: str) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": launch.TIMEOUT}
    return subprocess.run([*BENCH, *words], cwd=folder, env=ENVIRONMENT, **options)


def processes_in(folder: Path) -> list[int]:
    """Living processes whose working directory is the folder."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                pids.append(int(process.name))
    return pids


@pytest.mark.parametrize("method", [pytest.param("sft", marks=pytest.mark.soak), "dpo"])
def test_a_benchmark_of_the_scripts_own_steps(tmp_path, method):
    flags = ["--learning_rate", "1e-3", "--max_tokens_per_micro_batch", "1024"]
    flags += ["--global_batch_size", "77"] if method == "sft" else []  # the fifth step takes what is left of the epoch
    done = run_bench(tmp_path, method, "2", "--steps", "2", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "output" / "bench" / f"bench-{method}-tiny.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "output" / "bench" / f"run-{method}" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == list(range(1, WARMUP_STEPS + 3))
    speeds = [record["per_device_tps"] for record in records[WARMUP_STEPS:]]
    assert result["per_device_tps"] == pytest.approx(sum(speeds) / 2)
    assert (result["method"], result["ranks"], result["steps"], result["recompiles"]) == (method, 2, 2, 0)
    samples = (12 * 32 - 4 * 77, 77) if method == "sft" else (32, 32)  # of the two steps
    rates = [n / record["step_seconds"] for n, record in zip(samples, records[WARMUP_STEPS:], strict=True)]
    assert result["samples_per_second"] == pytest.approx(np.mean(rates))
    assert result["flags"] == flags and records[0]["learning_rate"] <= 1e-3
    assert (result["reference_tokens_per_second_per_device"] is not None) == (method == "dpo")
    assert not processes_in(tmp_path), "no rank outlives its benchmark"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_a_benchmark_that_is_stopped_stops_its_ranks(tmp_path, number):
    command = [*BENCH, "sft", "2", "--steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        process.send_signal(number)
        assert process.wait(30) == (-9 if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 30
    while (left := processes_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize("graphs, exit_code", [([3, 3, 3, 3, 5], 1), ([1, 2, 3, 3, 3, 3], 0), ([None] * 5, 0)])
def test_a_graph_compiled_after_warm_up_fails_the_benchmark(monkeypatch, tmp_path, graphs, exit_code):
    def train(words, last_step):
        record = {"samples": 1, "total_tokens": 9, "step_seconds": 1.0, "max_memory_gb": 1.0}
        records = [record | ({} if n is None else {"compiled_graphs": n}) for n in graphs]
        (tmp_path / "output/bench/run-sft").mkdir()
        (tmp_path / "output/bench/run-sft/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.chdir(tmp_path)
    bench.write_model("tiny", tmp_path / "output/bench/tiny")
    assert bench.main("sft", "--shape", "tiny", "--steps", str(len(graphs) - WARMUP_STEPS)) == exit_code


def test_a_run_that_fails_fails_the_benchmark_with_its_exit_code(tmp_path):
    done = run_bench(tmp_path, "sft", "1", "--steps", "2", "--ds_config", "nowhere.json")
    assert done.returncode == 2 and "nowhere.json" in done.stdout
    assert not list((tmp_path / "output" / "bench").glob("*.json"))
    assert run_bench(tmp_path, "sft", "1", "--steps", "0").returncode == 2


def test_lengths_have_the_mean_and_the_cap_that_are_asked_for():
    lengths = generated_lengths(20_000, 660, 4096, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(660, rel=0.01) and lengths.max() == 4096 and lengths.min() >= 8
    assert (generated_lengths(5, None, 512, np.random.default_rng(0)) == 512).all()
