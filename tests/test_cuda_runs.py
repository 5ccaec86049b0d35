"""Both scripts on two GPUs, through NCCL: pytest -m cuda tests/test_cuda_runs.py"""

import json
import os
import signal
import time

import launch
import models
import pytest
import reference
import torch
from test_train import PLAIN

from common.zero.engine import set_learning_rate

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]


def start(method: str, flags: dict, num_ranks: int, patches: dict | None = None) -> launch.Run:
    arguments = (f"train_{method}", launch.argv(flags), patches or {})
    return launch.Run(launch.run_script, num_ranks, arguments, flags["output_dir"], on_gpu=True)


def assert_is_plain(metrics: list[dict], records: list[dict]) -> None:
    """On a GPU products of float32 are added in another order than on the CPU, where the plain loop runs."""
    for seen, expected in zip(metrics, records, strict=True):
        for column in {"step", "samples", "target_tokens", "train_loss", "grad_norm", "learning_rate"} & {*expected}:
            assert seen[column] == pytest.approx(expected[column], rel=2e-4), (column, expected["step"])


@pytest.mark.parametrize("name", ["sft", "dpo_norm"])
def test_killed_and_resumed_on_two_gpus_then_on_one_each_time_the_plain_loop(tmp_path, name):
    method, architecture, longest, num_steps, settings = PLAIN[name]
    model = models.make_model(tmp_path / "model", architecture)
    rows = {"sft": models.conversations, "dpo": models.preferences}[method](10)
    tokenizer = reference.load_tokenizer(model)
    if method == "dpo":
        samples = [reference.pair_tokens(tokenizer, row, longest) for row in rows]
    else:
        samples = [reference.conversation_tokens(tokenizer, row["messages"], longest) for row in rows]
    records = getattr(reference, f"train_{method}")(reference.load(model), samples, num_steps=num_steps, **settings)

    changes = {"max_seq_length": longest, "max_train_steps": num_steps}
    changes |= {"checkpointing_steps": 1, "keep_last_n_checkpoints": 9}
    data = models.write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = launch.flags(model, data, tmp_path, **changes, **settings, compile_layers="false")
    run = start(method, flags, 2)
    assert run.wait_until(lambda: "/step_00000001\n" in run.output())
    run.kill()
    killed = run.wait()
    assert "done: " not in killed.stdout
    done = start(method, flags, 2).wait().succeeded()
    assert "resuming after step" in done.stdout
    assert_is_plain(done.metrics, records)

    path = done.output_dir / "checkpoints" / "step_00000001"
    placement = json.loads((launch.REPO / "ds_configs/zero3.json").read_text()) | {"optimizer_state": "host"}
    (tmp_path / "host.json").write_text(json.dumps(placement))
    on_one = start(method, flags | {"resume": path, "ds_config": tmp_path / "host.json"}, 1).wait().succeeded()
    assert "resuming after step 1" in on_one.stdout and "0% of the optimizer's state on the device" in on_one.stdout
    assert_is_plain(on_one.metrics, records)


def sleeps_in_step_three(engine, learning_rate: float) -> None:
    engine.steps_begun = getattr(engine, "steps_begun", 0) + 1
    set_learning_rate(engine, learning_rate)
    if engine.steps_begun == 3 and os.environ["RANK"] == "1":
        time.sleep(600)


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_rank_that_does_not_come_to_a_collective_ends_all_within_the_limit(tmp_path, how):
    """Whether its process is stopped, or its threads go on saying that it is there: exit 1, it and its step named."""
    model = models.make_model(tmp_path / "model", "llama")
    data = models.write_jsonl(tmp_path / "rows.jsonl", models.conversations(10))
    flags = launch.flags(model, data, tmp_path, global_batch_size=2, num_train_epochs=500, compile_layers="false")
    flags |= {"collective_timeout_minutes": 1, "checkpointing_steps": 10_000}
    patches = {"common.ranks.PATIENCE": 0.25}  # of a minute
    patches |= {"train_sft.set_learning_rate": sleeps_in_step_three} if how == "busy" else {}
    run = start("sft", flags, 2, patches)
    assert run.wait_until(lambda: "\nstep 2/" in run.output())
    if how == "stopped":
        os.kill(run.processes[1].pid, signal.SIGSTOP)
    since = time.monotonic()
    run.processes[0].join(40)
    assert time.monotonic() - since < 30
    run.kill()
    ended = run.wait()
    assert ended.exit_codes[0] == 1, ended
    seen = "in step 3" if how == "busy" else ""  # a rank that is stopped may not have said where it is
    assert f"rank 1 was last seen {seen}" in ended.stderr, ended
