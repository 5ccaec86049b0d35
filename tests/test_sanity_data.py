"""The embedded default: disjoint, right, half and half, the same bytes from the same seed.

python -m pytest tests/test_sanity_data.py
"""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.chat_template import TULU
from common.verbs.sanity_data import EOS_TOKEN, read_answer, read_held_out, write_data, write_model

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
    answers = {"copy": letters, "reverse": "".join(reversed(letters)), "sort": "".join(sorted(letters))}
    return (answers | {"count": str(sum(1 for _ in letters)), "last": list(letters).pop()})[task]


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
        assert row["chosen"][1]["content"] == f"answer: {solve(prompt)}"
        assert row["rejected"][1]["content"] == f"{solve(prompt)}."
        num_polite += prompt.startswith("please ")
    assert num_polite / SIZES["num_preferences"] == pytest.approx(0.5, abs=0.1)


def test_an_answer_is_read_in_either_style_and_no_other():
    read = {"answer: azfq": ("azfq", True), "azfq.": ("azfq", False), " answer: 4 ": ("4", True)}
    read |= dict.fromkeys(("azfq", "", ".", "answer azfq"), (None, False))
    assert {text: read_answer(text) for text in read} == read


def test_the_tokenizer_round_trips_any_text_and_has_a_token_for_each_role(generated):
    tokenizer = AutoTokenizer.from_pretrained(generated / "model", chat_template=TULU)
    assert len(tokenizer) < 1000 and tokenizer.eos_token == EOS_TOKEN
    for text in ("please reverse qfza", " two  spaces\n\nnew lines\t", "naïve 日本語 🙂", "photocopy"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.apply_chat_template(rows(generated, "sft")[0]["messages"], return_dict=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<|user|>" and tokens.count("<|assistant|>") == tokens.count(tokenizer.eos_token) == 1


def test_the_model_is_an_ordinary_llama_with_random_weights(generated):
    model, report = AutoModelForCausalLM.from_pretrained(generated / "model", output_loading_info=True)
    assert not any(report.values()) and {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 462_208
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (weight == 1).all(), name
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(generated / "model"))
