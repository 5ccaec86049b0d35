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

from common.failures import UserError
from common.verbs import bench
from common.verbs.bench import WARMUP_STEPS, generated_lengths, num_recompiled

ENVIRONMENT = os.environ | launch.CPU_ENVIRONMENT | {"PYTHONPATH": str(launch.REPO)}
BENCH = [sys.executable, "-m", "common.verbs.bench"]


def run_bench(folder, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*BENCH, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=launch.TIMEOUT
    )


def processes_in(folder: Path) -> list[int]:
    """Living processes whose working directory is the folder."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                pids.append(int(process.name))
    return pids


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_benchmark_of_the_scripts_own_steps(tmp_path, method):
    flags = ["--learning_rate", "1e-3", "--max_tokens_per_micro_batch", "1024"]
    flags += ["--global_batch_size", "77"] if method == "sft" else []  # the fifth step takes what is left of the epoch
    done = run_bench(tmp_path, method, "2", "--steps", "2", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "output" / "bench" / f"bench-{method}-tiny.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "output" / "bench" / f"run-{method}" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == list(range(1, WARMUP_STEPS + 3))
    speeds = [record["per_device_tps"] for record in records[WARMUP_STEPS:]]
    assert result["tokens_per_second_per_device"] == pytest.approx(sum(speeds) / 2)
    assert (result["method"], result["ranks"], result["steps"], result["recompiles"]) == (method, 2, 2, None)
    samples = (12 * 32 - 4 * 77, 77) if method == "sft" else (32, 32)  # of the two steps
    assert result["samples_per_second"] == pytest.approx(
        np.mean([n / record["step_seconds"] for n, record in zip(samples, records[WARMUP_STEPS:], strict=True)])
    )
    assert result["flags"] == flags and records[0]["learning_rate"] <= 1e-3
    assert (result["reference_tokens_per_second_per_device"] is not None) == (method == "dpo")
    assert not processes_in(tmp_path), "no rank outlives its benchmark"


def test_a_run_that_fails_fails_the_benchmark(tmp_path):
    done = run_bench(tmp_path, "sft", "1", "--steps", "2", "--learning_rte", "1e-3")
    assert done.returncode == 2 and "did you mean --learning_rate?" in done.stdout
    assert not list((tmp_path / "output" / "bench").glob("*.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "bench"),
        ("sft --shape huge", "--shape"),
        ("sft --lengths long", "--lengths"),
        ("sft --steps x", "--steps"),
        ("sft --steps=0", "--steps 0"),
        ("sft --steps", "--steps"),
        ("sft 0", "N = 0"),
        ("sft --logging_steps 5", "--logging_steps"),
        ("sft --output-dir=x", "--output-dir"),
        ("dpo --max_train_steps 5", "--max_train_steps"),
        ("dpo --config x.yaml", "--config"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(monkeypatch, tmp_path, words, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        bench.main(*words.split())
    assert named in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_2(tmp_path):
    done = run_bench(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def test_help_names_the_shapes(capsys):
    assert bench.main("--help") == 0
    help = capsys.readouterr().out
    assert "llama-8b-half" in help and "--lengths tulu|full" in help


@pytest.mark.parametrize(("graphs", "recompiled"), [([3, 3, 3, 3, 5], 2), ([3, 3, 3, 3, 3, 3], 0), ([None] * 5, None)])
def test_what_the_first_measured_step_compiles_counts(graphs, recompiled):
    assert num_recompiled([{} if n is None else {"compiled_graphs": n} for n in graphs]) == recompiled


def test_lengths_have_the_mean_and_the_cap_that_are_asked_for():
    lengths = generated_lengths(20_000, 660, 4096, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(660, rel=0.01) and lengths.max() == 4096 and lengths.min() >= 8
    assert (generated_lengths(5, None, 512, np.random.default_rng(0)) == 512).all()
