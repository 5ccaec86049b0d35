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
from common.files import file_stamp

SUBSET_SEED = 42  # of every subset, whatever the run's seed: the reference run's rows
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")  # all that is read; others are ignored

LOCAL_FILE = re.compile(r"\.(jsonl|json|parquet)(?=$|[@:=])")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TAIL = re.compile(r"(?:@(?P<revision>[^:=]+))?(?::(?P<split>[^=]+))?(?:=(?P<amount>.*))?")


@dataclass(frozen=True)
class Source:
    """One parsed item of `dataset_mixer`."""

    text: str  # as typed
    path: str  # hub id, or path of a local file
    local: bool
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
    if ends and not existing:
        raise _refusal(text, f"there is no file {path}")
    if ends and (tail is None or tail["revision"] or tail["split"] not in (None, "train")):
        raise _refusal(text, f"a local file takes only an amount, {path}=10% or =500")
    if not ends and (path.startswith(("/", ".", "~")) or (path and Path(path).exists())):
        raise _refusal(text, f"local data must be a .jsonl, .json or .parquet file, not {path}")
    if not ends and (tail is None or not HUB_ID.fullmatch(path)):
        raise _refusal(text, "write SOURCE[@REVISION][:SPLIT][=AMOUNT]; SOURCE is a hub id or a local file")
    _check_amount(text, tail["amount"])
    return Source(text, path, bool(ends), tail["revision"], tail["split"] or "train", tail["amount"])


def _refusal(text: str, why: str) -> UserError:
    return UserError(f"dataset_mixer {text!r}: {why}")


def _check_amount(text: str, amount: str | None) -> None:
    """Raises UserError unless it is "10%", "500" or None."""
    if amount is None:
        return
    if re.fullmatch(r"\d*\.\d+|\d+\.", amount):
        number = float(amount)
        other = f"{number * 100:g}%" if number <= 1 else f"{int(number)} (rows)"
        raise _refusal(text, f"={amount} could mean two things; write ={other} or ={number:g}%")
    if not re.fullmatch(r"\d{1,18}|(\d{1,18}(\.\d+)?|\.\d+)%", amount):
        raise _refusal(text, f"={amount} is not an amount; write =10% or =500 (rows)")
    if not 0 < Fraction(amount.removesuffix("%")) <= (100 if amount.endswith("%") else float("inf")):
        raise _refusal(text, f"={amount} must be more than none of the rows, and at most all")


def subset_indices(num_rows: int, amount: str | None) -> np.ndarray:
    """The rows that `amount` ("10%", "500", None = all) takes of `num_rows`: int64 [n], in training order.

    INTERFACE: n = int(num_rows x percent / 100), in exact arithmetic; n = num_rows keeps the file's order.
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
    return np.random.RandomState(SUBSET_SEED).choice(num_rows, size=count, replace=False)


@dataclass(frozen=True)
class Rows:
    """The rows of one source, read on demand.

    identity: what their contents are known by, {"sha256": ...} or {"revision": commit hash, "split": ...}.
    indices: int64 [n], the rows taken, in training order.
    read(indices): those rows, each a dict or the bytes of a JSON line, of which `decode_row` makes a dict.
    numbers: int64 [rows of the source], what messages call each: its line, or its place, counted from 1.
    stamp: file_stamp of the local file before its identity was read; None for the hub, whose commits do not change.
    """

    source: Source
    identity: dict
    indices: np.ndarray
    read: Callable
    numbers: np.ndarray
    stamp: tuple | None

    def require_unchanged(self) -> None:
        """Raises UserError if the file is not what it was when its identity was read."""
        if self.stamp is not None and file_stamp(self.source.path) != self.stamp:
            raise UserError(f"{self.source.path}: was changed while it was read; run again once it stays as it is")


def load_source(source: Source) -> Rows:
    """Opens one source. Raises UserError, naming it, if it cannot be read or has not the rows asked for."""
    with as_user_error(source.path, OSError, ValueError, RuntimeError):
        if source.local:
            stamp, opener = file_stamp(source.path), OPENERS[Path(source.path).suffix]
            with open(source.path, "rb") as file:
                identity = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            read, numbers = opener(source.path)
        else:
            stamp, (identity, read, numbers) = None, _open_hub(source)
        indices = subset_indices(len(numbers), source.amount)
    return Rows(source, identity, indices, read, numbers, stamp)


def decode_row(raw: bytes | dict) -> dict:
    """One item of Rows.read -> the row. Raises UserError, without the row's place, if it is not a JSON object."""
    with as_user_error("not valid JSON", ValueError, RecursionError):
        row = json.loads(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


# ------------------------------------------------------------- openers: each returns Rows' read and numbers
def _open_lines(path: str) -> tuple[Callable, np.ndarray]:
    """JSON lines: one pass finds where each line that is not blank begins."""
    starts, numbers, position = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                starts.append(position)
                numbers.append(number)
            position += len(line)
    starts = np.array(starts, np.int64)

    def read(indices):
        lines = []
        with open(path, "rb") as file:
            for start in starts[indices].tolist():
                file.seek(start)
                lines.append(file.readline())
        return lines

    return read, np.array(numbers, np.int64)


def _open_json(path: str) -> tuple[Callable, np.ndarray]:
    """A JSON array of objects; a .json file of JSON lines is read as such."""
    content = Path(path).read_bytes()
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return _open_lines(path)
    rows = json.loads(content)
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold an array of objects, or an object a line")
    return lambda indices: [rows[i] for i in indices], np.arange(1, len(rows) + 1)


def _open_parquet(path: str) -> tuple[Callable, np.ndarray]:
    import pyarrow.parquet
    from datasets import Dataset

    names = [name for name in pyarrow.parquet.read_schema(path).names if name in COLUMNS]
    return _arrow_rows(Dataset(pyarrow.parquet.read_table(path, columns=names or None)), path)


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
        raise _refusal(source.text, f"the hub cannot be reached, and what was last cached is not commit {commit}")
    return {"revision": commit, "split": source.split}, *_arrow_rows(dataset, source.path)


def _arrow_rows(dataset, path: str) -> tuple[Callable, np.ndarray]:
    """Of a `datasets.Dataset`, only the columns that are used."""
    dataset = dataset.select_columns([name for name in dataset.column_names if name in COLUMNS] or dataset.column_names)

    def read(indices):
        with as_user_error(f"{path}: a text column does not hold UTF-8", UnicodeDecodeError):
            columns = dataset[indices.tolist()]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(indices))]

    return read, np.arange(1, len(dataset) + 1)
