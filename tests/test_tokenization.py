"""Rows to tokens: the reference vectors, formats, targets, truncation, drops.   pytest tests/test_tokenization.py"""

import json
import resource
import string
import time

import numpy as np
import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.data import tokens as tokenization
from common.data.chat_template import resolve_template
from common.data.tokens import Dropped, Encoder, preference_conversations, render_pair, sft_conversation
from common.failures import UserError

TOKENIZER = tiny_tokenizer.tiny_tokenizer()
ENCODER = Encoder(TOKENIZER)
TULU = resolve_template("tulu", TOKENIZER)
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}


def tokenize_sft(messages, template, encoder, max_seq_length):
    return tokenization.tokenize_sft(*template.render(messages), encoder, max_seq_length)


def tokenize_pair(chosen, rejected, template, encoder, max_seq_length):
    return tokenization.tokenize_pair(*render_pair(chosen, rejected, template), encoder, max_seq_length)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


# --- the reference run's tokens
@pytest.fixture(scope="session")
def llama3(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/llama3")
    return tokenizer, Encoder(tokenizer), resolve_template("tulu", tokenizer)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name, max_seq_length", [("instructions", 256), ("conversations", 1024)])
def test_sft_tokens_and_spans_are_the_reference_runs(shared, llama3, name, max_seq_length):
    _, encoder, template = llama3
    rows = rows_of(shared / f"data/{name}.jsonl")
    expected = rows_of(shared / f"data/expected/{name}.tulu.{max_seq_length}.jsonl")
    assert len(rows) == len(expected) > 0
    for row, vector in zip(rows, expected, strict=True):
        sample, truncated = tokenize_sft(sft_conversation(row)[1], template, encoder, max_seq_length)
        assert sample.input_ids.tolist() == vector["input_ids"] and sample.input_ids.dtype == np.int32
        assert sample.trained_spans.tolist() == vector["trained_spans"] and sample.trained_spans.dtype == np.int32
        assert not truncated or len(sample.input_ids) == max_seq_length


def test_preference_tokens_are_the_reference_runs(shared, llama3):
    _, encoder, template = llama3
    rows, num_dropped = rows_of(shared / "data/preferences.jsonl"), 0
    for row, vector in zip(rows, rows_of(shared / "data/expected/preferences.tulu.1024.jsonl"), strict=True):
        if vector["dropped"]:
            num_dropped += 1
            with pytest.raises(Dropped, match="prompt fills max_seq_length"):
                tokenize_pair(*preference_conversations(row)[1:], template, encoder, 1024)
            continue
        pair, _ = tokenize_pair(*preference_conversations(row)[1:], template, encoder, 1024)
        assert len(pair.prompt_ids) == vector["prompt_length"]
        assert [*pair.prompt_ids, *pair.chosen_ids] == vector["chosen_input_ids"]
        assert [*pair.prompt_ids, *pair.rejected_ids] == vector["rejected_input_ids"]
        assert pair.chosen_start == pair.rejected_start == 0
    assert num_dropped > 0


# --- formats
@pytest.mark.parametrize(
    "row, form",
    [
        ({"messages": [USER, ANSWER], "id": 3}, "messages"),
        ({"prompt": "why?", "completion": "so."}, "prompt+completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt+completion"),
        ({"prompt": "why?", "completion": [ANSWER]}, "prompt+completion"),
        (
            {
                "messages": [
                    {**USER, "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]},
                    {**ANSWER, "content": ["so", "."], "name": None},
                ]
            },
            "messages",
        ),
    ],
)
def test_every_sft_format_is_the_same_conversation(row, form):
    assert sft_conversation(row) == (form, [USER, ANSWER])


OTHER = {"role": "assistant", "content": "no."}


@pytest.mark.parametrize(
    "row, form",
    [
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen+rejected"),
        ({"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen+rejected"),
        ({"prompt": "why?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen+rejected"),
        ({"prompt": "why?", "chosen": "so.", "rejected": "no."}, "prompt+chosen+rejected"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, "prompt+chosen+rejected"),
        ({"prompt": "why?", "chosen": [ANSWER], "rejected": "no."}, "prompt+chosen+rejected"),
    ],
)
def test_every_preference_format_is_the_same_pair(row, form):
    assert preference_conversations(row) == (form, [USER, ANSWER], [USER, OTHER])


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "x", "id": 1}, "text, id"),
        ({}, "empty row"),
        ({"chosen": [], "rejected": []}, "for DPO"),
        ({"messages": None}, "null"),
        ({"messages": "hi"}, "list of messages, not a str"),
        ({"messages": ["hi"]}, "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2.*null"),
        ({"messages": [{"role": 7, "content": "x"}]}, "role must be a text, not a int"),
        ({"messages": [{"from": "human", "value": "x"}]}, "role must be a text, not null"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a text, not a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, "not image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "parts of type text"),
        ({"prompt": 1, "completion": "x"}, "`prompt`"),
        ({"prompt": "x", "completion": None}, "`completion`.*null"),
    ],
)
def test_an_sft_row_of_another_shape_is_refused(row, said):
    with pytest.raises(UserError, match=said) as error:
        sft_conversation(row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [USER, ANSWER]}, "columns `chosen` and `rejected`, not messages"),
        ({"chosen": "so.", "rejected": "no."}, "`chosen` must be a list of messages"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "differ, first at message 1"),
        ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER]}, "differ, first at message 2"),
        (
            {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, OTHER, USER, OTHER]},
            "differ, first at message 2",
        ),
        ({"chosen": [USER, ANSWER], "rejected": None}, "`rejected`.*null"),
    ],
)
def test_a_preference_row_of_another_shape_is_refused(row, said):
    with pytest.raises(UserError, match=said):
        preference_conversations(row)


