"""Rows to tokens: the reference vectors, forms, targets, truncation, drops.   pytest tests/test_tokens.py"""

import json

import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import ANSWER, OTHER, USER
from tokenizers import processors

from common.data.chat_template import ChatTemplate, resolve_template
from common.data.conversations import Dropped, preference_example, sft_example
from common.data.tokens import Encoder, preference_pair, render_pair, sft_sample

TOKENIZER = tiny_tokenizer.tiny_tokenizer()
TULU = resolve_template("tulu", TOKENIZER)


def encoded(encoder, texts):
    results = encoder.encode(texts)
    for result in results:
        if isinstance(result, Dropped):
            raise result
    return results


def sft(messages, template=TULU, encoder=None, max_seq_length=10_000):
    """(sample, whether it was truncated)"""
    text, spans, _ = template.render(*sft_example({"messages": messages}, {}).conversations)
    (encoding,) = encoded(encoder or Encoder(template.tokenizer, max_seq_length), [text])
    return sft_sample(encoding, spans), bool(encoding.overflowing)


def pair_of(chosen, rejected, template=TULU, encoder=None, max_seq_length=10_000):
    sides = preference_example({"chosen": chosen, "rejected": rejected}, {}).conversations
    prompt, *completions, _ = render_pair(*sides, template)
    encoder = encoder or Encoder(template.tokenizer, max_seq_length)
    return preference_pair(*encoded(encoder, [prompt + text for text in completions]), len(prompt))


def ids_of(text: str, tokenizer=TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- the reference run's tokens
@pytest.fixture(scope="session")
def llama3(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/llama3")
    return tokenizer, resolve_template("tulu", tokenizer)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name, max_seq_length", [("instructions", 256), ("conversations", 1024)])
def test_sft_tokens_and_spans_are_the_reference_runs(shared, llama3, name, max_seq_length):
    tokenizer, template = llama3
    encoder = Encoder(tokenizer, max_seq_length)
    rows = rows_of(shared / f"data/{name}.jsonl")
    expected = rows_of(shared / f"data/expected/{name}.tulu.{max_seq_length}.jsonl")
    assert len(rows) == len(expected) > 0
    for row, vector in zip(rows, expected, strict=True):
        sample, truncated = sft(sft_example(row, {}).conversations[0].messages, template, encoder)
        assert sample.input_ids.tolist() == vector["input_ids"] and sample.input_ids.dtype == np.int32
        assert sample.trained_spans.tolist() == vector["trained_spans"] and sample.trained_spans.dtype == np.int32
        assert not truncated or len(sample.input_ids) == max_seq_length


def test_preference_tokens_are_the_reference_runs(shared, llama3):
    tokenizer, template = llama3
    encoder, num_dropped = Encoder(tokenizer, 1024), 0
    files = "preferences.jsonl", "expected/preferences.tulu.1024.jsonl"
    rows, expected = (rows_of(shared / "data" / name) for name in files)
    for row, vector in zip(rows, expected, strict=True):
        sides = [side.messages for side in preference_example(row, {}).conversations]
        if vector["dropped"]:
            num_dropped += 1
            with pytest.raises(Dropped, match="prompt fills max_seq_length"):
                pair_of(*sides, template, encoder)
            continue
        pair = pair_of(*sides, template, encoder)
        assert len(pair.prompt_ids) == vector["prompt_length"]
        assert [*pair.prompt_ids, *pair.chosen_ids] == vector["chosen_input_ids"]
        assert [*pair.prompt_ids, *pair.rejected_ids] == vector["rejected_input_ids"]
        assert pair.chosen_start == pair.rejected_start == 0
    assert num_dropped > 0


# --- targets
WORDS = st.text(st.sampled_from("ab cd\n\té漢🙂<|>1'"), max_size=12)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), WORDS), min_size=1, max_size=7)


KITS = {words: tiny_tokenizer.tiny_tokenizer(words) for words in ("llama3", "gpt2")}


