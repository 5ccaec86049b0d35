"""`run.sh sanity sft|dpo` judges the recipe's first steps: pytest tests/test_sanity.py"""

import json

import pytest
from test_judge import good_run

from common.verbs import sanity


@pytest.mark.parametrize(("slowest", "exit_code"), [(2.4, 0), (3.1, 1)])
def test_a_hiccup_is_worth_ten_of_a_tiny_models_steps_and_is_not_slow(tmp_path, monkeypatch, slowest, exit_code):
    history, run_config = good_run(tmp_path, "sft")
    for row in history:
        row["step_seconds"] = 0.22
    history[50]["step_seconds"] = slowest

    def train(words, log, sparse):
        (log.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        (log.parent / "run_config.json").write_text(json.dumps(run_config))
        return 0, ""

    monkeypatch.setattr(sanity, "train", train)
    monkeypatch.chdir(tmp_path)
    assert sanity.sanity_of_recipe("sft", []) == exit_code


def test_help_is_printed_and_nothing_is_run(capsys, monkeypatch):
    monkeypatch.setattr(sanity, "train", None)
    assert sanity.main(["sft", "--help"]) == 0 and "bash run.sh sanity sft|dpo [N]" in capsys.readouterr().out
