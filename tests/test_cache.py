"""The token cache: what is in it, what changes its key, and what breaks it.   pytest tests/test_token_cache.py"""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data import cache as token_cache
from common.data import tokens as tokenization
from common.data.cache import BlockTokenizer, TokenDataset, cache_key, open_tokens, prepare_tokens
from common.data.chat_template import TULU, ChatTemplate, resolve_template
from common.data.report import data_table, preview
from common.data.sources import load_source, parse_source
from common.data.tokens import Encoder, render_pair, tokenize_pair, tokenize_sft
from common.failures import UserError

REPO = Path(__file__).parents[1]


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


CHATS = [
    [message("user", f"why {i}?"), message("assistant", f"so {i}." * (1 + i % 7))] * (1 + i % 3) for i in range(40)
]
PAIRS = [
    (
        [message("user", f"why {i}?"), message("assistant", f"so {i}." * (1 + i % 5))],
        [message("user", f"why {i}?"), message("assistant", "\n\n" * (i % 2) + "no.")],
    )
    for i in range(40)
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A tokenizer's folder, the tokenizer, the tulu template; read-only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer.save_tokenizer(folder)
    return folder, tokenizer, resolve_template("tulu", tokenizer)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(kit, data, cache, kind="sft", max_seq_length=64, num_proc=1, say=lambda line: None):
    folder, tokenizer, template = kit
    mixer = [str(data)] if isinstance(data, str | Path) else data
    return prepare_tokens(kind, mixer, tokenizer, str(folder), template, max_seq_length, str(cache), num_proc, say)


def left_in(cache: Path) -> list[str]:
    """What lies in a cache folder, beside its lock."""
    return sorted(path.name for path in (cache / "tokens").iterdir() if path.name != ".lock")


# --- what is in it
def test_an_sft_cache_holds_every_kept_sample_in_order(kit, tmp_path):
    _, tokenizer, template = kit
    first = write(tmp_path / "first.jsonl", [{"messages": chat} for chat in CHATS[:30]])
    second = write(
        tmp_path / "second.jsonl",
        [{"messages": CHATS[30]}, {"messages": [message("user", "alone")]}, {"prompt": "why 31?", "completion": "so."}],
    )
    ds = open_tokens(prepare(kit, [f"{first}=50%", str(second)], tmp_path / "cache"))
    taken = np.random.RandomState(42).choice(30, size=15, replace=False)
    expected = [(CHATS[i], f"{first}:{i + 1}") for i in taken]
    expected += [(CHATS[30], f"{second}:1"), ([message("user", "why 31?"), message("assistant", "so.")], f"{second}:3")]
    assert len(ds) == len(expected) and ds.kind == "sft" and ds.pair_lengths is None
    num_truncated = 0
    for i, (chat, where) in enumerate(expected):
        sample, truncated = tokenize_sft(*template.render(chat), Encoder(tokenizer), 64)
        np.testing.assert_array_equal(ds[i].input_ids, sample.input_ids)
        np.testing.assert_array_equal(ds[i].trained_spans, sample.trained_spans)
        assert (ds.source_of(i), ds.lengths[i]) == (where, len(sample.input_ids))
        assert ds.num_targets[i] == sum(end - start for start, end in sample.trained_spans)
        num_truncated += truncated
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


def test_a_dpo_cache_holds_every_kept_pair_in_order(kit, tmp_path):
    _, tokenizer, template = kit
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in PAIRS]
    rows[3] = {"prompt": "why?", "chosen": "so.", "rejected": "so."}
    ds = open_tokens(prepare(kit, write(tmp_path / "pairs.jsonl", rows), tmp_path, kind="dpo"))
    kept = [i for i in range(40) if i != 3]
    assert len(ds) == 39 and ds.kind == "dpo" and ds.stats["dropped"] == {"equal completions": 1}
    for i, row in enumerate(kept):
        pair, _ = tokenize_pair(*render_pair(*PAIRS[row], template), Encoder(tokenizer), 64)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            np.testing.assert_array_equal(getattr(ds[i], name), getattr(pair, name))
            assert getattr(ds[i], name).dtype == np.int32
        assert ds[i][3:] == pair[3:] and ds.source_of(i).endswith(f":{row + 1}")
        assert ds.pair_lengths[i].tolist() == [len(ids) for ids in pair[:3]] and ds.lengths[i] == sum(
            map(len, pair[:3])
        )
        assert (
            ds.num_targets[i] == len(pair.chosen_ids) + len(pair.rejected_ids) - pair.chosen_start - pair.rejected_start
        )


