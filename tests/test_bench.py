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

import common.verbs.bench
from common.failures import UserError
from common.verbs.bench import WARMUP_STEPS, Options, generated_lengths, num_recompiled


def bench(folder, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | launch.CPU_ENVIRONMENT | {"PYTHONPATH": str(launch.REPO)}
    command = [sys.executable, "-m", "common.verbs.bench", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=launch.TIMEOUT)


def ranks_of(folder: Path) -> list[int]:
    """Living processes whose working directory is the folder."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd") == str(folder):
                pids.append(int(process.name))
    return pids


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_benchmark_of_the_scripts_own_steps(tmp_path, method):
    batch = ["--global_batch_size", "500"] if method == "sft" else []  # more than there are: 12 x 32 conversations
    done = bench(tmp_path, method, "2", "--steps", "2", "--learning_rate", "1e-3", *batch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "output" / "bench" / f"bench-{method}-tiny.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "output" / "bench" / f"run-{method}" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == list(range(1, WARMUP_STEPS + 3))
    speeds = [record["per_device_tps"] for record in records[WARMUP_STEPS:]]
    assert result["tokens_per_second_per_device"] == pytest.approx(sum(speeds) / 2)
    assert (result["method"], result["ranks"], result["steps"], result["recompiles"]) == (method, 2, 2, None)
    samples = 12 * 32 if method == "sft" else 32  # of a step
    assert result["samples_per_second"] == pytest.approx(
        np.mean([samples / r["step_seconds"] for r in records[WARMUP_STEPS:]])
    )
    assert result["flags"] == ["--learning_rate", "1e-3", *batch] and records[0]["learning_rate"] <= 1e-3
    assert (result["reference_tokens_per_second_per_device"] is not None) == (method == "dpo")
    assert not list((tmp_path / "output" / "bench" / f"run-{method}").glob("*.safetensors")), "nothing is exported"
    assert not ranks_of(tmp_path), "no rank outlives its benchmark"


def test_a_run_that_fails_fails_the_benchmark(tmp_path):
    done = bench(tmp_path, "sft", "1", "--steps", "2", "--learning_rte", "1e-3")
    assert done.returncode == 2 and "did you mean --learning_rate?" in done.stderr
    assert not list((tmp_path / "output" / "bench").glob("*.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_stopped_stops_its_ranks(tmp_path, number):
    environment = os.environ | launch.CPU_ENVIRONMENT | {"PYTHONPATH": str(launch.REPO)}
    command = [sys.executable, "-m", "common.verbs.bench", "sft", "2", "--steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("step 2/"))
        process.send_signal(number)
        assert process.wait(30) != 0
    for _ in range(50):
        if not (left := ranks_of(tmp_path)):
            break
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "bench sft|dpo"),
        (("sft", "--shape", "huge"), "--shape: invalid choice: 'huge'"),
        (("sft", "--lengths", "long"), "--lengths: invalid choice: 'long'"),
        (("sft", "--steps", "x"), "--steps: invalid int value: 'x'"),
        (("sft", "--steps", "-1"), "--steps -1"),
        (("sft", "--steps=0"), "--steps 0"),
        (("sft", "--steps"), "--steps: expected one argument"),
        (("sft", "0"), "bench sft 0"),
        (("sft", "--logging_steps", "5"), "--logging_steps: the benchmark sets"),
        (("sft", "--output-dir=x"), "--output-dir=x: the benchmark sets"),
        (("dpo", "--max_train_steps", "5"), "--max_train_steps: the benchmark sets"),
        (("dpo", "--stop_after_steps", "5"), "--stop_after_steps: the benchmark sets"),
        (("dpo", "--config", "x.yaml"), "--config: name the flags"),
    ],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, words, named):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        common.verbs.bench.main()
    assert named in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_2(tmp_path):
    done = bench(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


def test_the_visible_devices_are_heeded(tmp_path, monkeypatch):
    """By a Python that finds four GPUs and then only says how it is called."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *device_count*) echo 4;; *getsockname*) echo 5;; '
        '*) pwd; echo "$PYTHONSAFEPATH $@";; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    done = subprocess.run(
        common.verbs.bench.train_command("sft", 2, ["--beta", "1 2"]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"},
    )
    assert (
        done.stdout == f"{tmp_path}\n1 -m deepspeed.launcher.runner --quiet --include localhost:4,5 --master_port 5 "
        f"{launch.REPO}/train_sft.py --beta 1 2\n"
    )


def test_own_flags_are_taken_as_the_scripts_take_theirs():
    words = ["--steps=2", "--profile", "--beta", "3", "--shape", "llama-3b", "--seed=1", "--learning_rate", "-1e-5"]
    options, passed = Options().parse_known_args(words)
    assert passed == ["--beta", "3", "--seed=1", "--learning_rate", "-1e-5"]
    assert vars(options) == {"shape": "llama-3b", "steps": 2, "lengths": "tulu", "profile": True}


def test_help_names_the_shapes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    common.verbs.bench.main()
    help = capsys.readouterr().out
    assert "llama-8b-half" in help and "--lengths tulu|full" in help


@pytest.mark.parametrize(("graphs", "recompiled"), [([3, 3, 3, 3, 5], 2), ([3, 3, 3, 3, 3, 3], 0), ([None] * 5, None)])
def test_what_the_first_measured_step_compiles_counts(graphs, recompiled):
    assert num_recompiled([{} if n is None else {"compiled_graphs": n} for n in graphs]) == recompiled


def test_lengths_have_the_mean_and_the_cap_that_are_asked_for():
    lengths = generated_lengths(20_000, 660, 4096, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(660, rel=0.01) and lengths.max() == 4096 and lengths.min() >= 8
    assert (generated_lengths(5, None, 512, np.random.default_rng(0)) == 512).all()
