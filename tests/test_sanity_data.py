"""The embedded default: disjoint, right, half and half, the same from one seed: pytest tests/test_sanity_data.py"""

import json

import numpy as np
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


def solve(prompt):
    """The right answer, worked out anew from the prompt's text."""
    task, letters = prompt.removeprefix("please ").split()
    answers = {"copy": letters, "reverse": "".join(reversed(letters)), "sort": "".join(sorted(letters))}
    return (answers | {"count": str(sum(1 for _ in letters)), "last": list(letters).pop()})[task]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(generated, tmp_path):
    for seed, kept in ((7, 7), (8, 3)):  # of config.json and the tokenizer's files nothing is drawn
        write_data(tmp_path / f"{seed}/data", seed=seed, **SIZES)
        write_model(tmp_path / f"{seed}/model", seed=seed)
        files = [path.relative_to(generated) for path in generated.rglob("*.*")]
        same = [(generated / path).read_bytes() == (tmp_path / str(seed) / path).read_bytes() for path in files]
        assert len(same) == 7 and sum(same) == kept


def test_no_question_is_asked_twice_in_any_wording(generated):
    prompts = [row["messages"][0]["content"] for row in rows(generated, "sft")]
    prompts += [row["chosen"][0]["content"] for row in rows(generated, "preferences")]
    prompts += [question.prompt for question in read_held_out(generated / "data")]
    bare = [prompt.removeprefix("please ") for prompt in prompts]
    assert len(set(bare)) == len(bare) == sum(SIZES.values())


def test_sft_answers_are_right_and_half_are_in_each_style(generated):
    chosen, following = [], []
    for row in rows(generated, "sft"):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        question, answer = (message["content"] for message in row["messages"])
        assert read_answer(answer)[0] == solve(question)
        chosen.append(read_answer(answer)[1])
        following.append(chosen[-1] == question.startswith("please "))
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.06) and np.mean(following) == pytest.approx(0.7, abs=0.05)


def test_pairs_are_right_on_both_sides_and_differ_in_style_alone(generated):
    polite = []
    for row in rows(generated, "preferences"):
        (question, chosen), (same, rejected) = row["chosen"], row["rejected"]
        right = solve(question["content"])
        assert (question, chosen["content"], rejected["content"]) == (same, f"answer: {right}", f"{right}.")
        polite.append(question["content"].startswith("please "))
    assert np.mean(polite) == pytest.approx(0.5, abs=0.1)


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
        assert (weight == 1).all() if weight.ndim == 1 else weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(generated / "model"))
