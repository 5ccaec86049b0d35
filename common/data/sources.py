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
    revision: str | None = None
    split: str = "train"
    amount: str | None = None  # "10%", "500" or None for all rows


def parse_source(text: str) -> Source:
    """`SOURCE[@REVISION][:SPLIT][=AMOUNT]` -> Source. Only looks whether local files exist; reads nothing.

    A local path may itself hold '@', ':' or '=': it ends at a .jsonl, .json or .parquet suffix, at the last one
    where such a file exists. Raises UserError for anything that is not of this form.
    """
    ends = [match.end() for match in LOCAL_FILE.finditer(text)]
    if ends:
        existing = [end for end in ends if Path(text[:end]).is_file()]
        end = max(existing or ends)
        tail = TAIL.fullmatch(text[end:])
        if not existing:
            raise UserError(f"dataset_mixer {text!r}: there is no file {text[:end]}")
        if tail is None or tail["revision"] or tail["split"] not in (None, "train"):
            raise UserError(f"dataset_mixer {text!r}: a local file takes only an amount, {text[:end]}=10% or =500")
        return Source(text, text[:end], True, amount=_checked_amount(text, tail["amount"]))
    path = re.match(r"[^@:=]*", text)[0]
    tail = TAIL.fullmatch(text[len(path) :])
    if path.startswith(("/", ".", "~")) or (path and Path(path).exists()):
        raise UserError(f"dataset_mixer {text!r}: local data must be a .jsonl, .json or .parquet file, not {path}")
    if tail is None or not HUB_ID.fullmatch(path):
        raise UserError(
            f"dataset_mixer {text!r}: write SOURCE[@REVISION][:SPLIT][=AMOUNT]; SOURCE is a hub id, as in "
            "allenai/tulu-3-sft-mixture, or a .jsonl, .json or .parquet file"
        )
    return Source(text, path, False, tail["revision"], tail["split"] or "train", _checked_amount(text, tail["amount"]))


def _checked_amount(text: str, amount: str | None) -> str | None:
    """A well-formed amount unchanged; raises UserError for any other."""
    if amount is None:
        return None
    if re.fullmatch(r"\d*\.\d+|\d+\.", amount):
        number = float(amount)
        other = f"{number * 100:g}%" if number <= 1 else f"{int(number)} (rows)"
        raise UserError(f"dataset_mixer {text!r}: ={amount} could mean two things; write ={other} or ={number:g}%")
    if not re.fullmatch(r"\d{1,18}|(\d{1,18}(\.\d+)?|\.\d+)%", amount):
        raise UserError(f"dataset_mixer {text!r}: ={amount} is not an amount; write =10% or =500 (rows)")
    if not 0 < Fraction(amount.removesuffix("%")) <= (100 if amount.endswith("%") else float("inf")):
        raise UserError(f"dataset_mixer {text!r}: ={amount} must be more than none of the rows, and at most all")
    return amount


def subset_indices(num_rows: int, amount: str | None) -> np.ndarray:
    """The rows that `amount` ("10%", "500", None = all) takes of `num_rows`: int64 [n], in training order.

    INTERFACE: n = int(num_rows x percent / 100), in exact arithmetic; n = num_rows keeps the file's order.
    Raises ValueError where num_rows or n is 0, or n is more than num_rows.
    """
    count = (
        num_rows
        if amount is None
        else int(amount)
        if amount.isdigit()
        else int(num_rows * Fraction(amount.removesuffix("%")) / 100)
    )
    if num_rows == 0:
        raise ValueError("it holds no rows")
    if not 0 < count <= num_rows:
        raise ValueError(f"{amount} of {num_rows} rows is {'more than there are' if count else 'none'}")
    if count == num_rows:
        return np.arange(num_rows)
    return np.random.RandomState(SUBSET_SEED).choice(num_rows, size=count, replace=False)