def test_samples_are_views_of_the_file(kit, tmp_path):
    ds = open_tokens(prepare(kit, write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS]), tmp_path))
    assert np.shares_memory(ds[3].input_ids, ds._arrays["tokens"]) and not ds[3].input_ids.flags.writeable
    array = ds._arrays["tokens"]
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def test_messages_left_out_by_the_template_are_counted_and_said_once(kit, tmp_path):
    chat = [message("user", "why?"), message("tool", "x"), message("tool", "y"), message("assistant", "so.")]
    said = []
    ds = open_tokens(prepare(kit, write(tmp_path / "x.jsonl", [{"messages": chat}] * 9), tmp_path, say=said.append))
    assert ds.stats["unrendered_roles"] == {"tool": 18}
    assert len([line for line in said if "'tool'" in line and "18" in line]) == 1
    assert "tool" in data_table(ds)


def test_a_template_that_ends_answers_with_nothing_is_warned_of(kit, tmp_path):
    folder, tokenizer, _ = kit
    jinja = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    said, endless = [], ChatTemplate("endless", jinja, tokenizer)
    prepare(
        (folder, tokenizer, endless), write(tmp_path / "x.jsonl", [{"messages": CHATS[0]}]), tmp_path, say=said.append
    )
    assert any(line.startswith("warning") and "endless" in line for line in said)


def test_preview_and_table_show_what_is_trained(kit, tmp_path):
    _, tokenizer, _ = kit
    data = write(tmp_path / "x.jsonl", [{"messages": CHATS[1][:2] + CHATS[0]}, {"messages": []}])
    ds = open_tokens(prepare(kit, data, tmp_path))
    assert preview(ds, 0, tokenizer, colour=False) == (
        f"sample 0 ({data}:1):\n<|user|>\nwhy 1?\n<|assistant|>\n[[so 1.so 1.<eos>]]\n"
        "<|user|>\nwhy 0?\n<|assistant|>\n[[so 0.<eos>]]"
    )
    assert "\033[32mso 0.<eos>\033[0m" in preview(ds, 0, tokenizer, colour=True)
    table = data_table(ds)
    for line in (
        r"rows read +2$",
        r"kept +1$",
        r"dropped +1$",
        r"no assistant message +1$",
        rf"tokens +{ds.lengths[0]}$",
        rf"target tokens +{ds.num_targets[0]}$",
        r"sha256 [0-9a-f]{64}$",
    ):
        assert re.search(line, table, re.MULTILINE), (line, table)
    pairs = write(tmp_path / "pairs.jsonl", [dict(zip(("chosen", "rejected"), PAIRS[1], strict=True))])
    shown = preview(open_tokens(prepare(kit, pairs, tmp_path, kind="dpo")), 0, tokenizer, colour=False)
    assert shown.endswith("<|assistant\n--- chosen:\n|>\n[[so 1.so 1.<eos>]]\n--- rejected:\n|>\n\n\n[[no.<eos>]]")


# --- what changes its key
def key_of(kit, data, max_seq_length=64, kind="sft", template=None):
    folder, tokenizer, tulu = kit
    tokenize = BlockTokenizer(kind, template or tulu, Encoder(tokenizer), max_seq_length)
    return cache_key(tokenize, [load_source(parse_source(str(data)))], str(folder))


