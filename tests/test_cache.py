"""The token cache: what is in it, what changes its key, and what breaks it.   pytest tests/test_cache.py"""

import builtins
import dataclasses
import errno
import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jinja2
import launch
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_tokenizer
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import refused
from models import write_jsonl as write
from tokenizers import processors

from common.config import SFTConfig
from common.data import cache as token_cache
from common.data import chat_template, conversations, dataset, limits, sources
from common.data import tokens as tokenization
from common.data.cache import BlockTokenizer, TokenDataset, cache_key, prepare_tokens
from common.data.chat_template import TULU, ChatTemplate, resolve_template
from common.data.conversations import Conversation
from common.data.report import data_table, preview
from common.data.sources import load_source, parse_source
from common.data.tokens import Encoder, preference_pair, render_pair, sft_sample
from common.failures import UserError
from common.files import locked


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


CHATS = [
    [message("user", f"why {i}?"), message("assistant", f"so {i}." * (1 + i % 7))] * (1 + i % 3) for i in range(40)
]
PAIRS = [
    {
        "chosen": [message("user", f"why {i}?"), message("assistant", f"so {i}." * (1 + i % 5))],
        "rejected": [message("user", f"why {i}?"), message("assistant", "\n\n" * (i % 2) + "no.")],
    }
    for i in range(40)
]
ROWS = [{"messages": chat} for chat in CHATS]
ANSWER = CHATS[0][1]


TOKENIZER = tiny_tokenizer.tiny_tokenizer()
TEMPLATE = resolve_template("tulu", TOKENIZER)


def prepare(data, cache, kind="sft", template=TEMPLATE, **flags) -> str:
    mixer = [str(data)] if isinstance(data, str | Path) else data
    flags = {"allow_dropped": True, "max_seq_length": 64, **flags}
    return prepare_tokens(kind, SFTConfig(dataset_mixer=mixer, cache_dir=str(cache), **flags), template)


def dataset_of(folder: Path, rows: list, **more) -> TokenDataset:
    """Of rows in folder/x.jsonl, with the cache beside it."""
    return TokenDataset(prepare(write(folder / "x.jsonl", rows), folder, **more))


