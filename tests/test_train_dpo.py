"""train_dpo.py alone: real preferences, another reference, and how it ends: pytest tests/test_train_dpo.py

Its numbers, and mistakes, are in test_train.py.
"""

import json
import math

import launch
import models
import pytest
import reference

from common.run.reference import reference_pass

COLUMNS = ("train_loss", "grad_norm", "target_tokens", "logps/chosen", "logps/rejected")
DPO_NORM = {"loss_type": "dpo_norm", "beta": 5.0, "max_grad_norm": 0.5}


def assert_equal(run: launch.Finished, expected: list[dict], columns=COLUMNS, rel: float = 1e-5) -> None:
    for column in columns:
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=rel), column


def test_real_preferences_equal_the_plain_loop(shared, tiny_llama, tmp_path):
    """Full-batch steps on real texts, long prompts and truncated answers among them, in tiny tokens."""
    rows = [json.loads(line) for line in (shared / "data" / "preferences.jsonl").read_text().splitlines()]
    rows, longest = sorted(rows, key=lambda row: len(json.dumps(row)))[:9], 350
    tokenizer = reference.load_tokenizer(tiny_llama)
    pairs = [pair for row in rows if (pair := reference.pair_tokens(tokenizer, row, longest))]
    assert len(pairs) >= 5 and any(len(side[0]) == longest for pair in pairs for side in pair)
    settings = {"learning_rate": 1e-3, "global_batch_size": len(pairs)} | DPO_NORM
    expected = reference.train_dpo(reference.load(tiny_llama), pairs, num_steps=4, **settings)
    data = models.write_jsonl(tmp_path / "preferences.jsonl", rows)
    settings |= {"warmup_ratio": 0, "num_train_epochs": 4, "max_tokens_per_micro_batch": 1000}
    given = launch.flags(tiny_llama, data, tmp_path, **settings) | {"max_seq_length": longest}
    assert_equal(launch.launch("train_dpo", given, 2).succeeded(), expected)


def test_another_reference_model_equals_the_plain_loop_under_torchrun(tiny_llama, dpo_data, tmp_path):
    """Of another shape even: it is loaded first, in the policy's place."""
    other = models.make_model(tmp_path / "other", "qwen3", seed=5)
    tokenizer = reference.load_tokenizer(tiny_llama)
    pairs = [reference.pair_tokens(tokenizer, row) for row in models.preferences(10)]
    settings = {"learning_rate": 3e-3, "global_batch_size": 4} | DPO_NORM
    given = {**settings, "ref_model_name_or_path": other, "max_train_steps": 4, "warmup_ratio": 0}
    given = launch.flags(tiny_llama, dpo_data, tmp_path, **given)
    run = launch.launch_for_real("train_dpo", given, 2, "torchrun").succeeded()
    settings |= {"num_steps": 4, "reference_model": reference.load(other)}
    expected = reference.train_dpo(reference.load(tiny_llama), pairs, **settings)
    assert abs(expected[0]["train_loss"] - math.log(2)) > 0.01
    assert_equal(run, expected, ("train_loss", "grad_norm", "logps/chosen", "rewards/margin"), 1e-4)
    assert (run.output_dir / "curves.png").is_file()


def test_another_reference_model_that_is_computed_wrongly_is_refused(tiny_llama, dpo_data, tmp_path):
    other = models.make_model(tmp_path / "other", "doge")
    given = launch.flags(tiny_llama, dpo_data, tmp_path, ref_model_name_or_path=other)
    assert "model type doge: log-probabilities" in launch.launch("train_dpo", given).refused(2)


def test_a_first_step_that_is_not_ln_2_stops_with_3(tiny_llama, dpo_data, tmp_path):
    """Made so by a reference that is off: the packed DPO of another project starts at 6 x ln 2."""
    given = launch.flags(tiny_llama, dpo_data, tmp_path, max_train_steps=2, warmup_ratio=0)
    run = launch.launch("train_dpo", given, patches={"train_dpo.reference_pass": shifted_reference_pass})
    error = run.refused(3)
    assert "step 1" in error and "0.6931" in error
    assert not run.metrics


def shifted_reference_pass(*arguments):
    logps, cached_in = reference_pass(*arguments)
    logps[:, 1] += 3.0
    return logps, cached_in
