"""Which rows `dataset_mixer` takes, and what it refuses.   pytest tests/test_sources.py"""

import gzip
import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import refused

from common.data.sources import decode_row, load_source, parse_source, subset_indices

HUB_SOURCES = [
    ("allenai/tulu-3-sft-mixture", "allenai/tulu-3-sft-mixture", None, "train", None),
    ("org/data=10%", "org/data", None, "train", "10%"),
    ("org/data@v1.0:test=500", "org/data", "v1.0", "test", "500"),
    ("org/data@refs/pr/1=.5%", "org/data", "refs/pr/1", "train", ".5%"),
    ("squad:validation", "squad", None, "validation", None),
    ("org/data/fr.v-2@v1:test=3", "org/data/fr.v-2", "v1", "test", "3"),
]


@pytest.mark.parametrize("text, path, revision, split, amount", HUB_SOURCES)
def test_hub_sources_parse(text, path, revision, split, amount):
    source = parse_source(text)
    assert (source.path, source.revision, source.split, source.amount) == (path, revision, split, amount)


NOT_UTF8 = "a\udcff=1%.jsonl"  # a byte that is no UTF-8, as Python has it
LOCAL_NAMES = ["a.jsonl", "a@b.jsonl", "a:b=10%.jsonl", "a.json=3.parquet", "a.jsonl=5.json", "a.csv", "a.jsonl.gz"]


@pytest.mark.parametrize("name", [*LOCAL_NAMES, NOT_UTF8])
@pytest.mark.parametrize("amount", [None, "10%", "7"])
def test_a_local_path_may_hold_the_separators(tmp_path, name, amount):
    (tmp_path / name).write_text("{}")
    source = parse_source(f"{tmp_path / name}" + (f"={amount}" if amount else ""))
    assert (source.path, source.amount) == (str(tmp_path / name), amount)


def test_the_longest_path_that_exists_is_meant(tmp_path):
    for name in ("a.json", "a.json=5.jsonl"):
        (tmp_path / name).write_text("{}")
    assert parse_source(f"{tmp_path}/a.json=5.jsonl").path.endswith("5.jsonl")
    assert parse_source(f"{tmp_path}/a.json=5").path.endswith("a.json")


MALFORMED = [
    ("org/data=0.1", ["=10%", "=0.1%"]),
    ("org/data=.5", ["=50%", "=0.5%"]),
    ("org/data=1.0", ["=100%", "=1%"]),
    ("org/data=2.5", ["=2 (rows)", "=2.5%"]),
    *((f"org/data={amount}", [f"={amount}"]) for amount in ("ten", "", "-5", "1e3")),
    *((text, [text]) for text in ("./data.txt", "org/data@:train", "rows.jsonl:test", "rows.jsonl@main", __file__)),
    ("a/b/c/d", ["SOURCE"]),
    ("./*.none", ["SOURCE"]),
    ("", ["SOURCE"]),
]


@pytest.mark.parametrize("text, named", MALFORMED)
def test_a_malformed_source_is_refused_by_name(text, named):
    with refused(*map(re.escape, named)):
        parse_source(text)


def test_subset_is_the_reference_runs():
    indices = subset_indices(939_343, "10%")
    assert len(indices) == 93_934
    np.testing.assert_array_equal(indices, np.random.RandomState(42).choice(939_343, size=93_934, replace=False))


@given(st.integers(1, 10**6), st.integers(1, 10_000))
@example(100, 2900)  # 100 * 0.29 is 28.999999999999996
@example(3000, 230)  # 3000 * 2.3 / 100 is 68.99999999999999
def test_subset_size_is_exact_and_rows_are_distinct(num_rows, hundredths):
    amount = f"{hundredths / 100:g}%"
    size = num_rows * Fraction(amount[:-1]) / 100
    if size < 1:
        with pytest.raises(ValueError, match="none"):
            subset_indices(num_rows, amount)
    elif num_rows < 10_000:
        indices = subset_indices(num_rows, amount)
        assert len(indices) == int(size) == len(set(indices.tolist())) and indices.max() < num_rows


@given(num_rows=st.integers(1, 300), percent=st.integers(1, 700))
def test_more_than_all_rows_are_whole_rounds_and_a_subset(num_rows, percent):
    times, rest = divmod(percent, 100)
    expected = [*range(num_rows)] * times
    if num_rows * rest // 100:
        expected += subset_indices(num_rows, f"{rest}%").tolist()
    if expected:
        assert subset_indices(num_rows, f"{percent}%").tolist() == expected


@pytest.mark.parametrize("amount", [None, "100%", "7"])
def test_all_rows_keep_the_files_order(amount):
    assert subset_indices(7, amount).tolist() == list(range(7))