def conversation(messages) -> Conversation:
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that are printed."""
    lines = []
    monkeypatch.setattr(token_cache, "print_line", lines.append)
    return lines


def left_in(cache: Path) -> list[str]:
    """What lies in a cache folder, beside its lock."""
    return sorted(path.name for path in (cache / "tokens").iterdir() if path.name != ".lock")


# --- what is in it
def test_an_sft_cache_holds_every_kept_sample_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_ROWS", 4)
    first = write(tmp_path / "first.jsonl", ROWS[:30])
    rows = [ROWS[30], {"messages": [message("user", "alone")]}, {"prompt": "why 31?", "completion": "so."}]
    second = write(tmp_path / "second.jsonl", rows)
    ds = TokenDataset(prepare([f"{first}=50%", str(second)], tmp_path / "cache"))
    taken = np.random.RandomState(42).choice(30, size=15, replace=False)
    expected = [(CHATS[i], f"{first}:{i + 1}") for i in taken]
    expected += [(CHATS[30], f"{second}:1"), ([message("user", "why 31?"), message("assistant", "so.")], f"{second}:3")]
    assert len(ds) == len(expected) and ds.kind == "sft" and ds.pair_lengths is None
    num_truncated = 0
    for i, (chat, place) in enumerate(expected):
        text, spans, _ = TEMPLATE.render(conversation(chat))
        whole = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        sample = sft_sample(*Encoder(TOKENIZER, 64).encode([text]), spans)
        assert ds[i].input_ids.tolist() == whole[:64]
        np.testing.assert_array_equal(ds[i].trained_spans, sample.trained_spans)
        assert (ds.source_of(i), ds.lengths[i]) == (place, len(whole[:64]))
        assert ds.num_targets[i] == sum(end - start for start, end in sample.trained_spans)
        num_truncated += len(whole) > 64
    assert ds[0].input_ids.dtype == ds[0].trained_spans.dtype == ds.lengths.dtype == ds.num_targets.dtype == np.int32
    with pytest.raises(IndexError):
        ds[len(ds)]
    stats = ds.stats
    assert (stats["rows_read"], stats["kept"], stats["truncated"]) == (18, 17, num_truncated) and num_truncated > 0
    assert stats["dropped"] == {"no assistant message": 1}
    assert stats["formats"] == {"messages": 17, "prompt+completion": 1}
    assert (stats["tokens"], stats["target_tokens"]) == (ds.lengths.sum(), ds.num_targets.sum())
    assert stats["length_percentiles"]["p50"] == int(np.median(ds.lengths))
    assert [(source["rows_used"], source["num_rows"]) for source in stats["sources"]] == [(15, 30), (3, 3)]


def test_a_dpo_cache_holds_every_kept_pair_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_ROWS", 4)
    rows = [*PAIRS]
    rows[3] = {"prompt": "why?", "chosen": "so.", "rejected": "so."}
    rows[5] = {"prompt": "\ud800", "chosen": "so.", "rejected": "no."}
    ds = dataset_of(tmp_path, rows, kind="dpo")
    kept = [i for i in range(40) if i not in (3, 5)]
    assert len(ds) == 38 and ds.kind == "dpo"
    assert ds.stats["dropped"] == {"equal completions": 1, "text is not valid Unicode": 1}
    for i, row in enumerate(kept):
        prompt, *completions, _ = render_pair(*map(conversation, PAIRS[row].values()), TEMPLATE)
        encodings = Encoder(TOKENIZER, 64).encode([prompt + completion for completion in completions])
        pair = preference_pair(*encodings, len(prompt))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            np.testing.assert_array_equal(getattr(ds[i], name), getattr(pair, name))
            assert getattr(ds[i], name).dtype == np.int32
        lengths = [len(ids) for ids in pair[:3]]
        assert ds[i][3:] == pair[3:] and ds.source_of(i).endswith(f":{row + 1}")
        assert ds.pair_lengths[i].tolist() == lengths and ds.lengths[i] == sum(lengths)
        assert ds.num_targets[i] == lengths[1] - pair.chosen_start + lengths[2] - pair.rejected_start


def test_a_pair_of_which_either_side_is_cut_is_truncated(tmp_path):
    sides = [[message("user", "why?"), message("assistant", answer)] for answer in ("so.", "so." * 99, "no.")]
    pairs = [{"chosen": sides[a], "rejected": sides[b]} for a, b in ((0, 1), (1, 0), (0, 2))]
    ds = dataset_of(tmp_path, pairs, kind="dpo")
    assert ds.is_truncated.tolist() == [True, True, False] and ds.stats["truncated"] == 2


def test_a_sample_knows_its_file_where_a_source_is_of_several(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ROWS[:1]) for name in ("a0", "a1", "b")]
    ds = TokenDataset(prepare([f"{tmp_path}/a*.jsonl", str(files[2])], tmp_path))
    assert [ds.source_of(i) for i in range(3)] == [f"{file}:1" for file in files] and ds.source.tolist() == [0, 0, 1]


def test_samples_are_read_only_views_of_the_file(tmp_path):
    ds = dataset_of(tmp_path, ROWS)
    array = ds[3].input_ids
    assert not array.flags.writeable
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


ENDLESS = """\
{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
TOOL_CHAT = [message("user", "why?"), message("tool", "x"), message("tool", "y"), message("assistant", "so.")]


ODD_TEMPLATES = [
    (TULU, "'tool': 18 of them", 1),
    (ENDLESS, "no token", 2),
    ("{#- strftime_now -#}" + TULU, "can print the day's date", 2),
]


@pytest.mark.parametrize("jinja, warned, times", ODD_TEMPLATES)
def test_what_a_template_leaves_out_or_changes_is_warned_of(tmp_path, said, jinja, warned, times):
    """Of left out messages while data is tokenized; the table shows them each time."""
    data = write(tmp_path / "x.jsonl", [{"messages": TOOL_CHAT}] * 9)
    for _ in range(2):
        ds = TokenDataset(prepare(data, tmp_path, template=ChatTemplate("odd", jinja, TOKENIZER)))
    assert len([line for line in said if line.startswith("warning") and warned in line]) == times
    assert ds.stats["unrendered_roles"] == ({} if jinja == ENDLESS else {"tool": 18})
    assert ("\n  tool " in data_table(ds)) == (jinja != ENDLESS)


def test_preview_and_table_show_what_is_trained(tmp_path, monkeypatch):
    data = write(tmp_path / "x.jsonl", [{"messages": CHATS[1][:2] + CHATS[0]}, {"messages": []}])
    ds = TokenDataset(prepare(data, tmp_path))
    turns = "<|user|>\nwhy 1?\n<|assistant|>\n[[so 1.so 1.<eos>]]\n<|user|>\nwhy 0?\n<|assistant|>\n[[so 0.<eos>]]"
    assert preview(ds, 0, TOKENIZER) == f"sample 0 ({data}:1):\n{turns}"
    table = data_table(ds)
    counted = ["rows read +2", "kept +1", "dropped +1", "no assistant message +1; first .*x.jsonl:2"]
    for line in (*counted, f"tokens +{ds.lengths[0]}", f"target tokens +{ds.num_targets[0]}", "sha256 [0-9a-f]{64}"):
        assert re.search(line + "$", table, re.MULTILINE), (line, table)
    shown = preview(dataset_of(tmp_path, [PAIRS[1]], kind="dpo"), 0, TOKENIZER)
    assert shown.endswith("<|assistant\n--- chosen:\n|>\n[[so 1.so 1.<eos>]]\n--- rejected:\n|>\n\n\n[[no.<eos>]]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[32mso 0.<eos>\033[0m" in preview(ds, 0, TOKENIZER)


COMMON = "a style {% for tool in tools or [] %}{{ tool.name + tool['function'].name }}{% endfor %}" + TULU
READING = "{% set m = messages[0] %}{{ m['user'] if 'a' in m and m.get('b') else m.reasoning_content }}"
PROMPTED = {"prompt": "x", "completion": "y"}
NAMED = "{% for m in messages %}{{ m.role + m.name + style + m.content + eos_token }}{% endfor %}"


IGNORED = [
    ({**ROWS[0], "score": 3, "labels": None}, TULU, {"column 'score'", "column 'labels'"}),
    ({**ROWS[0], "tools": [], "system": "be", "prompt": "x"}, TULU, {"column 'prompt'"}),
    ({**PROMPTED, "messages": None, "text": "z"}, TULU, {"column 'messages'", "column 'text'"}),
    ({"messages": [{**ANSWER, "loss_weight": 0.3, "name": "x"}]}, TULU, {"key 'loss_weight'", "key 'name'"}),
    ({"messages": [{**ANSWER, "loss_weight": 0.3, "name": "x"}]}, NAMED, {"key 'loss_weight'"}),
    ({"messages": [{**ANSWER, "name": None, "weight": 1}]}, TULU, set()),
    ({**ROWS[0], "chat_template_kwargs": {"style": "a"}}, TULU, {"'style' of chat"}),
    ({**ROWS[0], "chat_template_kwargs": {"role": "a"}}, "a role of your own" + TULU, {"'role' of chat"}),
    ({"messages": [{**ANSWER, "user": "x", "style": 1}]}, COMMON, {"key 'user'", "key 'style'"}),
    ({"messages": [{**ANSWER, "name": "y"}]}, COMMON, {"key 'name'"}),
    ({"messages": [{**ANSWER, "user": "x", "a": 1, "b": 1, "reasoning": "y"}]}, READING + COMMON, set()),
]


@pytest.mark.parametrize("row, jinja, ignored", IGNORED)
def test_what_nothing_acts_on_is_named_with_its_place(tmp_path, row, jinja, ignored):
    template = ChatTemplate("odd", jinja.replace("+ m.name + style", "~ m.name ~ style"), TOKENIZER)
    data = write(tmp_path / "x.jsonl", [{**row, "id": 1}] * 3)
    ds = TokenDataset(prepare(data, tmp_path, template=template))
    names = {*ignored, "column 'id'"}
    assert len(ds.stats["ignored"]) == len(names)
    table = data_table(ds)
    for name in names:
        assert re.search(rf"^  {name}.* 3; first {data}:1$", table, re.MULTILINE), (name, table)


def test_columns_that_are_not_even_read_are_named(tmp_path):
    table = pyarrow.Table.from_pylist([{**row, "score": 1.0} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert TokenDataset(prepare(tmp_path / "x.parquet", tmp_path)).stats["ignored"] == {"column 'score'": 40}


ODD = {"messages": [{"role": "user", "content": 3}]}


@pytest.mark.parametrize("num_odd", [0, 3, 4, 5, 20])
def test_a_source_that_loses_more_than_a_tenth_of_its_rows_stops_a_run(tmp_path, said, num_odd):
    """With the table, each time; not the other sources of a run, and not with --allow_dropped."""
    odd = write(tmp_path / "odd.jsonl", [ODD] * num_odd + ROWS[num_odd:])
    good = write(tmp_path / "good.jsonl", [{"messages": 3}, *ROWS * 10])  # its reason is not the other's
    mixer = [str(good), str(odd)]
    for _ in range(2):
        if num_odd <= 4:
            prepare(mixer, tmp_path, allow_dropped=False)
        else:
            with pytest.raises(UserError, match=rf"odd\.jsonl: {num_odd} of 40 .*\({num_odd} x [^;]*int\); --allow_dr"):
                prepare(mixer, tmp_path, allow_dropped=False)
            assert re.search(rf"the content of .* {num_odd}; first {odd}:1$", said[-1], re.MULTILINE)
    ds = TokenDataset(prepare(mixer, tmp_path))
    assert [source["rows_dropped"] for source in ds.stats["sources"]] == [1, num_odd] and len(ds) == 440 - num_odd


def with_bos(tokenizer):
    """One that begins a text with its BOS."""
    bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = bos
    return tokenizer


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab c\n"), min_size=1, max_size=90), ends=st.tuples(*[st.booleans()] * 3))
def test_a_text_is_trained_whole_up_to_an_eos(tmp_path_factory, text, ends):
    """Begun as the tokenizer begins a text; the BOS and EOS that it holds itself are not put there again."""
    has_eos, adds_bos, has_bos = ends
    tokenizer = tiny_tokenizer.tiny_tokenizer()
    tokenizer = with_bos(tokenizer) if adds_bos else tokenizer
    folder = tmp_path_factory.mktemp("text")
    begun = "<bos>" * (adds_bos and has_bos) + text
    rows = [{"text": begun + "<eos>" * has_eos}, {"text": "so."}]
    ds = dataset_of(folder, rows, template=resolve_template("tulu", tokenizer))
    if text.strip():
        expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert ds[0].input_ids.tolist() == expected[:64]
        assert ds[0].trained_spans.tolist() == [[1, len(expected[:64])]]
    else:
        assert (has_eos or begun != text) == (len(ds) == 2)


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 9), min_size=2, max_size=80),
    trained=st.none() | st.lists(st.booleans(), min_size=80, max_size=80),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_tokens_are_trained_where_their_labels_say_so(tmp_path_factory, ids, trained, before, after):
    """And padding is left out."""
    columns = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if trained:
        columns["labels"] = [token if is_trained else -100 for token, is_trained in zip(ids, trained, strict=False)]
    pad = {"input_ids": [0], "attention_mask": [0], "labels": [-100]}
    row = {name: pad[name] * before + column + pad[name] * after for name, column in columns.items()}
    ds = dataset_of(tmp_path_factory.mktemp("ids"), [{"text": "so."}, row], max_seq_length=9)
    targets = {i for i in range(1, min(9, len(ids))) if not trained or trained[i]}
    assert len(ds) == 1 + bool(targets)
    if targets:
        assert ds[1].input_ids.tolist() == ids[:9]
        assert {i for start, end in ds[1].trained_spans for i in range(start, end)} == targets
        assert ds.stats["largest_token_id"] == max(*ds[0].input_ids, *ids[:9])


NO_TOKENS = [[1, 2, len(TOKENIZER)], [1, -2, 3], [1, 2.5], [1, "2"], [[1, 2], [3]], 7, []]
NO_LABELS = [[1, 2], [2, 3, 4], [1, -100, -100]]  # of tokens 1, 2, 3
UNUSABLE = [{"input_ids": ids} for ids in NO_TOKENS] + [{"input_ids": [1, 2, 3], "labels": ids} for ids in NO_LABELS]


@pytest.mark.parametrize("row", [*UNUSABLE, {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 0]}])
def test_tokens_that_cannot_be_used_are_dropped(tmp_path, row):
    ds = dataset_of(tmp_path, [{"text": "so."}, row])
    assert len(ds) == 1 and sum(ds.stats["dropped"].values()) == 1


def test_the_runs_chat_template_kwargs_reach_the_template_and_key_the_cache(tmp_path):
    template = ChatTemplate("odd", TULU.replace("'<|user|>\\n'", "'<|user|>' + style|default('') + '\\n'"), TOKENIZER)
    data = write(tmp_path / "x.jsonl", [*ROWS, {**ROWS[0], "chat_template_kwargs": {"style": "b"}}])
    prepared = partial(prepare, data, tmp_path, template=template)
    plain, styled = (TokenDataset(prepared(chat_template_kwargs=kwargs)) for kwargs in (None, '{"style": "a"}'))
    assert plain.folder != styled.folder
    for ds, style in ((plain, ""), (styled, "a")):
        for i, own in ((0, style), (40, "b")):
            assert TOKENIZER.decode(ds[i].input_ids).startswith(f"<|user|>{own}\nwhy")
    for wrong in ("[1]", "{style: a}"):
        with pytest.raises(UserError, match="--chat_template_kwargs"):
            prepare(data, tmp_path, template=template, chat_template_kwargs=wrong)


def test_a_row_that_is_taken_twice_is_trained_twice(tmp_path):
    ds = TokenDataset(prepare(f"{write(tmp_path / 'x.jsonl', ROWS)}=250%", tmp_path))
    assert len(ds) == 100 and ds.source_of(0) == ds.source_of(40) == f"{tmp_path}/x.jsonl:1"
    assert [i for i in ds.samples_of(f"{tmp_path}/x.jsonl:1") if i < 80] == [0, 40]


# --- what changes its key
def key_of(data, max_seq_length=64, kind="sft", template=TEMPLATE) -> str:
    tokenize = BlockTokenizer(kind, SFTConfig(max_seq_length=max_seq_length), template)
    return cache_key(tokenize, [load_source(parse_source(str(data)))])


@contextmanager
def one_bit_changed(file: Path, position: int, bit: int):
    original = file.read_bytes()
    changed = bytearray(original)
    changed[position % len(changed)] ^= 1 << bit
    file.write_bytes(changed)
    yield original, changed
    file.write_bytes(original)


@settings(deadline=None, max_examples=30)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_bit_of_a_row_changes_the_key(tmp_path_factory, position, bit):
    data = write(tmp_path_factory.mktemp("key") / "x.jsonl", ROWS[:3])
    before = key_of(data)
    with one_bit_changed(data, position, bit):
        assert key_of(data) != before
    assert key_of(data) == before


def test_all_that_tokens_depend_on_changes_the_key_and_using_the_tokenizer_does_not(tmp_path, monkeypatch):
    data = write(tmp_path / "x.jsonl", ROWS)
    keys = [key_of(data), key_of(data, max_seq_length=65), key_of(data, kind="dpo")]
    keys += [key_of(f"{data}=50%"), key_of(f"{data}=20")]
    other_end, other_token = tiny_tokenizer.tiny_tokenizer(), tiny_tokenizer.tiny_tokenizer()
    other_end.eos_token = "<|im_end|>"
    other_token.add_tokens(["why"])
    for tokenizer in (tiny_tokenizer.tiny_tokenizer("gpt2"), other_end, other_token):
        keys.append(key_of(data, template=ChatTemplate("tulu", TULU, tokenizer)))
    keys.append(key_of(data, template=ChatTemplate("tulu", TULU + "{# #}", TOKENIZER)))
    TOKENIZER(["a", "b c d e f"], truncation=True, max_length=2)
    assert TOKENIZER.backend_tokenizer.truncation is not None and key_of(data) == keys[0]
    keys.append(key_of(data, template=ChatTemplate("tulu", TULU, with_bos(tiny_tokenizer.tiny_tokenizer()))))
    for module in (token_cache, sources, conversations, chat_template, limits, tokenization, dataset):
        edited = tmp_path / "edited.py"
        edited.write_bytes(Path(module.__file__).read_bytes() + b"#")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(edited))
            keys.append(key_of(data))
    for library in (np, jinja2, tokenizers, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            keys.append(key_of(data))
    assert len(set(keys)) == len(keys) and key_of(data) == keys[0]


def test_the_digest_is_of_what_is_trained_on_and_not_of_where_it_lies(tmp_path):
    """A resume compares it: neither a moved file nor an edited comment in the code is other data."""
    chats = [[{"messages": chat} for chat in part] for part in (CHATS, CHATS, CHATS[:-1], [*CHATS[1:], CHATS[0]])]
    paths = [prepare(write(tmp_path / f"{i}.jsonl", rows), tmp_path / "cache") for i, rows in enumerate(chats)]
    digests = [TokenDataset(path).digest for path in paths]
    assert len(set(paths)) == 4 and digests[0] == digests[1] and len(set(digests)) == 3


def test_a_finished_cache_is_used_again_and_needs_no_lock_nor_write(tmp_path, monkeypatch, said):
    data = write(tmp_path / "x.jsonl", ROWS)
    path = prepare(data, tmp_path)
    (tmp_path / "tokens/.lock").unlink()
    monkeypatch.setattr(token_cache, "_build", None)
    assert prepare(data, tmp_path) == path and "before" in said[-1]
    assert not (tmp_path / "tokens/.lock").exists()


# --- what breaks it
def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*dataset.FILES, "manifest.json"]), position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_cache_with_one_changed_bit_is_never_used(tmp_path_factory, name, position, bit):
    folder = tmp_path_factory.mktemp("bits")
    finished = dataset_of(folder, ROWS[:5]).folder
    with one_bit_changed(finished / name, position, bit) as (original, changed):
        try:
            TokenDataset(finished)
            assert name == "manifest.json" and json.loads(changed) == json.loads(original)  # white space
        except UserError as error:
            assert str(finished) in str(error)
    TokenDataset(finished)