@settings(deadline=None, max_examples=100)
@given(turns=TURNS, words=st.sampled_from(["llama3", "gpt2"]))
def test_decoded_targets_are_the_assistant_contents_and_their_eos(turns, words):
    messages = [{"role": role, "content": content} for role, content in turns]
    answers = [content + "<eos>" for role, content in turns if role == "assistant" and content.strip()]
    tokenizer = KITS[words]
    template = resolve_template("tulu", tokenizer)
    try:
        sample, truncated = sft(messages, template)
    except Dropped:
        assert not answers
        return
    assert sample.input_ids.tolist() == ids_of(template.apply(messages), tokenizer)
    assert not truncated and len(sample.trained_spans) == len(answers)
    for (start, end), answer in zip(sample.trained_spans, answers, strict=True):
        decoded = tokenizer.decode(sample.input_ids[start:end])
        assert answer.endswith(decoded) and decoded.endswith("<eos>")
        merged = answer.removesuffix(decoded)  # into the header's new line
        assert merged == "" or (merged.isspace() and "\n" + merged in tokenizer.decode(sample.input_ids[start - 1]))


def test_a_newline_merged_into_the_header_is_not_trained_nor_scored():
    merging = {"role": "assistant", "content": "\n\nIt is so."}
    sample, _ = sft([USER, merging])
    assert TOKENIZER.decode(sample.input_ids[sample.trained_spans[0, 0] - 1]).endswith(">\n\n\n")
    pair = pair_of([USER, merging], [USER, OTHER])
    assert (pair.chosen_start, pair.rejected_start) == (1, 1)  # the prompt's last token is another on each side
    assert TOKENIZER.decode(pair.chosen_ids[1:]) == "It is so.<eos>"
    assert TOKENIZER.decode(pair.rejected_ids[1:]) == "no.<eos>"
    both = pair_of([USER, merging], [USER, {**merging, "content": merging["content"] + "!"}])
    assert (both.chosen_start, both.rejected_start) == (1, 1)  # the token is the same, and still not the prompt's


