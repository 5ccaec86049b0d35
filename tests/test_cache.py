"""The token cache: what is in it, what changes its key, and what breaks it.   pytest tests/test_cache.py"""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import cache as token_cache
from common.data import tokens as tokenization
from common.data.cache import BlockTokenizer, DamagedCache, TokenDataset, cache_key, prepare_tokens
from common.data.chat_template import TULU, ChatTemplate, resolve_template
from common.data.report import data_table, preview
from common.data.sources import load_source, parse_source
from common.data.tokens import Encoder, preference_pair, render_pair, sft_sample
from common.failures import UserError
from common.files import locked

REPO = Path(__file__).parents[1]


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


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A tokenizer's folder, the tokenizer, the tulu template; read-only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer.save_tokenizer(folder)
    return folder, tokenizer, resolve_template("tulu", tokenizer)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(kit, data, cache, kind="sft", say=lambda line: None):
    folder, tokenizer, template = kit
    mixer = [str(data)] if isinstance(data, str | Path) else data
    return prepare_tokens(kind, mixer, tokenizer, str(folder), template, 64, str(cache), say)


def left_in(cache: Path) -> list[str]:
    """What lies in a cache folder, beside its lock."""
    return sorted(path.name for path in (cache / "tokens").iterdir() if path.name != ".lock")