TORN = [
    ("tokens.bin", lambda content: content[:-4]),
    ("marks.bin", lambda content: content + b"\0\0\0\0"),
    ("samples.bin", None),
    ("manifest.json", None),
    *(("manifest.json", lambda content, new=new: new) for new in (b"", b"[]", b'{"kind": "dpo"}')),
]


@pytest.mark.parametrize("name, change", TORN)
def test_a_torn_cache_is_refused_and_built_again(tmp_path, name, change):
    data = write(tmp_path / "x.jsonl", ROWS)
    path = Path(prepare(data, tmp_path / "cache"))
    whole = contents(path)
    (path / name).unlink() if change is None else (path / name).write_bytes(change(whole[name]))
    with pytest.raises(UserError, match=str(path)):
        TokenDataset(path)
    assert prepare(data, tmp_path / "cache") == str(path)
    assert contents(path) == whole and left_in(tmp_path / "cache") == [path.name]


NO_DATA = [
    ("sft", [ROWS[0], '{"messages": [{"role'], r"x\.jsonl:2: not valid JSON"),
    ("sft", [ROWS[0], ROWS[0], "[1]"], r"x\.jsonl:3: .*object"),
    ("sft", [ROWS[0], {"messages": [{**ANSWER, "weight": 0.5}]}], r"x\.jsonl:2: .*`weight`"),
    ("sft", [{"messages": [message("user", "x")]}] * 3, r"x\.jsonl: no row is left.*3 x no assistant message"),
    ("dpo", [ROWS[0]], r"x\.jsonl: no row is left.*messages"),
    ("sft", [], r"x\.jsonl"),
]