@dataclass(frozen=True)
class Rows:
    """The rows of one source, read on workload.

    identity: what their contents are known by, {"sha256": ...} or {"revision": commit hash, "split": ...}.
    indices: int64 [n], the rows taken, in training order.
    read(indices): those rows, each a dict or the bytes of a JSON line, of which `decode_row` makes a dict.
    numbers: int64 [rows of the source], what messages call each: its line, or its place, counted from 1.
    stamp: file_stamp of the local file when its identity was read; None for the hub, whose commits do not change.
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
    opener = (
        {".jsonl": _open_lines, ".json": _open_json, ".parquet": _open_parquet}[Path(source.path).suffix]
        if source.local
        else _open_hub
    )
    stamp = file_stamp(source.path) if source.local else None
    with as_user_error(source.path, OSError, ValueError):
        identity, read, numbers = opener(source)
        indices = subset_indices(len(numbers), source.amount)
    return Rows(source, identity, indices, read, numbers, stamp)


def decode_row(raw: bytes | dict) -> dict:
    """One item of Rows.read -> the row. Raises UserError, without the row's place, if it is not a JSON object."""
    with as_user_error("not valid JSON", ValueError, RecursionError):
        row = json.loads(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def _open_lines(source: Source):
    """JSON lines. One pass finds the digest and where each line that is not blank begins."""
    digest, starts, numbers, position = hashlib.sha256(), [], [], 0
    with open(source.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if not line.isspace():
                starts.append(position)
                numbers.append(number)
            position += len(line)
    starts = np.array(starts, np.int64)

    def read(indices):
        lines = []
        with open(source.path, "rb") as file:
            for start in starts[indices].tolist():
                file.seek(start)
                lines.append(file.readline())
        return lines

    return {"sha256": digest.hexdigest()}, read, np.array(numbers, np.int64)


def _open_json(source: Source):
    """A JSON array of objects; a .json file of JSON lines is read as such."""
    content = Path(source.path).read_bytes()
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return _open_lines(source)
    with as_user_error(f"{source.path}: not valid JSON", ValueError, RecursionError):
        rows = json.loads(content)
    if not isinstance(rows, list):
        raise UserError(f"{source.path}: must hold an array of objects, or an object a line")
    identity = {"sha256": hashlib.sha256(content).hexdigest()}
    return identity, lambda indices: [rows[i] for i in indices], np.arange(1, len(rows) + 1)


def _open_parquet(source: Source):
    import pyarrow.parquet
    from datasets import Dataset

    with open(source.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with as_user_error(f"{source.path}: not a readable parquet file", pyarrow.ArrowException, OSError):
        names = pyarrow.parquet.read_schema(source.path).names
        table = pyarrow.parquet.read_table(source.path, columns=[name for name in names if name in COLUMNS] or None)
    return {"sha256": digest}, *_arrow_rows(Dataset(table), source)


def _open_hub(source: Source):
    """Through `datasets`, at the commit that the revision names now (a whole commit hash is not looked up)."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    commit = source.revision
    with as_user_error(f"dataset_mixer {source.text!r}"):
        if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        dataset = load_dataset(source.path, revision=commit, split=source.split)
    if not all(commit in file["filename"] for file in dataset.cache_files):  # offline, the last one cached is given
        raise UserError(
            f"dataset_mixer {source.text!r}: the hub cannot be reached, and what was last cached from it is "
            f"not commit {commit}"
        )
    return {"revision": commit, "split": source.split}, *_arrow_rows(dataset, source)


def _arrow_rows(dataset, source: Source):
    """(read, numbers) of a `datasets.Dataset`, only the columns that are used."""
    names = [name for name in dataset.column_names if name in COLUMNS]
    dataset = dataset.select_columns(names or dataset.column_names)

    def read(indices):
        with as_user_error(f"{source.path}: a text column does not hold UTF-8", UnicodeDecodeError):
            columns = dataset[indices.tolist()]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(indices))]

    return read, np.arange(1, len(dataset) + 1)
