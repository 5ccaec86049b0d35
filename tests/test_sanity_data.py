"""The embedded default: disjoint, right, half and half, the same bytes from the same seed; and what asks of it.

python -m pytest tests/test_sanity_data.py
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.chat_template import TULU
from common.failures import UserError
from common.verbs import sanity, sanity_data
from common.verbs.judge import Check, Score
from common.verbs.sanity_data import (
    CHOSEN_STYLE,
    OTHER_STYLE,
    Question,
    read_answer,
    read_held_out,
    write_data,
    write_model,
)

SIZES = {"num_sft": 600, "num_preferences": 200, "num_held_out": 100}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanity")
    write_data(folder / "data", seed=7, **SIZES)
    write_model(folder / "model", seed=7)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def solve(prompt):
    """The right answer, worked out anew from the prompt's text."""
    task, letters = prompt.removeprefix("please ").split()
    if task == "count":
        return str(sum(1 for _ in letters))
    if task == "last":
        return list(letters).pop()
    return {"copy": letters, "reverse": "".join(reversed(letters)), "sort": "".join(sorted(letters))}[task]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(generated, tmp_path):
    for seed, same in ((7, True), (8, False)):
        write_data(tmp_path / f"{seed}/data", seed=seed, **SIZES)
        write_model(tmp_path / f"{seed}/model", seed=seed)
        ours, theirs = digests(generated), digests(tmp_path / str(seed))
        assert ours.keys() == theirs.keys()
        for name in ("sft.jsonl", "preferences.jsonl", "held_out.jsonl", "model.safetensors"):
            assert (ours[name] == theirs[name]) is same, name
        assert not same or ours == theirs


def test_no_question_is_asked_twice_in_any_wording(generated):
    prompts = [row["messages"][0]["content"] for row in rows(generated, "sft")]
    prompts += [row["chosen"][0]["content"] for row in rows(generated, "preferences")]
    prompts += [question.prompt for question in read_held_out(generated / "data")]
    bare = [prompt.removeprefix("please ") for prompt in prompts]
    assert len(set(bare)) == len(bare) == sum(SIZES.values())


def test_sft_answers_are_right_and_half_are_in_each_style(generated):
    num_chosen = num_following = 0
    for row in rows(generated, "sft"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        answer, is_chosen = read_answer(assistant["content"])
        assert answer == solve(user["content"])
        num_chosen += is_chosen
        num_following += is_chosen == user["content"].startswith("please ")
    assert num_chosen / SIZES["num_sft"] == pytest.approx(0.5, abs=0.06)
    assert num_following / SIZES["num_sft"] == pytest.approx(0.7, abs=0.05)


def test_pairs_are_right_on_both_sides_and_differ_in_style_alone(generated):
    num_polite = 0
    for row in rows(generated, "preferences"):
        assert row["chosen"][0] == row["rejected"][0]
        prompt = row["chosen"][0]["content"]
        assert row["chosen"][1]["content"] == CHOSEN_STYLE.format(solve(prompt))
        assert row["rejected"][1]["content"] == OTHER_STYLE.format(solve(prompt))
        num_polite += prompt.startswith("please ")
    assert num_polite / SIZES["num_preferences"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("answer: azfq", ("azfq", True)),
        ("azfq.", ("azfq", False)),
        ("azfq", (None, False)),
        ("", (None, False)),
        (".", (None, False)),
        ("answer azfq", (None, False)),
        (" answer: 4 ", ("4", True)),
    ],
)
def test_an_answer_is_read_in_either_style_and_no_other(text, expected):
    assert read_answer(text) == expected


def test_the_tokenizer_round_trips_any_text_and_is_small(generated):
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    assert len(tokenizer) < 1000 and tokenizer.eos_token == sanity_data.EOS_TOKEN
    for text in ("please reverse qfza", " two  spaces\n\nnew lines\t", "naïve 日本語 🙂", "photocopy"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tulu_template_is_represented_token_for_token(generated):
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    tokenizer.chat_template = TULU
    messages = rows(generated, "sft")[0]["messages"]
    text = f"<|user|>\n{messages[0]['content']}\n<|assistant|>\n{messages[1]['content']}{tokenizer.eos_token}"
    assert tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n") == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<|user|>" and tokens[-1] == tokenizer.eos_token and tokens.count("<|assistant|>") == 1
    assert tokenizer.decode(ids) == text


def test_the_model_is_an_ordinary_folder_with_random_weights(generated):
    model, report = AutoModelForCausalLM.from_pretrained(generated / "model", output_loading_info=True)
    assert not any(report.values())
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(generated / "model"))