@pytest.mark.parametrize("kind, rows, said", NO_DATA)
def test_data_that_cannot_be_used_is_named_and_leaves_nothing(tmp_path, kind, rows, said):
    data = tmp_path / "x.jsonl"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with refused(said):
        prepare(data, tmp_path / "cache", kind=kind)
    assert not (tmp_path / "cache").exists() or left_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "text",
    ['{"data": [{"text": "so."}]}', '{\n"text": "so."\n}', '"so."', "[[1]]", "\ufeff{}\n", '{"text": "so."}\n{"text'],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_json_that_is_neither_an_array_of_rows_nor_a_row_a_line_is_named(tmp_path, text, encoding):
    (tmp_path / "x.json").write_text(text, encoding)
    with refused(r"x\.json"):
        prepare(tmp_path / "x.json", tmp_path / "cache", allow_dropped=False)


def test_the_rows_that_are_trained_on_are_those_whose_digest_is_recorded(tmp_path, monkeypatch):
    """Whatever happens to the file meanwhile."""
    for suffix in (".jsonl", ".parquet"):
        data = write(tmp_path / f"data{suffix}", ROWS)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), data)
        expected = contents(prepare(data, tmp_path / "before"))
        build = token_cache._build
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "_build", lambda *arguments: (data.write_bytes(b"{}"), build(*arguments)))
            assert contents(prepare(data, tmp_path / "during")) == expected