# --- what is in it
def test_an_sft_cache_holds_every_kept_sample_in_order(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_ROWS", 4)
    _, tokenizer, template = kit
    first = write(tmp_path / "first.jsonl", ROWS[:30])
    second = write(
        tmp_path / "second.jsonl",
        [ROWS[30], {"messages": [message("user", "alone")]}, {"prompt": "why 31?", "completion": "so."}],
    )
    ds = TokenDataset(prepare(kit, [f"{first}=50%", str(second)], tmp_path / "cache"))
    taken = np.random.RandomState(42).choice(30, size=15, replace=False)
    expected = [(CHATS[i], f"{first}:{i + 1}") for i in taken]
    expected += [(CHATS[30], f"{second}:1"), ([message("user", "why 31?"), message("assistant", "so.")], f"{second}:3")]
    assert len(ds) == len(expected) and ds.kind == "sft" and ds.pair_lengths is None
    num_truncated = 0
    for i, (chat, place) in enumerate(expected):
        text, spans = template.render(chat)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        sample = sft_sample(*Encoder(tokenizer, 64).encode([text]), spans)
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


def test_a_dpo_cache_holds_every_kept_pair_in_order(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_ROWS", 4)
    _, tokenizer, template = kit
    rows = [*PAIRS]
    rows[3] = {"prompt": "why?", "chosen": "so.", "rejected": "so."}
    rows[5] = {"prompt": "\ud800", "chosen": "so.", "rejected": "no."}
    ds = TokenDataset(prepare(kit, write(tmp_path / "pairs.jsonl", rows), tmp_path, kind="dpo"))
    kept = [i for i in range(40) if i not in (3, 5)]
    assert len(ds) == 38 and ds.kind == "dpo"
    assert ds.stats["dropped"] == {"equal completions": 1, "text is not valid Unicode": 1}
    for i, row in enumerate(kept):
        prompt, *completions = render_pair(*PAIRS[row].values(), template)
        encodings = Encoder(tokenizer, 64).encode([prompt + completion for completion in completions])
        pair = preference_pair(*encodings, len(prompt))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            np.testing.assert_array_equal(getattr(ds[i], name), getattr(pair, name))
            assert getattr(ds[i], name).dtype == np.int32
        lengths = [len(ids) for ids in pair[:3]]
        assert ds[i][3:] == pair[3:] and ds.source_of(i).endswith(f":{row + 1}")
        assert ds.pair_lengths[i].tolist() == lengths and ds.lengths[i] == sum(lengths)
        assert ds.num_targets[i] == lengths[1] - pair.chosen_start + lengths[2] - pair.rejected_start


def test_samples_are_read_only_views_of_the_file(kit, tmp_path):
    ds = TokenDataset(prepare(kit, write(tmp_path / "x.jsonl", ROWS), tmp_path))
    array = ds[3].input_ids
    assert not array.flags.writeable
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


ENDLESS = """\
{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
TOOL_CHAT = [message("user", "why?"), message("tool", "x"), message("tool", "y"), message("assistant", "so.")]


@pytest.mark.parametrize(
    "jinja, warned, times",
    [
        (TULU, "'tool': 18 of them", 1),
        (ENDLESS, "no token", 2),
        ("{#- strftime_now -#}" + TULU, "can print the date", 2),
    ],
)
def test_what_a_template_leaves_out_or_changes_is_warned_of(kit, tmp_path, jinja, warned, times):
    """Of left out messages while data is tokenized; the table shows them each time."""
    data, said = write(tmp_path / "x.jsonl", [{"messages": TOOL_CHAT}] * 9), []
    odd = (*kit[:2], ChatTemplate("odd", jinja, kit[1]))
    for _ in range(2):
        ds = TokenDataset(prepare(odd, data, tmp_path, say=said.append))
    assert len([line for line in said if line.startswith("warning") and warned in line]) == times
    assert ds.stats["unrendered_roles"] == ({} if jinja == ENDLESS else {"tool": 18})
    assert ("'tool'" in data_table(ds)) == (jinja != ENDLESS)


def test_preview_and_table_show_what_is_trained(kit, tmp_path):
    _, tokenizer, _ = kit
    data = write(tmp_path / "x.jsonl", [{"messages": CHATS[1][:2] + CHATS[0]}, {"messages": []}])
    ds = TokenDataset(prepare(kit, data, tmp_path))
    assert preview(ds, 0, tokenizer, colour=False) == (
        f"sample 0 ({data}:1):\n<|user|>\nwhy 1?\n<|assistant|>\n[[so 1.so 1.<eos>]]\n"
        "<|user|>\nwhy 0?\n<|assistant|>\n[[so 0.<eos>]]"
    )
    assert "\033[32mso 0.<eos>\033[0m" in preview(ds, 0, tokenizer, colour=True)
    table = data_table(ds)
    counted = ("rows read +2", "kept +1", "dropped +1", "no assistant message +1", f"tokens +{ds.lengths[0]}")
    for line in (*counted, f"target tokens +{ds.num_targets[0]}", "sha256 [0-9a-f]{64}"):
        assert re.search(line + "$", table, re.MULTILINE), (line, table)
    pairs = write(tmp_path / "pairs.jsonl", [PAIRS[1]])
    shown = preview(TokenDataset(prepare(kit, pairs, tmp_path, kind="dpo")), 0, tokenizer, colour=False)
    assert shown.endswith("<|assistant\n--- chosen:\n|>\n[[so 1.so 1.<eos>]]\n--- rejected:\n|>\n\n\n[[no.<eos>]]")


# --- what changes its key
def key_of(kit, data, max_seq_length=64, kind="sft", template=None):
    folder, tokenizer, tulu = kit
    tokenize = BlockTokenizer(kind, template or tulu, Encoder(tokenizer, max_seq_length))
    return cache_key(tokenize, [load_source(parse_source(str(data)))], str(folder))


@settings(deadline=None, max_examples=30)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_bit_of_a_row_or_of_a_tokenizer_file_changes_the_key(kit, tmp_path_factory, position, bit):
    data = write(tmp_path_factory.mktemp("key") / "x.jsonl", ROWS[:3])
    before = key_of(kit, data)
    for file in (data, kit[0] / "tokenizer.json", kit[0] / "tokenizer_config.json"):
        original = file.read_bytes()
        content = bytearray(original)
        content[position % len(content)] ^= 1 << bit
        file.write_bytes(content)
        assert key_of(kit, data) != before, file
        file.write_bytes(original)
    assert key_of(kit, data) == before


def test_length_kind_amount_template_and_code_change_the_key(kit, tmp_path, monkeypatch):
    _, tokenizer, tulu = kit
    data = write(tmp_path / "x.jsonl", ROWS)
    keys = [
        key_of(kit, data),
        key_of(kit, data, max_seq_length=65),
        key_of(kit, data, kind="dpo"),
        key_of(kit, f"{data}=50%"),
        key_of(kit, f"{data}=20"),
        key_of(kit, data, template=ChatTemplate("tulu", tulu.jinja + "{# #}", tokenizer)),
    ]
    other = tiny_tokenizer.tiny_tokenizer("gpt2")  # the files are the same, what was loaded from them is not
    keys.append(key_of((kit[0], other, tulu), data))
    other = tiny_tokenizer.tiny_tokenizer()
    other.eos_token = "<|im_end|>"
    keys.append(key_of((kit[0], other, ChatTemplate("tulu", tulu.jinja, other)), data))
    edited = tmp_path / "tokens.py"
    edited.write_bytes(Path(tokenization.__file__).read_bytes() + b"#")
    monkeypatch.setattr(tokenization, "__file__", str(edited))
    keys.append(key_of(kit, data))
    assert len(set(keys)) == len(keys)


def test_the_digest_is_of_what_is_trained_on_and_not_of_where_it_lies(kit, tmp_path):
    """A resume compares it: neither a moved file nor an edited comment in the code is other data."""
    chats = [[{"messages": chat} for chat in part] for part in (CHATS, CHATS, CHATS[:-1], [*CHATS[1:], CHATS[0]])]
    paths = [prepare(kit, write(tmp_path / f"{i}.jsonl", rows), tmp_path / "cache") for i, rows in enumerate(chats)]
    digests = [TokenDataset(path).digest for path in paths]
    assert len(set(paths)) == 4 and digests[0] == digests[1] and len(set(digests)) == 3


def test_using_the_tokenizer_does_not_change_the_key(kit, tmp_path):
    data = write(tmp_path / "x.jsonl", ROWS[:1])
    before = key_of(kit, data)
    kit[1](["a", "b c d e f"], truncation=True, max_length=2)
    assert kit[1].backend_tokenizer.truncation is not None
    assert key_of(kit, data) == before


def test_a_finished_cache_is_used_again_and_needs_no_lock_nor_write(kit, tmp_path, monkeypatch):
    data, said = write(tmp_path / "x.jsonl", ROWS), []
    path = prepare(kit, data, tmp_path)
    (tmp_path / "tokens/.lock").unlink()
    monkeypatch.setattr(token_cache, "_build", None)
    assert prepare(kit, data, tmp_path, say=said.append) == path and "before" in said[0]
    assert not (tmp_path / "tokens/.lock").exists()


# --- what breaks it
def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


@pytest.fixture(scope="module")
def finished(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    return Path(prepare(kit, write(folder / "x.jsonl", ROWS[:5]), folder))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_cache_with_one_changed_bit_is_never_used(finished, data):
    file = finished / data.draw(st.sampled_from(sorted(contents(finished))))
    original = file.read_bytes()
    position, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[position] ^= 1 << bit
    file.write_bytes(changed)
    try:
        TokenDataset(finished)
        assert file.name == "manifest.json" and json.loads(changed) == json.loads(original)  # white space
    except DamagedCache as error:
        assert isinstance(error, UserError) and str(finished) in str(error)
    finally:
        file.write_bytes(original)
    TokenDataset(finished)


DAMAGES = {
    "shorter": ("tokens.bin", lambda content: content[:-4]),
    "longer": ("marks.bin", lambda content: content + b"\0\0\0\0"),
    "missing": ("samples.bin", None),
    "no manifest": ("manifest.json", None),
    "empty manifest": ("manifest.json", lambda content: b""),
    "other manifest": ("manifest.json", lambda content: b'{"kind": "dpo"}'),
    "array": ("manifest.json", lambda content: b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_cache_is_named_and_built_again(kit, tmp_path, damage):
    data, said = write(tmp_path / "x.jsonl", ROWS), []
    path = Path(prepare(kit, data, tmp_path / "cache"))
    whole, (name, change) = contents(path), DAMAGES[damage]
    (path / name).unlink() if change is None else (path / name).write_bytes(change(whole[name]))
    with pytest.raises(DamagedCache):
        TokenDataset(path)
    assert prepare(kit, data, tmp_path / "cache", say=said.append) == str(path)
    assert contents(path) == whole and left_in(tmp_path / "cache") == [path.name]
    assert str(path) in said[0] and "again" in said[0]


GOOD = ROWS[0]


@pytest.mark.parametrize(
    "kind, rows, said",
    [
        ("sft", [GOOD, '{"messages": [{"role'], r"x\.jsonl:2: not valid JSON"),
        ("sft", [GOOD, GOOD, {"text": "x"}], r"x\.jsonl:3: .*messages"),
        ("sft", [{"messages": [message("user", "x")]}] * 3, r"x\.jsonl: no row is left.*3 x no assistant message"),
        ("dpo", [GOOD], r"x\.jsonl:1: .*chosen"),
        ("sft", [], r"x\.jsonl"),
    ],
)
def test_data_that_cannot_be_used_is_named_and_leaves_nothing(kit, tmp_path, kind, rows, said):
    data = tmp_path / "x.jsonl"
    data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with pytest.raises(UserError, match=said) as error:
        prepare(kit, data, tmp_path / "cache", kind=kind)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists() or left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_data_that_changes_while_it_is_read_leaves_nothing(kit, tmp_path, monkeypatch, suffix):
    """Same size and same modification time: the file was written over, then put back."""
    rows = [{"messages": chat} for chat in CHATS[:3]]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    build = token_cache._build

    def build_while_it_changes(*arguments):
        before, content = path.stat(), path.read_bytes()
        path.write_bytes(bytes(len(content)))
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return build(*arguments)

    monkeypatch.setattr(token_cache, "_build", build_while_it_changes)
    with pytest.raises(UserError, match=rf"data\{suffix}: was changed while it was read"):
        prepare(kit, path, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []
    monkeypatch.undo()
    prepare(kit, path, tmp_path / "cache")


def test_a_data_file_that_cannot_be_read_is_named_and_not_the_cache(kit, tmp_path, monkeypatch):
    def failing(rows):
        def read(indices):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return dataclasses.replace(rows, read=read)

    data, real = write(tmp_path / "x.jsonl", [{"messages": CHATS[0]}]), token_cache.load_source
    monkeypatch.setattr(token_cache, "load_source", lambda source: failing(real(source)))
    with pytest.raises(UserError, match=r"x\.jsonl: .*Input/output error") as error:
        prepare(kit, data, tmp_path / "cache")
    assert "cache_dir" not in str(error.value) and not list((tmp_path / "cache/tokens").glob("*.build"))


def test_a_cache_dir_that_cannot_be_written_is_named(kit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*file"):
        prepare(kit, write(tmp_path / "x.jsonl", [GOOD]), tmp_path / "file")


def test_a_write_that_fails_is_no_mistake_of_the_users_and_leaves_nothing(kit, tmp_path, monkeypatch):
    """A full disk stops training (exit 3): the error goes on as it is."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokens.bin")

    monkeypatch.setattr(token_cache, "_write_files", full)
    with pytest.raises(OSError, match=r"tokens\.bin"):
        prepare(kit, write(tmp_path / "x.jsonl", [GOOD]), tmp_path)
    assert left_in(tmp_path) == []


# --- several processes
def test_nothing_is_swept_up_while_somebody_builds_and_all_that_is_left_after(kit, tmp_path):
    data, said, waits = write(tmp_path / "x.jsonl", [GOOD]), [], threading.Event()
    half = tmp_path / "tokens/other.build/tokens.bin"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")

    def say(line):
        said.append(line)
        waits.set()

    second = threading.Thread(target=prepare, args=(kit, data, tmp_path), kwargs={"say": say})
    with locked(tmp_path / "tokens/.lock", waiting=pytest.fail):
        second.start()
        assert waits.wait(20) and "waiting" in said[0]
        time.sleep(0.1)
        assert second.is_alive() and left_in(tmp_path) == ["other.build"] and half.read_bytes() == b"half"
    second.join(20)
    (name,) = left_in(tmp_path)
    assert len(TokenDataset(tmp_path / "tokens" / name)) == 1


# prepare() builds the cache of x.jsonl in a folder.
SCRIPT = """
import os, pathlib, signal, sys, time
from transformers import PreTrainedTokenizerFast
from common.data import cache as token_cache
from common.data.chat_template import resolve_template

folder, tokenizer_folder = sys.argv[1:]
token_cache.BLOCK_ROWS = 8
tokenize = token_cache.BlockTokenizer.__call__

def prepare():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    template = resolve_template("tulu", tokenizer)
    return token_cache.prepare_tokens("sft", [folder + "/x.jsonl"], tokenizer, tokenizer_folder, template, 64,
                                      folder + "/cache", say=lambda line: print(line, flush=True))
"""


def start(kit, folder: Path, script: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script, str(folder), str(kit[0])],
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    return output


def test_of_two_builders_at_once_one_builds_and_both_use_it(kit, tmp_path):
    write(tmp_path / "x.jsonl", ROWS)
    script = """
build = token_cache._build
def build_when_the_other_waits(*arguments):
    time.sleep(2)
    build(*arguments)
token_cache._build = build_when_the_other_waits
pathlib.Path(folder, str(os.getpid()) + ".ready").touch()
while len(list(pathlib.Path(folder).glob("*.ready"))) < 2:
    time.sleep(0.01)
print(prepare())
"""
    builders = [start(kit, tmp_path, script), start(kit, tmp_path, script)]
    outputs = [finish(builder) for builder in builders]
    first, second = (output.splitlines()[-1] for output in outputs)
    assert first == second and len(TokenDataset(first)) == 40
    assert sorted(output.count("rows kept") for output in outputs) == [0, 1]
    assert sum(output.count("waiting") for output in outputs) == 1
    assert left_in(tmp_path / "cache") == [Path(first).name]


def test_kill_9_while_building_leaves_the_next_run_to_rebuild(kit, tmp_path):
    write(tmp_path / "x.jsonl", ROWS)
    killed = start(
        kit,
        tmp_path,
        """
num_blocks = 0
def kill_at_the_third(*arguments):
    global num_blocks
    num_blocks += 1
    if num_blocks == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return tokenize(*arguments)
token_cache.BlockTokenizer.__call__ = kill_at_the_third
prepare()
""",
    )
    finish(killed, -signal.SIGKILL)
    assert [Path(name).suffix for name in left_in(tmp_path / "cache")] == [".build"]
    path = prepare(kit, tmp_path / "x.jsonl", tmp_path / "cache")
    assert len(TokenDataset(path)) == 40 and left_in(tmp_path / "cache") == [Path(path).name]
