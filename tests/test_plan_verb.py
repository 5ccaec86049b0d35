"""bash run.sh plan: what it says is what a run does, what the planner chooses, and what it would refuse.

pytest tests/test_plan_verb.py
"""

import json
import re
import shutil
from types import SimpleNamespace

import launch
import models
import numpy as np
import pytest
import test_memory
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import SFTConfig
from common.data.chat_template import TULU
from common.failures import UserError
from common.run import disk, plan_table
from common.run.forecast import beside, tokens_of
from common.run.plan_table import CARDS, WIDTH, Machine
from common.step.schedule import Schedule
from common.verbs.plan import main
from common.zero.plan import estimated, shard_groups


@pytest.fixture(scope="module")
def no_weights(tiny_llama, tmp_path_factory):
    """tiny_llama's folder without a weight."""
    folder = tmp_path_factory.mktemp("no-weights")
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    return folder


def table(capsys, *words) -> tuple[dict[str, str], str]:
    """(the table's values by their names, everything that was printed) of `plan WORDS`."""
    assert main(*map(str, words)) == 0
    text = capsys.readouterr().out
    assert max(map(len, text[text.index("\nsamples" if words[0] == "sft" else "\npairs") :].splitlines())) <= WIDTH
    return rows_of(text), text


def rows_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S.{0,19}?)  +(\S.*)$", re.sub(r"\n {22}", " ", text), re.MULTILINE))


def number(text: str) -> int:
    return int(re.search(r"[\d,]+", text)[0].replace(",", ""))


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_steps_tokens_checkpoints_and_evaluations_are_the_runs_own(
    method, is_cached, tiny_llama, no_weights, sft_data, dpo_data, tmp_path, capsys
):
    data = {"sft": sft_data, "dpo": dpo_data}[method]
    own = {"num_train_epochs": 3, "global_batch_size": 4, "checkpointing_steps": 3, "stop_after_steps": 8}
    own |= {"eval_holdout": "1", "eval_steps": 3, "warmup_ratio": 0.25, "learning_rate": 5e-6}
    flags = launch.flags(tiny_llama, data, tmp_path, **own)
    planning = flags | {"model_name_or_path": no_weights, "cache_dir": tmp_path / "cache"}
    if not is_cached:
        values, _ = table(capsys, method, 1, *launch.argv(planning))
    run = launch.launch(f"train_{method}", flags).succeeded()
    printed = rows_of(run.stdout)
    if is_cached:
        values, text = table(capsys, method, 1, *launch.argv(planning | {"output_dir": tmp_path / "other"}))
        assert "tokenized before" in text
    last, rates = run.metrics[-1], run.column("learning_rate")
    assert number(values["steps"]) == last["step"] == 8 and number(values["tokens"]) == last["total_tokens"]
    assert values["samples" if method == "sft" else "pairs"].startswith("9; 1 ")
    evaluated = [record["step"] for record in run.metrics if "eval/loss" in record]
    assert values["evaluations"] == f"after step {', '.join(map(str, evaluated))}"
    saved = sorted(int(path.name[5:]) for path in (run.output_dir / "checkpoints").glob("step_*"))
    assert values["checkpoints"] == f"after step {', '.join(map(str, saved))}"
    for name in ("tokens", "steps", "warm-up", "checkpoints", "evaluations"):
        assert printed[name] == values[name], "by the run itself, before it loads anything"
    assert number(values["warm-up"]) == int(np.argmax(rates)) == 2
    for rate, is_other in ((5e-6, False), (0.5, True)):
        _, text = table(capsys, method, 1, *launch.argv(planning | {"learning_rate": rate, "resume": "auto"}))
        warned = re.sub(r"\s+", " ", text)
        assert ("another run: learning_rate was 5e-06, is 0.5" in warned) == ("another run" in warned) == is_other
    assert f"planned (came): {last['total_tokens']:,} tokens ({last['total_tokens']:,} tokens)" in run.stdout


@pytest.fixture
def of_8b(no_weights, tmp_path, sft_data) -> list[str]:
    """Flags of a run of 8B."""
    shutil.copytree(no_weights, tmp_path / "8b")
    test_memory.LLAMA_8B.save_pretrained(tmp_path / "8b")
    return launch.argv(launch.flags(tmp_path / "8b", sft_data, tmp_path, dtype="bfloat16"))


def test_memory_is_the_planners_for_8b_on_the_card_named(of_8b, capsys):
    values, _ = table(capsys, "sft", 2, "--gpu", "h100", "--gpu_hour_price", 3, "--mfu", 0.5, *of_8b)
    residency, share = re.match(r"residency (\w+), (\d+)%", values["the planner's choice"]).groups()
    zero = DeepSpeedZeroConfig(**json.loads((launch.REPO / "ds_configs/zero3.json").read_text())["zero_optimization"])
    groups = np.cumsum([0, *shard_groups(test_memory.SHAPE_8B, 2, zero)])
    (exact,) = {kept / groups[-1] for kept in groups if f"{kept / groups[-1]:.0%}" == f"{share}%"}
    memory = estimated(test_memory.SHAPE_8B, 2, residency, exact, zero)
    found = re.findall(r"([\d.]+) (?:parameters|gradients|optimizer)", values["memory of a rank"])
    expected = memory.parameters + memory.gathered, memory.gradients, memory.optimizer + memory.unseen
    assert [*map(float, found)] == [round(size / 1e9, 1) for size in expected]
    assert "50.0% MFU" in values["hours"] and values["cost"].endswith("at 3")


