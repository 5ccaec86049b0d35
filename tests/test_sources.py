"""Which rows `dataset_mixer` takes, and what it refuses.   pytest tests/test_sources.py"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.sources import decode_row, load_source, parse_source, subset_indices
from common.failures import UserError


@pytest.mark.parametrize(
    "text, path, revision, split, amount",
    [
        ("allenai/tulu-3-sft-mixture", "allenai/tulu-3-sft-mixture", None, "train", None),
        ("org/data=10%", "org/data", None, "train", "10%"),
        ("org/data@v1.0:test=500", "org/data", "v1.0", "test", "500"),
        ("org/data@refs/pr/1=.5%", "org/data", "refs/pr/1", "train", ".5%"),
        ("squad:validation", "squad", None, "validation", None),
    ],
)
def test_hub_sources_parse(text, path, revision, split, amount):
    source = parse_source(text)
    assert (source.path, source.revision, source.split, source.amount) == (path, revision, split, amount)


@pytest.mark.parametrize("name", ["a.jsonl", "a@b.jsonl", "a:b=10%.jsonl", "a.json=3.parquet", "a.jsonl=5.json"])
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


@pytest.mark.parametrize(
    "text, named",
    [
        ("org/data=0.1", ["=10%", "=0.1%"]),
        ("org/data=.5", ["=50%", "=0.5%"]),
        ("org/data=1.0", ["=100%", "=1%"]),
        ("org/data=2.5", ["=2 (rows)", "=2.5%"]),
        *((f"org/data={amount}", [f"={amount}"]) for amount in ("ten", "", "-5", "1e3")),
        *((text, [text]) for text in ("./data.csv", "org/data@:train", "rows.jsonl:test", "rows.jsonl@main", __file__)),
        ("a/b/c", ["SOURCE"]),
        ("", ["SOURCE"]),
    ],
)
def test_a_malformed_source_is_refused_by_name(text, named):
    with pytest.raises(UserError) as error:
        parse_source(text)
    assert "\n" not in str(error.value)
    for words in named:
        assert words in str(error.value)


def test_subset_is_the_reference_runs():
    indices = subset_indices(939_343, "10%")
    assert len(indices) == 93_934
    np.testing.assert_array_equal(indices, np.random.RandomState(42).choice(939_343, size=93_934, replace=False))


@given(st.integers(1, 10**6), st.integers(1, 10_000))
def test_subset_size_is_exact_and_rows_are_distinct(num_rows, hundredths):
    amount = f"{hundredths / 100:g}%"
    size = num_rows * Fraction(amount[:-1]) / 100
    if size < 1:
        with pytest.raises(ValueError, match="none"):
            subset_indices(num_rows, amount)
    elif num_rows < 10_000:
        indices = subset_indices(num_rows, amount)
        assert len(indices) == int(size) == len(set(indices.tolist())) and indices.max() < num_rows


def test_29_percent_of_100_rows_is_29():
    assert len(subset_indices(100, "29%")) == 29  # 100 * 0.29 is 28.999999999999996


@pytest.mark.parametrize("amount", [None, "100%", "7"])
def test_all_rows_keep_the_files_order(amount):
    assert subset_indices(7, amount).tolist() == list(range(7))


ROWS = [{"messages": [{"role": "user", "content": f"ü{i}"}], "other": i} for i in range(20)]


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=3)
    elif suffix == "json":
        file.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False))
    else:
        file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_every_local_format_gives_the_same_subset(tmp_path, suffix):
    file = write(tmp_path, suffix)
    rows = load_source(parse_source(f"{file}=25%"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    asked = {"asked_for": f"{file}=25%", "path": str(file)}
    assert rows.identity == {**asked, "sha256": digest, "num_rows": 20, "rows_used": 5}
    expected = np.random.RandomState(42).choice(20, size=5, replace=False)
    got = [decode_row(raw) for raw in rows.read(rows.indices)]
    assert [row["messages"] for row in got] == [ROWS[i]["messages"] for i in expected]
    assert rows.numbers[rows.indices].tolist() == [i + 1 for i in expected]


def test_json_lines_in_a_json_file_and_blank_lines_keep_their_line_numbers(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'{"messages": 1}\n\n  \r\n{"messages": 2}\r\n{"messages": 3}')
    rows = load_source(parse_source(str(file)))
    assert rows.numbers.tolist() == [1, 4, 5]
    assert [decode_row(raw)["messages"] for raw in rows.read(rows.indices)] == [1, 2, 3]


@pytest.mark.parametrize(
    "name, content, amount, said",
    [
        ("few.jsonl", b"{}\n" * 300, "=500", "500 of 300"),
        ("few.jsonl", b"{}\n" * 50, "=1%", "none"),
        ("few.jsonl", b"{}\n", "=0", "none"),
        ("few.jsonl", b"{}\n", "=200%", "more"),
        ("absent.jsonl", None, "=10%", "No such file"),
        ("empty.jsonl", b"", "", "holds no rows"),
        ("empty.json", b"[]", "", "holds no rows"),
        ("torn.json", b'[{"a": 1}, {"a"', "", "JSON"),
        ("text.json", b'"hello"', "", "array"),
        ("deep.json", b"[" * 100_000, "", "recursion"),
        ("no.parquet", b"PAR1 nothing", "", "[Pp]arquet"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path, name, content, amount, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_source(parse_source(f"{tmp_path / name}{amount}"))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b'{"messages": [', b"[1, 2]", b"\xff\xfe{}", b"null", b"[" * 100_000, ["x"]])
def test_a_row_that_is_not_an_object_is_refused(raw):
    with pytest.raises(UserError, match="JSON"):
        decode_row(raw)