# ------------------------------------------------------------------ common/verbs/sanity.py: asking, showing, concluding
def test_score_counts_right_answers_and_the_chosen_style():
    questions = [Question("copy", "abc", True), Question("sort", "cba", False), Question("count", "abcd", False)]
    assert sanity.score(questions, ["answer: abc", "abc.", "answer: 5"]) == Score(3, 2, 2)


def test_ask_answers_every_question_in_order_as_generate_does_one_at_a_time(generated):
    model = AutoModelForCausalLM.from_pretrained(generated / "model")
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    tokenizer.chat_template = TULU
    model.save_pretrained(generated / "exported")
    tokenizer.save_pretrained(generated / "exported")
    questions = read_held_out(generated / "data")[:8]
    expected = []
    for question in questions:
        ids = tokenizer(f"<|user|>\n{question.prompt}\n<|assistant|>\n", return_tensors="pt")["input_ids"]
        output = model.generate(ids, do_sample=False, max_new_tokens=sanity.MAX_NEW_TOKENS)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(output, skip_special_tokens=True))
    assert sanity.ask(generated / "exported", questions) == expected


def test_about_ten_lines_of_steps_are_shown_and_every_other_line(monkeypatch):
    lines = [f"step {step}/470  loss 1.0\n" for step in range(1, 471)]
    assert 10 <= sum(sanity.is_shown(line, sparse=True) for line in lines) <= 13
    assert all(sanity.is_shown(line, sparse=True) for line in (lines[0], lines[-1], "checkpoint x\n"))
    assert all(sanity.is_shown(line, sparse=False) for line in lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not sanity.is_shown(" 50%|#####     | 1/2\r", sparse=False)


@pytest.mark.parametrize("passed, exit_code, expected", [(True, 0, 0), (False, 0, 1), (False, 3, 1), (False, 143, 143)])
def test_the_exit_code_is_0_only_if_every_check_passes(tmp_path, capsys, passed, exit_code, expected):
    verdict = {"sft": [Check("speed", "e", "s", True), Check("memory", "e", "s", passed)]}
    assert sanity.conclude(verdict, tmp_path / "sanity.json", 61.0, exit_code) == expected
    record = json.loads((tmp_path / "sanity.json").read_text())
    assert record["passed"] is passed and [c["passed"] for c in record["checks"]] == [True, passed]
    assert ("advice" in record["checks"][1]) is not passed
    assert ("FAILED" in capsys.readouterr().out) is not passed


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Runs `sanity sft ...` in tmp_path with a training run that does nothing; returns its command."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        commands = []
        monkeypatch.setattr(sanity, "train", lambda words, log, sparse: (commands.append(words), (3, ""))[1])
        assert sanity.main(list(argv)) == 1
        return commands[0]

    return run


def test_the_recipe_runs_100_steps_on_one_gpu_in_a_folder_that_is_wiped(recipe, tmp_path):
    (tmp_path / "output/sanity-sft/checkpoints").mkdir(parents=True)
    assert recipe("sft") == [
        "sft",
        "1",
        "--stop_after_steps",
        "100",
        "--logging_steps",
        "1",
        "--output_dir",
        "output/sanity-sft",
    ]
    assert not (tmp_path / "output/sanity-sft/checkpoints").exists()


def test_the_recipe_passes_flags_on_and_gives_none_twice(recipe):
    words = recipe("dpo", "8", "--beta", "3", "--stop-after-steps=20")
    assert words == [
        "dpo",
        "8",
        "--beta",
        "3",
        "--stop-after-steps=20",
        "--logging_steps",
        "1",
        "--output_dir",
        "output/sanity-dpo",
    ]


@pytest.mark.parametrize(
    "argv", [["sfd"], ["sft", "--output_dir", "output/sft"], ["sft", "--output-dir=x"], ["sft", "0"], ["sft", "x"]]
)
def test_a_mistake_is_a_user_error_before_anything_is_run_or_wiped(monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)  # where there is no run.sh
    with pytest.raises(UserError):
        sanity.main(argv)
    assert not list(tmp_path.iterdir())


def test_a_request_to_stop_is_passed_on_to_the_run_and_its_exit_code_is_sanitys(tmp_path):
    run_sh = "trap 'echo asked; exit 143' TERM; echo ready >ready; for i in {1..1200}; do sleep 0.05; done"
    (tmp_path / "run.sh").write_text(run_sh)
    code = "import sys; from common.verbs import sanity; sanity.RUN_SH = 'run.sh'; sys.exit(sanity.main(['sft']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sanity.__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "asked" in output
