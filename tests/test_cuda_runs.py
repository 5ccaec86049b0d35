"""Both scripts on two GPUs, through NCCL: pytest -m cuda tests/test_cuda_runs.py"""

import json

import launch
import models
import pytest
import reference
import torch
from test_train import PLAIN

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")]


def start(method: str, flags: dict, num_ranks: int) -> launch.Run:
    arguments = (f"train_{method}", launch.argv(flags), {})
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