def test_a_row_that_cannot_be_read_names_the_data_and_not_the_cache(tmp_path, monkeypatch):
    def unreadable(indices):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    bad = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad, "completion": ["b"]}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        prepare(tmp_path / "bad.parquet", tmp_path / "cache")
    data, real = write(tmp_path / "x.jsonl", [ROWS[0]]), token_cache.load_source
    monkeypatch.setattr(token_cache, "load_source", lambda source: dataclasses.replace(real(source), read=unreadable))
    with pytest.raises(UserError, match=r"x\.jsonl: .*Input/output error"):
        prepare(data, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_cache_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*file"):
        prepare(write(tmp_path / "x.jsonl", [ROWS[0]]), tmp_path / "file")


def test_a_full_disk_is_no_mistake_of_the_users_and_leaves_nothing(tmp_path, monkeypatch):
    """It stops training (exit 3), with the place named."""
    monkeypatch.setattr(token_cache, "open", lambda file, mode: builtins.open("/dev/full", mode), raising=False)
    with pytest.raises(OSError, match=rf"No space left.*{tmp_path}"):
        prepare(write(tmp_path / "x.jsonl", [ROWS[0]]), tmp_path)
    assert left_in(tmp_path) == []


# --- several processes
def test_of_two_builders_at_once_one_builds_and_both_use_it(tmp_path, said, monkeypatch):
    data, build, built = write(tmp_path / "x.jsonl", ROWS), token_cache._build, []

    def build_when_the_other_waits(*arguments):
        while not any("waiting" in line for line in said):
            time.sleep(0.01)
        built.append(build(*arguments))

    monkeypatch.setattr(token_cache, "_build", build_when_the_other_waits)
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(prepare, [data] * 2, [tmp_path] * 2)
    assert first == second and len(TokenDataset(first)) == 40 and len(built) == 1
    assert sum("waiting" in line for line in said) == 1 and left_in(tmp_path) == [Path(first).name]


def killed_in_the_third_block(logs: str, data: str, cache: str) -> None:
    """In a process of its own."""
    tokenize, blocks = BlockTokenizer.__call__, []

    def counted(*arguments):
        blocks.append(arguments)
        return os.kill(os.getpid(), signal.SIGKILL) if len(blocks) == 3 else tokenize(*arguments)

    token_cache.BLOCK_ROWS, BlockTokenizer.__call__ = 8, counted
    prepare(data, cache)


def test_kill_9_while_building_leaves_the_next_run_to_rebuild_once_nobody_else_builds(tmp_path, said):
    arguments = str(write(tmp_path / "x.jsonl", ROWS)), str(tmp_path / "cache")
    assert launch.Run(killed_in_the_third_block, 1, arguments).wait().exit_codes == [-signal.SIGKILL]
    tokens = tmp_path / "cache/tokens"
    half, rebuilding = contents(tokens / "building"), threading.Thread(target=prepare, args=arguments)
    with locked(tokens / ".lock", waiting=pytest.fail):
        rebuilding.start()
        while not said:
            time.sleep(0.01)
        time.sleep(0.1)
        assert "waiting" in said[0] and rebuilding.is_alive()
        assert left_in(tokens.parent) == ["building"] and contents(tokens / "building") == half
    rebuilding.join(20)
    (name,) = left_in(tokens.parent)
    assert len(TokenDataset(tokens / name)) == 40