def test_what_a_template_prints_is_all_the_special_tokens_there_are():
    """No second BOS: Llama-3's template prints one, and a tokenizer that would add one is not asked to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=tiny_tokenizer.LLAMA3)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert tokenizer("x")["input_ids"][0] == bos
    sample, _ = sft([USER, ANSWER], resolve_template("tokenizer", tokenizer))
    assert sample.input_ids.tolist().count(bos) == 1 and sample.input_ids[0] == bos


def test_a_tokenizer_that_pads_and_truncates_by_itself_is_asked_to_do_neither():
    tokenizer = tiny_tokenizer.tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(2)
    encodings = encoded(Encoder(tokenizer, 100), ["why", "It is so."])
    assert [encoding.ids for encoding in encodings] == [ids_of("why"), ids_of("It is so.")]
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_offsets_are_those_of_the_bare_tokenizer():
    """A post-processor that trims white space off them would hide that a token begins in the header."""
    spaced = (
        "{% for message in messages %}{{ '\\n' + message.role + ': ' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=spaced)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = {"role": "assistant", "content": "answer. It is so."}
    sample, _ = sft([USER, answer], resolve_template("tokenizer", tokenizer))
    ((start, end),) = sample.trained_spans
    assert tokenizer.decode(sample.input_ids[start - 1]) == " answer"
    assert tokenizer.decode(sample.input_ids[start:end]) == ". It is so.<eos>"


@given(first=st.sampled_from(["so.", "\n\nso", "a", "é"]), second=st.sampled_from(["no", "aa", "\n"]))
@settings(deadline=None)
def test_position_0_is_no_target(first, second):
    """With a template that prints nothing before an answer, which then begins at position 0."""
    bare = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    template = resolve_template("tokenizer", tiny_tokenizer.tiny_tokenizer(chat_template=bare))
    one, other = ([{"role": "assistant", "content": content}] for content in (first, second))
    sample, _ = sft(one, template)
    assert sample.trained_spans.tolist() == [[1, len(sample.input_ids)]]
    if not second.isspace():
        pair = pair_of(one, other, template)
        assert len(pair.prompt_ids) == 0 and pair.chosen_start == pair.rejected_start == 1


@given(turns=TURNS, max_seq_length=st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_truncation_keeps_the_first_tokens_and_drops_what_has_no_target_left(turns, max_seq_length):
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        whole, _ = sft(messages)
    except Dropped:
        return
    kept = [[start, min(end, max_seq_length)] for start, end in whole.trained_spans if start < max_seq_length]
    if not kept:
        with pytest.raises(Dropped, match="no target token within max_seq_length"):
            sft(messages, max_seq_length=max_seq_length)
        return
    sample, truncated = sft(messages, max_seq_length=max_seq_length)
    assert sample.input_ids.tolist() == whole.input_ids[:max_seq_length].tolist()
    assert sample.trained_spans.tolist() == kept
    assert truncated == (len(whole.input_ids) > max_seq_length)


# --- pairs
@settings(deadline=None, max_examples=100)
@given(turns=TURNS, chosen=WORDS, rejected=WORDS, max_seq_length=st.integers(20, 120))
def test_both_sides_of_a_pair_are_whole_and_scored_from_the_completion_on(turns, chosen, rejected, max_seq_length):
    prompt = [{"role": role, "content": content} for role, content in turns]
    sides = [[*prompt, {"role": "assistant", "content": content}] for content in (chosen, rejected)]
    texts = [TULU.apply(side) for side in sides]
    header_end = len(texts[0]) - len(chosen + "<eos>")
    try:
        pair = pair_of(*sides, max_seq_length=max_seq_length)
    except Dropped as reason:
        assert (str(reason) == "empty completion") == (not chosen.strip() or not rejected.strip())
        assert str(reason) != "equal completions" or chosen == rejected
        if str(reason) == "prompt fills max_seq_length":
            lengths = [len(ids_of(text[:header_end])) for text in texts]
            assert max(lengths) >= max_seq_length - 1  # one less where a newline merges
        if str(reason) == "equal within max_seq_length":
            assert ids_of(texts[0])[:max_seq_length] == ids_of(texts[1])[:max_seq_length]
        return
    assert pair.chosen_ids.tolist() != pair.rejected_ids.tolist()
    for text, ids, start in zip(texts, pair[1:3], pair[3:], strict=True):
        whole = [*pair.prompt_ids.tolist(), *ids.tolist()]
        assert whole == ids_of(text)[:max_seq_length]
        offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        scored = len(pair.prompt_ids) + start
        assert scored < len(whole) and offsets[scored][0] >= header_end
        assert all(begin < header_end for begin, _ in offsets[:scored])
        assert all(end <= header_end for _, end in offsets[: len(pair.prompt_ids)])


def test_what_a_template_prints_after_a_completion_is_not_scored():
    ended = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token + '\n' }}{% endfor %}"
    ended += "{% if add_generation_prompt %}<assistant>{% endif %}"
    pair = pair_of([USER, ANSWER], [USER, OTHER], ChatTemplate("ended", ended, TOKENIZER))
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == TOKENIZER.eos_token_id


LONG, A_LOT = {**USER, "content": "why " * 50}, "so " * 50


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ([USER, ANSWER], [USER, ANSWER], "equal completions"),
        ([USER, ANSWER], [USER, {**OTHER, "content": ""}], "empty"),
        ([USER], [USER], "does not end with the assistant"),
        ([], [], "does not end with the assistant"),
        ([LONG, ANSWER], [LONG, OTHER], "prompt fills"),
        ([USER, ANSWER], [LONG, OTHER], "prompts of chosen and rejected differ"),
        ([USER, {**ANSWER, "content": A_LOT + "A"}], [USER, {**ANSWER, "content": A_LOT + "B"}], "equal within"),
        ([USER, {**ANSWER, "content": "\ud800"}], [USER, OTHER], "not valid Unicode"),
        ([LONG, ANSWER], None, "within"),
        ([USER, {**ANSWER, "content": "x\udc00"}], None, "not valid Unicode"),
    ],
)
def test_an_odd_conversation_or_pair_is_dropped_for_its_reason(chosen, rejected, reason):
    with pytest.raises(Dropped, match=reason):
        sft(chosen, max_seq_length=50) if rejected is None else pair_of(chosen, rejected, max_seq_length=50)


def test_a_text_that_the_tokenizer_cannot_take_costs_no_other():
    """A lone surrogate, and so much white space that the tokenizer's Rust panics."""
    encoder = Encoder(TOKENIZER, 100)
    first, surrogate, last = encoder.encode(["why?", "\ud800", "so."])
    again, panic, also = encoder.encode(["why?", " " * 10_000_000, "so."])
    assert first.ids == again.ids == ids_of("why?") and last.ids == also.ids == ids_of("so.")
    assert isinstance(surrogate, Dropped) and "Unicode" in str(surrogate)
    assert isinstance(panic, Dropped) and "tokenizer fails" in str(panic)
    encoder.backend = None
    with pytest.raises(AttributeError):  # what no text is to blame for is no reason to drop one
        encoder.encode(["why?"])