# --- targets
WORDS = st.text(st.sampled_from("ab cd\n\té漢🙂<|>1'"), max_size=12)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), WORDS), min_size=1, max_size=7)


@settings(deadline=None, max_examples=100)
@given(turns=TURNS, words=st.sampled_from(["llama3", "gpt2"]))
def test_decoded_targets_are_the_assistant_contents_and_their_eos(turns, words):
    messages = [{"role": role, "content": content} for role, content in turns]
    answers = [content + "<eos>" for role, content in turns if role == "assistant"]
    tokenizer, encoder, template = KITS[words]
    try:
        sample, truncated = tokenize_sft(messages, template, encoder, 10_000)
    except Dropped:
        assert not answers
        return
    assert sample.input_ids.tolist() == tokenizer(template.render(messages)[0], add_special_tokens=False)["input_ids"]
    assert not truncated and len(sample.trained_spans) == len(answers)
    for (start, end), answer in zip(sample.trained_spans, answers, strict=True):
        decoded = tokenizer.decode(sample.input_ids[start:end])
        assert answer.endswith(decoded) and decoded.endswith("<eos>")
        merged = answer.removesuffix(decoded)  # into the header's new line
        assert merged == "" or (merged.isspace() and "\n" + merged in tokenizer.decode(sample.input_ids[start - 1]))


KITS = {}
for _words in ("llama3", "gpt2"):
    _tokenizer = tiny_tokenizer.tiny_tokenizer(_words)
    KITS[_words] = _tokenizer, Encoder(_tokenizer), resolve_template("tulu", _tokenizer)


def test_a_newline_merged_into_the_header_is_not_trained_nor_scored():
    content = "\n\nIt is so."
    sample, _ = tokenize_sft([USER, {"role": "assistant", "content": content}], TULU, ENCODER, 100)
    pair, _ = tokenize_pair([USER, {"role": "assistant", "content": content}], [USER, OTHER], TULU, ENCODER, 100)
    assert TOKENIZER.decode(sample.input_ids[sample.trained_spans[0, 0] - 1]).endswith(">\n\n\n")
    assert (pair.chosen_start, pair.rejected_start) == (1, 1)  # the prompt's last token is another on each side
    assert TOKENIZER.decode(pair.chosen_ids[1:]) == "It is so.<eos>"
    assert TOKENIZER.decode(pair.rejected_ids[1:]) == "no.<eos>"
    both, _ = tokenize_pair(
        [USER, {"role": "assistant", "content": content}],
        [USER, {"role": "assistant", "content": content + "!"}],
        TULU,
        ENCODER,
        100,
    )
    assert (both.chosen_start, both.rejected_start) == (1, 1)  # the token is the same, and still not the prompt's