@settings(deadline=None, max_examples=30)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_bit_of_a_row_or_of_a_tokenizer_file_changes_the_key(kit, tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("key")
    data = write(folder / "x.jsonl", [{"messages": chat} for chat in CHATS[:3]])
    before = key_of(kit, data)
    assert key_of(kit, data) == before
    for file in (data, kit[0] / "tokenizer.json", kit[0] / "tokenizer_config.json"):
        content = bytearray(file.read_bytes())
        content[position % len(content)] ^= 1 << bit
        original = file.read_bytes()
        file.write_bytes(content)
        changed = key_of(kit, data) if file != data else key_of_content(kit, data)
        file.write_bytes(original)
        assert changed != before, file
    assert key_of(kit, data) == before


def key_of_content(kit, data):
    """The key of a file whose lines may be broken by a changed bit: an empty one is a file too."""
    try:
        return key_of(kit, data)
    except UserError:
        return None


def test_length_kind_amount_template_and_code_change_the_key(kit, tmp_path, monkeypatch):
    _, tokenizer, tulu = kit
    data = write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS])
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
    edited = tmp_path / "tokenization.py"
    edited.write_bytes(Path(tokenization.__file__).read_bytes() + b"#")
    monkeypatch.setattr(tokenization, "__file__", str(edited))
    keys.append(key_of(kit, data))
    assert len(set(keys)) == len(keys)


def test_the_digest_is_of_what_is_trained_on_and_not_of_where_it_lies(kit, tmp_path):
    """A resume compares it: neither a moved file nor an edited comment in the code is other data."""
    chats = [[{"messages": chat} for chat in part] for part in (CHATS, CHATS, CHATS[:-1], [*CHATS[1:], CHATS[0]])]
    paths = [prepare(kit, write(tmp_path / f"{i}.jsonl", rows), tmp_path / "cache") for i, rows in enumerate(chats)]
    digests = [open_tokens(path).digest for path in paths]
    assert len(set(paths)) == 4 and digests[0] == digests[1] and len(set(digests)) == 3


def test_using_the_tokenizer_does_not_change_the_key(kit, tmp_path):
    data = write(tmp_path / "x.jsonl", [{"messages": CHATS[0]}])
    before = key_of(kit, data)
    kit[1](["a", "b c d e f"], truncation=True, max_length=2)
    assert kit[1].backend_tokenizer.truncation is not None
    assert key_of(kit, data) == before


def test_a_finished_cache_is_used_again(kit, tmp_path, monkeypatch):
    data, said = write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS]), []
    path = prepare(kit, data, tmp_path)
    monkeypatch.setattr(token_cache, "_build", None)
    assert prepare(kit, data, tmp_path, say=said.append) == path and "40 samples" in said[0]


# --- what breaks it
def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cache_with_one_changed_bit_is_never_used(kit, tmp_path_factory, data):
    path = _CACHES.get(kit[0]) or _CACHES.setdefault(
        kit[0],
        Path(
            prepare(
                kit,
                write(kit[0] / "x.jsonl", [{"messages": chat} for chat in CHATS[:5]]),
                tmp_path_factory.mktemp("bits"),
            )
        ),
    )
    file = path / data.draw(st.sampled_from(sorted(contents(path))))
    original = file.read_bytes()
    position, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(original[:position] + bytes([original[position] ^ 1 << bit]) + original[position + 1 :])
    try:
        with pytest.raises(UserError, match="run again"):
            open_tokens(path)
    except pytest.fail.Exception:
        assert file.name == "manifest.json" and json.loads(file.read_bytes()) == json.loads(original)  # white space
    finally:
        file.write_bytes(original)
    open_tokens(path)


_CACHES = {}


