"""Which rows are trained on: the `dataset_mixer` flag, and reading what it names.

    SOURCE[@REVISION][:SPLIT][=AMOUNT]     e.g. allenai/tulu-3-sft-mixture@main:train=10%   chats.jsonl=500

SOURCE is a Hugging Face hub id or a local .jsonl, .json or .parquet file. A hub revision is resolved to its commit
hash, a local file to its sha256: they key the token cache and are recorded in run_config.json.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from common.failures import UserError, as_user_error

COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")  # all that is read; others are ignored

LOCAL_FILE = re.compile(r"\.(jsonl|json|parquet)(?=$|[@:=])")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TAIL = re.compile(r"(?:@(?P<revision>[^:=]+))?(?::(?P<split>[^=]+))?(?:=(?P<amount>.*))?")


@dataclass(frozen=True)
class Source:
    """One parsed item of `dataset_mixer`."""

    text: str  # as typed
    path: str  # hub id, or path of a local file
    revision: str | None
    split: str
    amount: str | None  # "10%", "500" or None for all rows


def parse_source(text: str) -> Source:
    """`SOURCE[@REVISION][:SPLIT][=AMOUNT]` -> Source. Only looks whether local files exist; reads nothing.

    A local path may itself hold '@', ':' or '=': it ends at a .jsonl, .json or .parquet suffix, at the last one
    where such a file exists. Raises UserError for anything that is not of this form.
    """
    ends = [match.end() for match in LOCAL_FILE.finditer(text)]
    existing = [end for end in ends if Path(text[:end]).is_file()]
    path = text[: max(existing or ends)] if ends else re.match(r"[^@:=]*", text)[0]
    tail = TAIL.fullmatch(text[len(path) :])
    with as_user_error(f"dataset_mixer {text!r}", ValueError):
        if tail is None or not (ends or HUB_ID.fullmatch(path)) or (not ends and Path(path).exists()):
            raise ValueError(
                "write SOURCE[@REVISION][:SPLIT][=AMOUNT]; SOURCE: a hub id, .jsonl, .json or .parquet file"
            )
        if ends and (tail["revision"] or tail["split"] not in (None, "train")):
            raise ValueError("a local file has neither revisions nor splits")
        if tail["amount"] is not None:
            _check_amount(tail["amount"])
    return Source(text, path, tail["revision"], tail["split"] or "train", tail["amount"])


def _check_amount(amount: str) -> None:
    """Raises ValueError unless it is a percentage or a number of rows. How many it may be, the rows decide."""
    if re.fullmatch(r"\d*\.\d+|\d+\.", amount):
        number = float(amount)
        other = f"{number * 100:g}%" if number <= 1 else f"{int(number)} (rows)"
        raise ValueError(f"={amount} could mean two things; write ={other} or ={number:g}%")
    if not re.fullmatch(r"\d+|(\d+(\.\d+)?|\.\d+)%", amount):
        raise ValueError(f"={amount} is not an amount; write =10% or =500 (rows)")


def subset_indices(num_rows: int, amount: str | None) -> np.ndarray:
    """The rows that `amount` ("10%", "500", None = all) takes of `num_rows`: int64 [n], in training order.

    INTERFACE: n = int(num_rows x percent / 100), in exact arithmetic; n = num_rows keeps the file's order. The seed is
    42 whatever the run's: these are the reference run's rows.
    Raises ValueError where num_rows or n is 0, or n is more than num_rows.
    """
    amount = amount or "100%"
    count = int(num_rows * Fraction(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    if num_rows == 0:
        raise ValueError("it holds no rows")
    if not 0 < count <= num_rows:
        raise ValueError(f"{amount} of {num_rows} rows is {'more than there are' if count else 'none'}")
    if count == num_rows:
        return np.arange(num_rows)
    return np.random.RandomState(42).choice(num_rows, size=count, replace=False)


@dataclass(frozen=True)
class Rows:
    """The rows of one source.

    identity: asked_for and path, what the contents are known by (sha256, or revision, a commit hash, and split), and
    num_rows of the source, rows_used of them.
    indices: int64 [n], the rows taken, in training order.
    read(indices): those rows, each a dict or the bytes of a JSON line, of which `decode_row` makes a dict.
    numbers: int64 [rows of the source], what messages call each: its line, or its place, counted from 1.
    """

    source: Source
    identity: dict
    indices: np.ndarray
    read: Callable
    numbers: np.ndarray


def load_source(source: Source) -> Rows:
    """Opens one source, a local file by reading it whole, so that its sha256 is that of the rows. Raises UserError,
    naming it, if it cannot be read or has not the rows asked for."""
    with as_user_error(source.path, OSError, ValueError, RuntimeError):
        if opener := OPENERS.get(Path(source.path).suffix):
            content = Path(source.path).read_bytes()
            known_by = {"sha256": hashlib.sha256(content).hexdigest()}
            read, numbers = opener(content)
        else:
            known_by, read, numbers = _open_hub(source)
        indices = subset_indices(len(numbers), source.amount)
    asked = {"asked_for": source.text, "path": source.path}
    identity = {**asked, **known_by, "num_rows": len(numbers), "rows_used": len(indices)}
    return Rows(source, identity, indices, read, numbers)


def decode_row(raw: bytes | dict) -> dict:
    """One item of Rows.read -> the row. Raises UserError, without the row's place, if it is not a JSON object."""
    with as_user_error("not valid JSON", ValueError, RecursionError):
        row = json.loads(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


# ------------------------------------------------------------- openers: each returns Rows' read and numbers
def _open_lines(content: bytes) -> tuple[Callable, np.ndarray]:
    """JSON lines; blank ones are left out."""
    lines = content.split(b"\n")
    numbers = np.array([number for number, line in enumerate(lines, start=1) if line.strip()], np.int64)
    return lambda indices: [lines[number - 1] for number in numbers[indices]], numbers


def _open_json(content: bytes) -> tuple[Callable, np.ndarray]:
    """A JSON array of objects; a .json file of JSON lines is read as such."""
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return _open_lines(content)
    rows = json.loads(content)
    if not isinstance(rows, list):
        raise ValueError("must hold an array of objects, or an object a line")
    return lambda indices: [rows[i] for i in indices], np.arange(1, len(rows) + 1)


def _open_parquet(content: bytes) -> tuple[Callable, np.ndarray]:
    import pyarrow.parquet
    from datasets import Dataset

    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    return _arrow_rows(Dataset(file.read(names or None)))


OPENERS = {".jsonl": _open_lines, ".json": _open_json, ".parquet": _open_parquet}


def _open_hub(source: Source) -> tuple[dict, Callable, np.ndarray]:
    """Through `datasets`, at the commit that the revision names now (a whole commit hash is not looked up)."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    commit = source.revision
    with as_user_error(f"dataset_mixer {source.text!r}"):
        if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        dataset = load_dataset(source.path, revision=commit, split=source.split)
        if not all(commit in file["filename"] for file in dataset.cache_files):  # offline, the last one cached is given
            raise ValueError(f"the hub cannot be reached, and what was last cached is not commit {commit}")
    return {"revision": commit, "split": source.split}, *_arrow_rows(dataset)


def _arrow_rows(dataset) -> tuple[Callable, np.ndarray]:
    """Of a `datasets.Dataset`, only the columns that are used."""
    dataset = dataset.select_columns([name for name in dataset.column_names if name in COLUMNS] or dataset.column_names)

    def read(indices):
        columns = dataset[indices.tolist()]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(indices))]

    return read, np.arange(1, len(dataset) + 1)