def test_what_a_template_prints_is_all_the_special_tokens_there_are():
    """No second BOS: Llama-3's template prints one, and a tokenizer that would add one is not asked to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=tiny_tokenizer.LLAMA3)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert tokenizer("x")["input_ids"][0] == bos
    sample, _ = tokenize_sft([USER, ANSWER], resolve_template("tokenizer", tokenizer), Encoder(tokenizer), 100)
    assert sample.input_ids.tolist().count(bos) == 1 and sample.input_ids[0] == bos


def test_offsets_are_those_of_the_bare_tokenizer():
    """A post-processor that trims white space off them would hide that a token begins in the header."""
    spaced = (
        "{% for message in messages %}{{ '\\n' + message.role + ': ' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=spaced)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = {"role": "assistant", "content": "answer. It is so."}
    sample, _ = tokenize_sft([USER, answer], resolve_template("tokenizer", tokenizer), Encoder(tokenizer), 100)
    ((start, end),) = sample.trained_spans
    assert tokenizer.decode(sample.input_ids[start - 1]) == " answer"
    assert tokenizer.decode(sample.input_ids[start:end]) == ". It is so.<eos>"


def test_position_0_is_no_target():
    bare = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=bare)
    sample, _ = tokenize_sft([ANSWER], resolve_template("tokenizer", tokenizer), Encoder(tokenizer), 100)
    assert sample.trained_spans.tolist() == [[1, len(sample.input_ids)]]


@given(turns=TURNS, max_seq_length=st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_truncation_keeps_the_first_tokens_and_drops_what_has_no_target_left(turns, max_seq_length):
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        whole, _ = tokenize_sft(messages, TULU, ENCODER, 10_000)
    except Dropped:
        return
    kept = [(start, min(end, max_seq_length)) for start, end in whole.trained_spans if start < max_seq_length]
    if not kept:
        with pytest.raises(Dropped, match="no target token within max_seq_length"):
            tokenize_sft(messages, TULU, ENCODER, max_seq_length)
        return
    sample, truncated = tokenize_sft(messages, TULU, ENCODER, max_seq_length)
    assert sample.input_ids.tolist() == whole.input_ids[:max_seq_length].tolist()
    assert [tuple(span) for span in sample.trained_spans] == kept
    assert truncated == (len(whole.input_ids) > max_seq_length)


# --- pairs
@settings(deadline=None, max_examples=100)
@given(turns=TURNS, chosen=WORDS, rejected=WORDS, max_seq_length=st.integers(20, 120))
def test_both_sides_of_a_pair_are_whole_and_scored_from_the_completion_on(turns, chosen, rejected, max_seq_length):
    prompt = [{"role": role, "content": content} for role, content in turns]
    sides = [[*prompt, {"role": "assistant", "content": content}] for content in (chosen, rejected)]
    texts = [TULU.render(side)[0] for side in sides]
    header_end = len(texts[0]) - len(chosen + "<eos>")
    try:
        pair, _ = tokenize_pair(*sides, TULU, ENCODER, max_seq_length)
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
    for text, ids, start in (
        (texts[0], pair.chosen_ids, pair.chosen_start),
        (texts[1], pair.rejected_ids, pair.rejected_start),
    ):
        whole = [*pair.prompt_ids.tolist(), *ids.tolist()]
        assert whole == ids_of(text)[:max_seq_length]
        offsets = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        scored = len(pair.prompt_ids) + start
        assert scored < len(whole) and offsets[scored][0] >= header_end
        assert all(begin < header_end for begin, _ in offsets[:scored])
        assert all(end <= header_end for _, end in offsets[: len(pair.prompt_ids)])


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ([USER, ANSWER], [USER, ANSWER], "equal completions"),
        ([USER, ANSWER], [USER, {**OTHER, "content": ""}], "empty"),
        ([USER], [USER], "does not end with the assistant"),
        ([], [], "does not end with the assistant"),
        ([USER, USER], [USER, USER], "does not end with the assistant"),
        ([{**USER, "content": "why " * 50}, ANSWER], [{**USER, "content": "why " * 50}, OTHER], "prompt fills"),
        (
            [USER, {**ANSWER, "content": "so " * 50 + "A"}],
            [USER, {**ANSWER, "content": "so " * 50 + "B"}],
            "equal within",
        ),
        ([{**USER, "content": "\ud800"}, ANSWER], [{**USER, "content": "\ud800"}, OTHER], "not valid Unicode"),
    ],
)
def test_an_odd_pair_is_dropped_for_its_reason(chosen, rejected, reason):
    with pytest.raises(Dropped, match=reason):
        tokenize_pair(chosen, rejected, TULU, ENCODER, 50)


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "no assistant message"),
        ([USER], "no assistant message"),
        ([{**USER, "content": "why " * 50}, ANSWER], "within"),
        ([USER, {**ANSWER, "content": "x\udc00"}], "not valid Unicode"),
    ],
)
def test_an_odd_conversation_is_dropped_for_its_reason(messages, reason):
    with pytest.raises(Dropped, match=reason):
        tokenize_sft(messages, TULU, ENCODER, 30)


def test_a_pair_with_two_renderings_of_its_prompt_is_refused():
    class TwoFaced:
        name, closing = "two-faced", "<eos>"

        def render(self, messages, only_last):
            prompt = f"({len(messages[-1]['content'])})"
            text = prompt + messages[-1]["content"] + "<eos>"
            return text, [(len(prompt), len(text))]

    with pytest.raises(UserError, match="two-faced"):
        render_pair([USER, ANSWER], [USER, {**OTHER, "content": "longer"}], TwoFaced())


def test_a_row_that_the_template_refuses_is_dropped():
    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=tiny_tokenizer.MISTRAL)
    with pytest.raises(Dropped, match="roles must alternate"):
        tokenize_sft([USER, USER, ANSWER], resolve_template("tokenizer", tokenizer), Encoder(tokenizer), 30)


# --- long texts
RUNS = st.tuples(
    st.sampled_from(
        [
            " ",
            "\n",
            " \n",
            "a",
            "1",
            "é",
            "漢",
            "!",
            "<|",
            "<eos>",
            "<|im_",
            "<|im_start|>",
            "ab ",
            "\t",
            "e\u0301",
            "\u0301",
            "'s",
            "\r\n",
            "🙂",
        ]
    ),
    st.integers(1, 60),
)
LONG = st.lists(RUNS, min_size=1, max_size=40).map(lambda runs: "".join(text * count for text, count in runs))
ENCODERS = {words: Encoder(tiny_tokenizer.tiny_tokenizer(words)) for words in ("llama3", "gpt2", "metaspace", "none")}


@pytest.mark.parametrize("words", ENCODERS)
@settings(deadline=None, max_examples=150)
@given(text=LONG, max_tokens=st.integers(1, 40), chars_per_token=st.integers(1, 8))
def test_the_beginning_of_a_text_gives_the_first_tokens_of_the_whole(words, text, max_tokens, chars_per_token):
    encoder, whole = ENCODERS[words], ENCODERS[words].backend.encode(text, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "CHARS_PER_TOKEN", chars_per_token)
        patch.setattr(tokenization, "SPARE_CHARS", 100)  # so that beginnings are cut everywhere
        encoding, truncated = encoder.encode(text, max_tokens)
    assert encoding.ids == whole.ids[:max_tokens] and encoding.offsets == whole.offsets[:max_tokens]
    assert truncated == (len(whole.ids) > max_tokens)


def test_the_beginning_of_a_text_gives_the_first_llama3_tokens(shared, llama3, monkeypatch):
    monkeypatch.setattr(tokenization, "CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(tokenization, "SPARE_CHARS", 200)
    _, encoder, template = llama3
    for row in rows_of(shared / "data/conversations.jsonl")[:60]:
        text = template.render(row["messages"])[0]
        whole = encoder.backend.encode(text, add_special_tokens=False).ids
        for max_tokens in (1, 50, 200, 400):
            assert encoder.encode(text, max_tokens)[0].ids == whole[:max_tokens]


def test_a_word_or_an_added_token_that_the_beginning_cuts_is_not_trusted(monkeypatch):
    """Both are made so that their first token depends on their last character."""
    letters = string.ascii_letters
    pairs = [(letters[i], letters[i + 1]) for i in reversed(range(len(letters) - 1))]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, pairs), "!", "<", ">"])}
    many_words = "<" + " x" * 40 + ">"
    monkeypatch.setattr(tokenization, "CHARS_PER_TOKEN", 0)
    for added, text in (([], f"a {letters} "), ([many_words], f"a {many_words} ")):
        backend = Tokenizer(models.BPE(vocabulary, pairs))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens(added)
        encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
        text += "b ! " * 40
        for size in range(1, len(text)):
            monkeypatch.setattr(tokenization, "SPARE_CHARS", size)
            assert encoder.encode(text, 2)[0].ids == backend.encode(text).ids[:2], size


def test_a_text_that_makes_the_tokenizer_panic_is_dropped():
    class PanicException(BaseException):  # as pyo3's: not an Exception
        pass

    class Panicking:
        def encode(self, *_, **__):
            raise PanicException("retry-limit-in-match over")

    encoder = Encoder(TOKENIZER)
    encoder.backend = Panicking()
    with pytest.raises(Dropped, match="tokenizer fails"):
        encoder.encode("  ", 10)


def test_a_10_mb_message_costs_no_more_than_its_beginning():
    content = "It is so because the answer is 42.\n" * 300_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    sample, truncated = tokenize_sft([USER, {**ANSWER, "content": content}, USER, ANSWER], TULU, ENCODER, 4096)
    assert truncated and len(sample.input_ids) == 4096 and len(sample.trained_spans) == 1
    assert sample.input_ids.tolist() == ids_of(TULU.render([USER, {**ANSWER, "content": content[:100_000]}])[0])[:4096]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; whole, it takes gigabytes
    assert time.perf_counter() - started < 10
