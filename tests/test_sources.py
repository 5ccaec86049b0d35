"""Which rows `dataset_mixer` takes, and what it refuses.   pytest tests/test_mixer.py"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    assert not source.local


@pytest.mark.parametrize("name", ["a.jsonl", "a@b.jsonl", "a:b=10%.jsonl", "a.json=3.parquet", "a.jsonl=5.json"])
@pytest.mark.parametrize("amount", [None, "10%", "7"])
def test_a_local_path_may_hold_the_separators(tmp_path, name, amount):
    (tmp_path / name).write_text("{}")
    source = parse_source(f"{tmp_path / name}" + (f"={amount}" if amount else ""))
    assert (source.path, source.amount, source.local) == (str(tmp_path / name), amount, True)


def test_the_longest_path_that_exists_is_meant(tmp_path):
    for name in ("a.json", "a.json=5.jsonl"):
        (tmp_path / name).write_text("{}")
    assert parse_source(f"{tmp_path}/a.json=5.jsonl").path.endswith("5.jsonl")
    assert parse_source(f"{tmp_path}/a.json=5").path.endswith("a.json")


@pytest.mark.parametrize(
    "text, said",
    [
        ("org/data=0.1", ["10%", "0.1%"]),
        ("org/data=.5", ["50%", "0.5%"]),
        ("org/data=1.0", ["100%", "1%"]),
        ("org/data=2.5", ["2 (rows)", "2.5%"]),
        ("org/data=0%", ["=0%"]),
        ("org/data=0", ["=0"]),
        ("org/data=101%", ["=101%"]),
        ("org/data=ten", ["=ten"]),
        ("org/data=", ["10%"]),
        ("org/data=-5", ["=-5"]),
        ("org/data=1e3", ["=1e3"]),
        ("missing.jsonl=10%", ["missing.jsonl"]),
        ("/nowhere/x.parquet", ["/nowhere/x.parquet"]),
        ("./data.csv", [".jsonl", ".parquet"]),
        ("a/b/c", ["SOURCE"]),
        ("", ["SOURCE"]),
        ("org/data@:train", ["SOURCE"]),
    ],
)
def test_a_malformed_source_is_refused_by_name(text, said):
    with pytest.raises(UserError) as error:
        parse_source(text)
    assert "\n" not in str(error.value)
    for words in said:
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
    assert rows.identity == {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
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
        ("empty.jsonl", b"", "", "holds no rows"),
        ("empty.json", b"[]", "", "holds no rows"),
        ("torn.json", b'[{"a": 1}, {"a"', "", "not valid JSON"),
        ("text.json", b'"hello"', "", "array"),
        ("no.parquet", b"PAR1 nothing", "", "parquet"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path, name, content, amount, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_source(parse_source(f"{tmp_path / name}{amount}"))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_text_of_a_parquet_file_that_is_no_utf8_is_refused_by_name(tmp_path):
    bad = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad, "completion": ["b"]}), tmp_path / "bad.parquet")
    rows = load_source(parse_source(str(tmp_path / "bad.parquet")))
    with pytest.raises(UserError, match=r"bad\.parquet: a text column does not hold UTF-8"):
        rows.read(rows.indices)


@pytest.mark.parametrize("raw", [b'{"messages": [', b"[1, 2]", b"\xff\xfe{}", b"null", b"[" * 100_000, ["x"]])
def test_a_row_that_is_not_an_object_is_refused(raw):
    with pytest.raises(UserError, match="JSON"):
        decode_row(raw)


# --- a hub on the loopback interface, in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported
COMMIT, OLD_COMMIT = "ab" * 20, "cd" * 20
REVISIONS = {"main": COMMIT, "v1": OLD_COMMIT, COMMIT: COMMIT, OLD_COMMIT: OLD_COMMIT}
HUB_FILES = {COMMIT: "".join(json.dumps(row) + "\n" for row in ROWS).encode()}
HUB_FILES[OLD_COMMIT] = HUB_FILES[COMMIT].splitlines(keepends=True)[0]


class Hub(BaseHTTPRequestHandler):
    """The few routes that `datasets` asks of a hub, for the one data set org/data, a train.jsonl at each commit."""

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, code=200, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, json_type = self.path.split("?")[0], {"Content_Type": "application/json"}
        info = re.fullmatch("/api/datasets/org/data(?:/revision/(.+))?", path)
        tree = re.fullmatch("/api/datasets/org/data/tree/([^/]+)", path)
        file = re.fullmatch("/datasets/org/data/resolve/([^/]+)/train.jsonl", path)
        if info and (info[1] or "main") in REVISIONS:
            answer = {"id": "org/data", "sha": REVISIONS[info[1] or "main"], "siblings": [{"rfilename": "train.jsonl"}]}
            self.answer(json.dumps(answer).encode(), **json_type)
        elif tree:
            size = len(HUB_FILES[REVISIONS[tree[1]]])
            self.answer(
                json.dumps([{"type": "file", "path": "train.jsonl", "size": size, "oid": "0" * 40}]).encode(),
                **json_type,
            )
        elif file:
            commit = REVISIONS[file[1]]
            self.answer(HUB_FILES[commit], ETag=f'"{commit}"', X_Repo_Commit=commit)
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound" if "org/data" in path else "RepoNotFound")

    do_HEAD = do_GET


ASK_HUB = """
import json, sys
from common.failures import UserError
from common.data.sources import load_source, parse_source
answers = []
for text in sys.argv[1:]:
    try:
        rows = load_source(parse_source(text))
        answers.append([rows.identity, rows.indices.tolist(), rows.read(rows.indices)])
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_hub_rows_come_from_the_commit_that_is_recorded(tmp_path):
    def ask(*texts, **environment):
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        output = subprocess.run(
            [sys.executable, "-c", ASK_HUB, *texts],
            env=environment,
            check=True,
            text=True,
            capture_output=True,
            cwd=Path(__file__).parents[1],
        ).stdout
        return json.loads(output.splitlines()[-1])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    tagged, part, whole, no_split, no_such = ask(
        "org/data@v1",
        "org/data=25%",
        "org/data@main:train",
        "org/data:test",
        "org/none",
        HF_ENDPOINT=endpoint,
        HF_HUB_OFFLINE="0",
    )
    server.shutdown()
    indices = np.random.RandomState(42).choice(20, size=5, replace=False).tolist()
    assert part[:2] == [{"revision": COMMIT, "split": "train"}, indices]
    assert part[2] == [{"messages": ROWS[i]["messages"]} for i in indices]
    assert whole[0] == part[0] and whole[1] == list(range(20))
    assert tagged == [{"revision": OLD_COMMIT, "split": "train"}, [0], [{"messages": ROWS[0]["messages"]}]]
    assert "org/data:test" in no_split and "['train']" in no_split
    assert "org/none" in no_such and "\n" not in no_such

    pinned, other = ask(f"org/data@{COMMIT}=3", f"org/data@{OLD_COMMIT}", HF_HUB_OFFLINE="1")
    assert pinned[0] == part[0]
    assert f"not commit {OLD_COMMIT}" in other  # `datasets` gives the commit that it cached last
