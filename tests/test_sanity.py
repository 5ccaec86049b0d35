"""`run.sh sanity`: what it runs, shows and concludes: pytest tests/test_sanity.py"""

import json
import os
import signal
import subprocess
import sys

import launch
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.chat_template import TULU
from common.verbs import sanity
from common.verbs.judge import Check
from common.verbs.sanity_data import Question, read_held_out, write_data, write_model


@pytest.mark.parametrize("words", [["sft"], ["sft", "8", "--seed=1"], ["dpo", "--stop-after-steps=20"]])
def test_the_recipe_runs_100_steps_unless_told_otherwise_in_a_folder_that_is_wiped(monkeypatch, tmp_path, words):
    commands, output = [], f"output/sanity-{words[0]}"
    monkeypatch.setattr(sanity, "train", lambda words, log: (commands.append(words), (3, ""))[1])
    monkeypatch.setattr("common.verbs.launch.visible_gpus", lambda: [*"01234567"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / output / "checkpoints").mkdir(parents=True)
    assert sanity.main(*words) == 1 and not (tmp_path / output / "checkpoints").exists()
    number, flags = ("8", words[2:]) if words[1:2] == ["8"] else ("1", words[1:])
    ours = ["--stop_after_steps", "100", "--logging_steps", "1", "--clean_checkpoints_at_end", "true"]
    assert commands == [[words[0], number, *ours, *flags, "--output_dir", output]]


def test_a_request_to_stop_is_passed_on_to_the_run_and_its_exit_code_is_sanitys(tmp_path):
    code = """import sys; from common.verbs import launch, sanity
run = "trap 'echo asked; exit 143' TERM; echo ready; while :; do sleep 0.05; done"
sanity.start_run = lambda words: launch.start(["bash", "-c", run], stdout=-1, stderr=-2, text=True)
sys.exit(sanity.main("sft"))"""
    environment = os.environ | {"PYTHONPATH": str(launch.REPO)}
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, text=True, env=environment) as process:
        next(line for line in process.stdout if line == "ready\n")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(launch.TIMEOUT) == 143 and "asked\n" in output


def test_ask_answers_every_question_in_order_as_generate_does_one_at_a_time(tmp_path):
    write_model(tmp_path, seed=7)
    write_data(tmp_path, seed=7, num_sft=1, num_preferences=1, num_held_out=8)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer.chat_template = TULU
    tokenizer.save_pretrained(tmp_path)
    questions, expected = read_held_out(tmp_path), []
    for question in questions:
        ids = tokenizer(f"<|user|>\n{question.prompt}\n<|assistant|>\n", return_tensors="pt")["input_ids"]
        output = model.generate(ids, do_sample=False, max_new_tokens=sanity.MAX_NEW_TOKENS)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(output, skip_special_tokens=True))
    assert sanity.ask(tmp_path, questions) == expected


def test_score_counts_right_answers_and_the_chosen_style():
    questions = [Question("copy", "abc", True), Question("sort", "cba", False), Question("count", "abcd", False)]
    assert sanity.score(questions, ["answer: abc", "abc.", "answer: 5"]) == (2 / 3, 2 / 3)


def test_about_ten_lines_of_steps_are_shown_and_every_other_line_but_progress_bars():
    lines = [f"step {step}/470  loss 1.0\n" for step in range(1, 471)]
    assert 10 <= sum(sanity.is_shown(line, 0.1) for line in lines) <= 13
    assert all(sanity.is_shown(line, 0.1) for line in (lines[0], lines[-1], "checkpoint x\n"))
    assert all(sanity.is_shown(line, 0) for line in lines) and not sanity.is_shown(" 50%|#####     | 1/2\n", 0)


@pytest.mark.parametrize("passed, exit_code, expected", [(True, 0, 0), (False, 0, 1), (False, 3, 1), (False, 143, 143)])
def test_the_exit_code_is_0_only_if_every_check_passes(tmp_path, capsys, passed, exit_code, expected):
    verdict = {"sft": [Check("speed", "e", "s", True), Check("memory", "e", "s", passed)]}
    assert sanity.conclude(verdict, tmp_path / "sanity.json", 61.0, exit_code) == expected
    record = json.loads((tmp_path / "sanity.json").read_text())
    assert record["passed"] is passed and [c["passed"] for c in record["checks"]] == [True, passed]
    assert ("advice" in record["checks"][1]) is not passed
    assert ("FAILED" in capsys.readouterr().out) is not passed