ROWS = [{"prompt": f'ü{i},\n"', "completion": "None" if i else "", "other": i} for i in range(20)]
MESSAGES = [{"messages": [{"role": "user", "content": f"ü{i}"}], "other": i} for i in range(20)]
SUFFIXES = ["jsonl", "json", "parquet", "csv", "arrow", "file.arrow", "jsonl.gz", "jsonl.zst", "json.gz", "csv.zst"]


def write(folder: Path, suffix: str, rows=ROWS, name="rows") -> Path:
    file = folder / f"{name}.{suffix}"
    kind = suffix.partition(".")[0]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)
    elif suffix.endswith("arrow"):
        table = pyarrow.Table.from_pylist(rows)
        opened = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with opened(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        if kind == "csv":
            text = pandas.DataFrame(rows).to_csv(index=False)
        else:
            text = json.dumps(rows, indent=2) if kind == "json" else "\n".join(map(json.dumps, rows))
        with pyarrow.output_stream(str(file)) as out:  # compressed as the suffix says
            out.write(text.encode())
    return file


def decoded(rows) -> list[dict]:
    """The rows taken, without the column that nothing uses."""
    return [{k: v for k, v in decode_row(raw).items() if k != "other"} for raw in rows.read(rows.indices)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_local_format_gives_the_same_subset(tmp_path, suffix):
    file = write(tmp_path, suffix)
    rows = load_source(parse_source(f"{file}=25%"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = {"asked_for": f"{file}=25%", "path": str(file)}
    assert rows.identity == {**asked, "sha256": digest, "num_rows": 20, "rows_used": 5}
    expected = np.random.RandomState(42).choice(20, size=5, replace=False)
    assert decoded(rows) == [{k: v for k, v in ROWS[i].items() if k != "other"} for i in expected]
    assert [rows.place(i) for i in rows.indices] == [f"{file}:{i + 1}" for i in expected]
    assert rows.unread == (["other"] if suffix.endswith(("parquet", "arrow")) else [])


def test_a_folder_or_glob_is_its_files_in_the_order_of_their_names(tmp_path):
    """Told by contents and names; what is of another split, or of none, is named."""
    parts = {"test.jsonl": MESSAGES[16:], "train-1.jsonl": MESSAGES[:7]}
    parts |= {"train-2.jsonl.gz": MESSAGES[7:9], "train-3.jsonl.zst": MESSAGES[9:16]}
    for file, rows in parts.items():
        name, _, suffix = file.partition(".")
        write(tmp_path, suffix, rows, name)
    write(tmp_path, "csv", ROWS, "loose")
    train = ["train-1.jsonl", "train-2.jsonl.gz", "train-3.jsonl.zst"]
    for asked, taken, rows in (
        (f"{tmp_path}", train, MESSAGES[:16]),
        (f"{tmp_path}:test", ["test.jsonl"], MESSAGES[16:]),
        (f"{tmp_path}/t*", ["test.jsonl", *train], MESSAGES[16:] + MESSAGES[:16]),
    ):
        found = load_source(parse_source(asked))
        assert decoded(found) == [{"messages": row["messages"]} for row in rows]
        assert found.files == [f"{tmp_path}/{name}" for name in taken]
        left_out = [] if "*" in asked else sorted({*parts, "loose.csv"} - {*taken})
        assert found.identity.get("left_out", []) == [f"{tmp_path}/{name}" for name in left_out]
    some = load_source(parse_source(f"{tmp_path}/train*=50%"))
    assert len(decoded(some)) == 8
    assert [some.place(i) for i in (6, 7, 9)] == [f"{tmp_path}/{train[i]}:{n}" for i, n in ((0, 7), (1, 1), (2, 1))]
    before = load_source(parse_source(str(tmp_path))).identity["sha256"]
    write(tmp_path, "jsonl.gz", MESSAGES[7:8], "train-2")
    assert load_source(parse_source(str(tmp_path))).identity["sha256"] != before
    with refused(r"valid.*train"):
        load_source(parse_source(f"{tmp_path}:valid"))


def test_a_column_that_is_not_used_is_not_read_from_parquet(tmp_path):
    """One of a type that `datasets` refuses."""
    counts = pyarrow.array([[("a", 1)]] * len(MESSAGES), pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    rows = pyarrow.table({"messages": [row["messages"] for row in MESSAGES], "counts": counts})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    assert decoded(load_source(parse_source(f"{tmp_path}/rows.parquet"))) == rows.select(["messages"]).to_pylist()


def test_what_save_to_disk_writes_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(MESSAGES).save_to_disk(tmp_path / "one", num_shards=3)
    parts = {"train": Dataset.from_list(MESSAGES[:4]), "test": Dataset.from_list(MESSAGES[4:])}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    rows = [{"messages": row["messages"]} for row in MESSAGES]
    for asked, taken, rest in (("one", rows, []), ("two", rows[:4], ["test"]), ("two:test", rows[4:], ["train"])):
        found = load_source(parse_source(f"{tmp_path}/{asked}"))
        assert decoded(found) == taken
        others = [f"{tmp_path}/two/{split}/data-00000-of-00001.arrow" for split in rest]
        assert found.identity.get("left_out", []) == others


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "a", "null"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)
CALLS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["x", ""]), min_size=1).map(
    lambda arguments: {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": arguments}}]}
)


@settings(max_examples=40, deadline=None)
@given(chats=st.lists(st.lists(CALLS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_arrows_filler_nulls_are_no_part_of_a_row(tmp_path_factory, chats):
    """The structs of one column have all keys that any of them has."""
    rows = [{"messages": chat} for chat in chats]
    folder = tmp_path_factory.mktemp("nulls")
    for suffix in ("jsonl", "parquet", "arrow"):
        assert decoded(load_source(parse_source(str(write(folder, suffix, rows))))) == rows


@settings(max_examples=40, deadline=None)
@given(values=st.lists(JSON_VALUES, min_size=1, max_size=4))
def test_a_null_that_json_itself_holds_is_kept(tmp_path_factory, values):
    """Also where `datasets` keeps objects of mixed kinds as JSON text."""
    from datasets import Dataset, Features, Json, List

    rows = [{"messages": [{"role": "user", "content": value}]} for value in values]
    folder = tmp_path_factory.mktemp("own")
    assert decoded(load_source(parse_source(str(write(folder, "jsonl", rows))))) == rows
    Dataset.from_list(rows, features=Features({"messages": List(Json())})).to_parquet(folder / "rows.parquet")
    assert decoded(load_source(parse_source(f"{folder}/rows.parquet"))) == rows


MARKED = [("csv", "text\nso.\n"), ("json", '{"text": "so."}\n'), ("jsonl", '{"text": "so."}')]


@pytest.mark.parametrize(("suffix", "text"), MARKED)
def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path, suffix, text):
    """As Excel writes it: the first column would be of another name."""
    (tmp_path / f"rows.{suffix}").write_text(text, encoding="utf-8-sig")
    assert decoded(load_source(parse_source(f"{tmp_path}/rows.{suffix}"))) == [{"text": "so."}]


def test_json_lines_in_a_json_file_and_blank_lines_keep_their_line_numbers(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'{"messages": 1}\n\n  \r\n{"messages": 2}\r\n{"messages": 3}')
    rows = load_source(parse_source(str(file)))
    assert rows.numbers.tolist() == [1, 4, 5]
    assert [decode_row(raw)["messages"] for raw in rows.read(rows.indices)] == [1, 2, 3]


UNUSABLE = [
    ("few.jsonl", b"{}\n" * 300, "=500", "500 of 300"),
    ("few.jsonl", b"{}\n" * 50, "=1%", "none"),
    ("few.jsonl", b"{}\n", "=0", "none"),
    ("few.jsonl", b"{}\n", "=2", "more"),
    ("wide.csv", "text\na".encode("utf-16"), "", "utf-8"),
    ("cut.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-3], "", "Truncated"),
    ("no.csv.zst", b"text\na", "", "no.csv.zst"),
    ("wide.csv", b"text,prompt\na,b,c\n", "", "row 1"),
    ("short.csv", b"text,prompt\na,b\nc\n", "", "row 2"),
    ("torn.csv", b'text,prompt\na,"b', "", "torn.csv"),
    ("no.arrow", b"ARROW1 nothing", "", "no.arrow"),
    ("absent.jsonl", None, "=10%", "No such file"),
    ("empty.jsonl", b"", "", "holds no rows"),
    ("empty.json", b"[]", "", "holds no rows"),
    ("none.json", b"", "", "holds no rows"),
    ("torn.json", b'[{"a": 1}, {"a"', "", "JSON"),
    ("deep.json", b"[" * 100_000, "", "recursion"),
    ("no.parquet", b"PAR1 nothing", "", "[Pp]arquet"),
]


@pytest.mark.parametrize("name, content, amount, said", UNUSABLE)
def test_an_unusable_file_is_refused_by_name(tmp_path, name, content, amount, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(said, re.escape(name)):
        load_source(parse_source(f"{tmp_path / name}{amount}"))


def test_a_file_that_never_ends_is_refused_by_name(endless_file):
    with refused(endless_file):
        load_source(parse_source(endless_file))


UTF_16 = b"\0" + "{}\n".encode("utf-16-le")  # any line but a file's first


@pytest.mark.parametrize("raw", [UTF_16, b'{"messages": [', b"[1, 2]", b"\xff\xfe{}", b"null", b"[" * 100_000, ["x"]])
def test_a_row_that_is_not_an_object_is_refused(raw):
    with refused("JSON"):
        decode_row(raw)
