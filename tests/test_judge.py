"""Each check of the judge fails on a history made to fail it alone: pytest tests/test_judge.py"""

import json
import math

import pytest

from common.verbs.judge import ADVICE, format_table, judge, judge_answers, judge_run

NUM_STEPS = 100


def good_run(tmp_path, kind="dpo_norm"):
    """(history, run_config) of a run with nothing wrong. kind: "sft", or the loss of DPO."""
    history = []
    for step in range(1, NUM_STEPS + 1):
        row = {"step": step, "train_loss": 1.2 * 0.98**step, "grad_norm": 1.5}
        row |= {"tokens_per_second": 5000.0, "step_seconds": 2.0, "max_memory_gb": 61.5}
        if kind != "sft":
            row |= {"train_loss": math.log(2) * 0.99 ** (step - 1), "rewards/accuracy": 0.5 + step / 400}
            row |= {"rewards/margin": step / 1000, "logps/chosen": -120.0, "logps/rejected": -80.0}
        history.append(row)
    history[1]["step_seconds"] = 300.0  # compiling: before the sixth step nothing is slow
    run = {"config": {"logging_steps": 1}, "result": {"steps": NUM_STEPS, "rank_agreement": True}, "world_size": 4}
    run |= {"device": {"total_memory_gb": 80.0}, "reference_cache": str(tmp_path)}
    run["zero"] = {"stage": 3, "num_parameters": 1001, "partitioned_parameters_per_rank": [251, 251, 251, 251]}
    if kind != "sft":
        run["config"] |= {"loss_type": kind, "ref_model_name_or_path": None, "dtype": "float32", "beta": 5.0}
    return history, run


def failed(checks):
    return [check.name for check in checks if not check.passed]


def rows(**values):
    """An edit that sets fields of steps: rows(grad_norm={3: 0.0}); a step None means every step."""

    def edit(history, run_config):
        for field, by_step in values.items():
            for row in history:
                if None in by_step or row["step"] in by_step:
                    row[field.replace("__", "/")] = by_step.get(row["step"], by_step.get(None))

    return edit


def part(name, **values):
    return lambda history, run_config: run_config[name].update(values)


def first_loss(off, dtype):
    """In bfloat16 it may be off by half of beta times 2e-4 of the log-probabilities' sum, besides float32's 0.01."""

    def edit(history, run_config):
        run_config["config"]["dtype"], history[0]["train_loss"] = dtype, LN_2 + off

    return edit


def unlogged_first_step(history, run_config):
    history[:] = history[1::2]
    run_config["config"]["logging_steps"] = 2


def only_step_1(history, run_config):
    del history[1:]
    run_config["result"]["steps"] = 1


ALLOWED = 0.01 + 5 / 2 * 2e-4 * (120 + 80)
FALLS_TOO_LITTLE = {None: 2.0} | dict.fromkeys(range(51, NUM_STEPS + 1), 1.89)  # 5.5% lower
LN_2 = math.log(2)
ALONE = [  # (the one check that must fail, None for none; "sft" or the loss of DPO; what is done to a good run)
    *[(None, kind, rows()) for kind in ("sft", "dpo_norm", "sigmoid", "ipo", "simpo")],
    *[(None, "dpo_norm", first_loss(off, "bfloat16")) for off in (0.011, ALLOWED - 1e-6)],
    (None, "sft", rows(step_seconds={None: 0.1, 50: 1.0})),
    ("speed", "sft", rows(step_seconds={None: 0.1, 50: 1.1})),
    ("SFT loss falls", "sft", only_step_1),
    ("run finished", "sft", lambda history, run_config: history.pop()),
    ("run finished", "sft", lambda history, run_config: history.pop(40)),
    ("run finished", "sft", lambda history, run_config: history.insert(40, dict(history[40]))),
    ("SFT loss falls", "sft", rows(train_loss=FALLS_TOO_LITTLE)),
    ("DPO loss falls", "dpo_norm", rows(train_loss={None: LN_2 + 1e-6})),
    ("DPO loss falls", "ipo", rows(train_loss={None: 2.0})),  # which has to fall below its own first steps
    *[("loss value", "sft", rows(train_loss={50: loss})) for loss in (math.nan, math.inf, -math.inf, 10.5)],
    *[("grad norm", "sft", rows(grad_norm={50: norm})) for norm in (0.0, 1000.5, math.nan)],
    *[("grad norm", "sft", rows(grad_norm={None: norm})) for norm in (0.09, 11.0)],
    ("speed", "sft", rows(tokens_per_second={50: 0.0})),
    ("speed", "sft", rows(step_seconds={50: 20.5})),
    *[("DPO starts at ln 2", "dpo_norm", first_loss(off, "float32")) for off in (0.011, -0.011)],
    ("DPO starts at ln 2", "dpo_norm", first_loss(ALLOWED + 1e-6, "bfloat16")),
    ("DPO starts at ln 2", "dpo_norm", unlogged_first_step),
    ("reference cached", "dpo_norm", lambda history, run_config: run_config.pop("reference_cache")),
    ("reference cached", "dpo_norm", lambda history, run_config: run_config.update(reference_cache="/no")),
    ("rewards/accuracy", "dpo_norm", rows(rewards__accuracy={None: 0.55})),
    ("rewards/margin", "dpo_norm", rows(rewards__margin={None: 0.0})),
    ("ZeRO-3 partitions", "sft", part("zero", stage=2)),
    ("ZeRO-3 partitions", "sft", part("zero", partitioned_parameters_per_rank=[1001] * 4)),
    ("ZeRO-3 partitions", "sft", part("zero", partitioned_parameters_per_rank=[251] * 3)),
    ("ranks agree", "sft", part("result", rank_agreement=False)),
    ("ranks agree", "sft", lambda history, run_config: run_config["result"].pop("rank_agreement")),
]