@pytest.mark.parametrize(("gigabytes", "named"), [("20", "host memory"), ("nan", "--host_memory_gb")])
def test_where_nothing_fits_the_run_would_end_and_so_does_the_plan(of_8b, gigabytes, named):
    with pytest.raises(UserError, match=named):
        main("sft", "1", "--gpu", "h100", "--host_memory_gb", gigabytes, *of_8b)


def test_a_draw_of_many_rows_gives_intervals_that_hold_all_of_them(no_weights, tmp_path, capsys, monkeypatch):
    data = models.write_jsonl(tmp_path / "x.jsonl", [*models.conversations(300), *[{"messages": []}] * 20])
    flags = launch.flags(no_weights, data, tmp_path, global_batch_size=8, allow_dropped=True, num_train_epochs=1)
    monkeypatch.setattr(plan_table, "MOST_ROWS", 100)
    drawn, _ = table(capsys, "sft", 1, *launch.argv(flags))
    monkeypatch.undo()
    words = launch.argv(flags | {"cache_dir": tmp_path / "other"})
    everything, text = table(capsys, "sft", 1, *words)
    for name in ("samples", "tokens", "steps"):
        value, low, high = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", drawn[name])[:3])
        assert low <= number(everything[name]) <= high and low < value <= high, name
    assert drawn["data"].startswith("100 of 320 rows were tokenized")
    assert "20 of 320 rows are dropped" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"checkpointing_steps": 99}, "--checkpointing_steps 99"),
        ({"max_seq_length": 60, "allow_dropped": True}, "cut to --max_seq_length"),
        ({"push_to_hub": True}, "--push_to_hub"),
        ({"chat_template": "tulu"}, "differs from the tokenizer's own"),
        ({}, None),
    ],
)
def test_what_is_wrong_is_warned_of(changes, named, no_weights, sft_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no token
    folder = tmp_path / "model"
    shutil.copytree(no_weights, folder)
    if "chat_template" in changes:
        (folder / "chat_template.jinja").write_text(TULU + " ")
    flags = launch.flags(folder, sft_data, tmp_path, checkpointing_steps=1, global_batch_size=4)
    _, text = table(capsys, "sft", 1, *launch.argv(flags | changes))
    warned = [line for line in re.sub(r"\n  ", " ", text).splitlines() if line.startswith("warning")]
    assert (named in " ".join(warned)) if named else warned == []


@pytest.mark.parametrize(("free", "is_enough"), [(38, True), (37, False)])
def test_a_disk_that_holds_all_exactly_is_enough(monkeypatch, free, is_enough):
    """Three checkpoints of 12 bytes a parameter at once and a model of 2."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    config = SFTConfig(max_train_steps=12, checkpointing_steps=3, keep_last_n_checkpoints=2)
    assert disk.need(config, 1, Schedule(config, 10)).endswith(disk.SHORT) != is_enough
    config = SFTConfig(max_train_steps=3, checkpointing_steps=3, keep_best="eval/loss")  # no more than one a step
    assert disk.need(config, 1, Schedule(config, 10)).endswith(disk.SHORT) != is_enough


def test_more_than_eight_gpus_are_several_hosts():
    card, peak, _ = Machine(16, "h200", 800).card()
    assert card.spans_hosts and card.host_free == 100e9 and peak == 989e12 and len(CARDS) == 4
    assert not Machine(8, "b200", None).card()[0].spans_hosts


def test_what_was_planned_stands_beside_what_came():
    """Of a run that logs every second step, and was planned for a device whose peak is known."""
    counts = [{"step": 2 * i, "total_tokens": 10_000 * i, "step_seconds": 900 * i} for i in (1, 2, 3)]
    records = [row | {"max_memory_gb": 70.0 + i, "mfu": 0.4 + i / 50} for i, row in enumerate(counts, 1)]
    planned = {"tokens": 30_000, "mfu": 0.5, "hours": 2.5, "memory_gb": 75.04}
    tokens, memory = "30,000 tokens (30,000 tokens)", "75.0 GB (73.0 GB), 50.0% MFU (44.0% MFU)"
    assert beside(planned, records) == f"planned (came): {tokens}, 2.5 hours of steps (3 hours of steps), {memory}"


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 12, None])
def test_tokens_of_a_run_are_those_of_its_steps_however_many_there_are(stop):
    config = SFTConfig(num_train_epochs=3, global_batch_size=3, stop_after_steps=stop)
    schedule, lengths = Schedule(config, 10), np.arange(100, 110)
    of_steps = [int(lengths[schedule.samples(step)].sum()) for step in range(schedule.last_step)]
    assert tokens_of(schedule, lengths) == sum(of_steps)
    num_samples = sum(len(schedule.samples(step)) for step in range(schedule.last_step))
    assert tokens_of(schedule, lengths[:4]) == round(101.5 * num_samples)
    endless = Schedule(SFTConfig(num_train_epochs=10**9, global_batch_size=3), 10)
    assert tokens_of(endless, lengths) == 10**9 * lengths.sum()


@pytest.mark.parametrize("every", [1, 2, 3, 7, 30, 10**9])
@pytest.mark.parametrize("last", [1, 5, 6, 28, 10**9])
@pytest.mark.parametrize("has_end", [False, True])
def test_steps_are_listed_by_the_first_and_the_last(every, last, has_end):
    text = plan_table.listed(every, last, has_end)
    if last < 10**9:
        steps = [step for step in range(1, last + 1) if step % every == 0 or (has_end and step == last)]
        seen = [int(word) for word in re.findall(r"\d+", text.partition("(")[0])]
        assert seen == (steps if len(steps) <= 5 else [*steps[:4], steps[-1]])
        assert ("in all" in text) == (len(steps) > 5) and (text == "none") == (not steps)