@pytest.mark.parametrize(
    "damage", ["shorter", "longer", "missing", "no manifest", "empty manifest", "other manifest", "[]"]
)
def test_a_torn_cache_is_built_again(kit, tmp_path, damage):
    data, said = write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS]), []
    path = Path(prepare(kit, data, tmp_path / "cache"))
    whole, tokens, manifest = contents(path), path / "tokens.bin", path / "manifest.json"
    if damage in ("shorter", "longer"):
        tokens.write_bytes(whole["tokens.bin"][:-4] if damage == "shorter" else whole["tokens.bin"] + b"\0\0\0\0")
    elif damage in ("missing", "no manifest"):
        (tokens if damage == "missing" else manifest).unlink()
    else:
        manifest.write_text({"empty manifest": "", "other manifest": '{"kind": "dpo"}', "[]": "[]"}[damage])
    with pytest.raises(UserError, match="run again"):
        open_tokens(path)
    assert prepare(kit, data, tmp_path / "cache", say=said.append) == str(path)
    assert contents(path) == whole and left_in(tmp_path / "cache") == [path.name]
    assert "building it again" in said[0]


GOOD = {"messages": CHATS[0]}


@pytest.mark.parametrize(
    "kind, rows, said",
    [
        ("sft", [GOOD, '{"messages": [{"role'], r"x\.jsonl:2: not valid JSON"),
        ("sft", [GOOD, GOOD, {"text": "x"}], r"x\.jsonl:3: .*messages"),
        ("sft", [{"messages": [message("user", None)]}], r"x\.jsonl:1: .*null"),
        ("sft", [GOOD, {"messages": [message(3, "x")]}], r"x\.jsonl:2: .*role"),
        ("sft", [{"messages": [message("user", "x")]}] * 3, r"x\.jsonl: no row is left.*3 x no assistant message"),
        ("dpo", [GOOD], r"x\.jsonl:1: .*chosen"),
        ("dpo", [{"chosen": CHATS[1], "rejected": CHATS[0]}], r"x\.jsonl:1: the prompts .* differ, first at message 1"),
        ("sft", [], "holds no rows"),
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


@pytest.mark.parametrize("jinja", [TULU, "{#- strftime_now -#}" + TULU])
def test_a_template_that_can_print_the_date_is_warned_of_each_time(kit, tmp_path, jinja):
    template, data, said = (
        ChatTemplate("dated", jinja, kit[1]),
        write(tmp_path / "x.jsonl", [{"messages": CHATS[0]}]),
        [],
    )
    for _ in range(2):
        prepare((*kit[:2], template), data, tmp_path / "cache", say=said.append)
    warned = [text for text in said if "can print the date" in text]
    assert len(warned) == (0 if jinja == TULU else 2)


def test_a_cache_dir_that_cannot_be_written_is_named(kit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir .*file"):
        prepare(kit, write(tmp_path / "x.jsonl", [GOOD]), tmp_path / "file")


def test_a_folder_somebody_builds_in_is_left_alone(kit, tmp_path):
    (tmp_path / "tokens").mkdir()
    with token_cache._build_folder(tmp_path / "tokens") as folder:
        (folder / "tokens.bin").write_bytes(b"half")
        prepare(kit, write(tmp_path / "x.jsonl", [GOOD]), tmp_path)
        assert (folder / "tokens.bin").exists()
    assert not folder.exists()


# --- several processes. In the script, `prepare()` builds the cache of x.jsonl in a folder with num_proc processes.
SCRIPT = """
import multiprocessing, os, pathlib, signal, sys, time
sys.stdout.write("main module imported\\n")
from transformers import PreTrainedTokenizerFast
from common.data import cache as token_cache
from common.data.chat_template import resolve_template
from common.failures import UserError

folder, tokenizer_folder, num_proc = sys.argv[1], sys.argv[2], int(sys.argv[3])
token_cache.BLOCK_ROWS, token_cache.MIN_ROWS_PER_PROCESS = 8, 1
build = token_cache.BlockTokenizer.__call__

def prepare():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    template = resolve_template("tulu", tokenizer)
    return token_cache.prepare_tokens("sft", [folder + "/x.jsonl"], tokenizer, tokenizer_folder, template, 64,
                                      folder + "/cache", num_proc, say=lambda line: None)
"""


def start(kit, folder: Path, script: str, num_proc: int = 1) -> subprocess.Popen:
    file = folder / "script.py"
    file.write_text(SCRIPT + script)
    return subprocess.Popen(
        [sys.executable, file, str(folder), str(kit[0]), str(num_proc)],
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    return output


@pytest.fixture(scope="module")
def pool(kit, tmp_path_factory):
    """A run with two tokenizing processes: its folder and what it printed, for good data, a bad row, a killed worker."""
    folder = tmp_path_factory.mktemp("pool")
    write(folder / "x.jsonl", [{"messages": chat} for chat in CHATS])
    return folder, finish(
        start(
            kit,
            folder,
            """
print(prepare())
rows = pathlib.Path(folder, "x.jsonl")
rows.write_text(rows.read_text() + '{"messages": null}')
try:
    prepare()
except UserError as error:
    print(error)
blocks = token_cache._map_blocks
def kill_a_worker(*arguments):
    for block in blocks(*arguments):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        yield block
token_cache._map_blocks = kill_a_worker
try:
    prepare()
except UserError as error:
    print(error)
""",
            num_proc=2,
        )
    )


def test_several_processes_build_what_one_builds(kit, tmp_path, pool):
    _, output = pool
    several = contents(output.splitlines()[1])
    one = contents(prepare(kit, write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS]), tmp_path))
    assert {name: several[name] for name in several if name != "manifest.json"} == {
        name: one[name] for name in one if name != "manifest.json"
    }  # the manifest names the file, which lies elsewhere


def test_other_processes_do_not_import_the_main_module(pool):
    assert pool[1].count("main module imported") == 1


def test_a_bad_row_in_another_process_is_named(pool):
    assert re.search(r"x\.jsonl:41: .*null", pool[1].splitlines()[2])


def test_a_killed_worker_is_an_error_and_not_a_hang(pool):
    folder, output = pool
    assert "was killed" in output.splitlines()[3]
    assert left_in(folder / "cache") == [Path(output.splitlines()[1]).name]


def test_two_builders_at_once_leave_one_good_cache(kit, tmp_path):
    write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS])
    script = """
publish = token_cache._publish
def publish_together(*arguments):  # only when both have built theirs
    pathlib.Path(folder, str(os.getpid()) + ".built").touch()
    while len(list(pathlib.Path(folder).glob("*.built"))) < 2:
        time.sleep(0.01)
    publish(*arguments)
token_cache._publish = publish_together
print(prepare())
"""
    paths = [
        finish(process).splitlines()[-1] for process in [start(kit, tmp_path, script), start(kit, tmp_path, script)]
    ]
    assert paths[0] == paths[1] and len(open_tokens(paths[0])) == 40
    assert left_in(tmp_path / "cache") == [Path(paths[0]).name]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_kill_9_while_building_leaves_the_next_run_to_rebuild(kit, tmp_path):
    write(tmp_path / "x.jsonl", [{"messages": chat} for chat in CHATS])
    killed = start(
        kit,
        tmp_path,
        """
blocks = token_cache._map_blocks
def kill_after_two(*arguments):
    for i, block in enumerate(blocks(*arguments)):
        yield block
        if i == 1:
            print([child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
token_cache._map_blocks = kill_after_two
prepare()
""",
        num_proc=2,
    )
    workers = json.loads(finish(killed, -signal.SIGKILL).splitlines()[-1])
    assert len(workers) == 2
    assert [Path(name).suffix for name in left_in(tmp_path / "cache")] == [".build"]
    path = prepare(kit, tmp_path / "x.jsonl", tmp_path / "cache")
    assert len(TokenDataset(path)) == 40 and left_in(tmp_path / "cache") == [Path(path).name]
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