@pytest.mark.parametrize("name, kind, edit", ALONE, ids=[f"{row[0]}-{i}" for i, row in enumerate(ALONE)])
def test_each_check_fails_alone_on_its_own_fault(tmp_path, name, kind, edit):
    history, run_config = good_run(tmp_path, kind)
    edit(history, run_config)
    others = {"loss value": {"SFT loss falls"}}.get(name, set())  # a loss that is not finite does not fall either
    checks = judge(history, run_config, exit_code=0)
    assert set(failed(checks)) - others == {name} - {None} and all(check.name in ADVICE for check in checks)
    assert len(checks) == {"sft": 8, "simpo": 10, "ipo": 11}.get(kind, 12)


def test_a_run_cut_short_shows_its_error_line_and_out_of_memory_is_seen_in_its_output(tmp_path):
    history, run_config = good_run(tmp_path, "sft")
    assert failed(judge(history, run_config, 143)) == ["run finished"]
    del run_config["result"]
    checks = judge(history, run_config, 3, "step 100/500 ...\nerror: step 101: out of memory; try a smaller budget\n")
    assert failed(checks) == ["run finished", "memory", "ranks agree"] and "error: step 101" in checks[0].seen
    assert "peak 61.5 GB, headroom 18.5 of 80.0 GB" in checks[5].seen


def test_another_reference_need_not_start_at_ln_2_and_a_floor_forgives_a_hiccup_and_no_hang(tmp_path):
    history, run_config = good_run(tmp_path)
    run_config["config"]["ref_model_name_or_path"] = "another/model"
    for slowest, is_slow in ((4.0, False), (6.0, True)):
        rows(step_seconds={None: 0.1, 50: slowest}, train_loss={1: 1.0})(history, run_config)
        assert failed(judge(history, run_config, 0, floor=5)) == ["speed"] * is_slow


TORN = {"metrics.jsonl": [None, '{"step": 1, "train_lo', '{"step": 1, "train_lo\n', '{"step": 1}\n', "[1]\n"]}
TORN["run_config.json"] = [None, "{", "[]", "{}"]


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in TORN.items() for text in texts])
def test_missing_torn_and_empty_files_fail_with_a_clear_line(tmp_path, name, text):
    history, run_config = good_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    (tmp_path / "run_config.json").write_text(json.dumps(run_config))
    assert failed(judge_run(tmp_path, 0)) == []
    path = tmp_path / name
    path.unlink() if text is None else path.write_text(text)
    checks = judge_run(tmp_path, 0)
    assert failed(checks) == ["run finished"] and name in checks[0].seen in format_table(checks)
    assert "error: no" in judge_run(tmp_path, 2, "loading\nerror: no such flag\n")[0].seen


ANSWERS = [((1.0, 0.5), (0.95, 0.9), []), ((0.7, 0.35), (0.65, 0.9), []), ((1.0, 0.34), (1.0, 1.0), ["SFT style"])]
ANSWERS += [((0.69, 0.5), (0.69, 0.9), ["SFT answers right"]), ((1.0, 0.66), (1.0, 1.0), ["SFT style"])]
ANSWERS += [((1.0, 0.5), (1.0, 0.89), ["DPO style"]), ((1.0, 0.5), (0.94, 1.0), ["DPO keeps answers"])]


@pytest.mark.parametrize("sft, dpo, names", ANSWERS)
def test_answers_are_held_to_the_limits(sft, dpo, names):
    checks = judge_answers(sft, dpo)
    assert failed(checks) == names and all(check.name in ADVICE for check in checks)


def test_the_table_shows_every_check_and_advises_on_the_failed_one_only(tmp_path):
    history, run_config = good_run(tmp_path)
    rows(rewards__margin={None: -0.1})(history, run_config)
    text = format_table(judge(history, run_config, 0))
    assert text.count("PASS") == 11 and text.count("FAIL") == 1
    assert [name for name in ADVICE if ADVICE[name] in text] == ["rewards/margin"]
