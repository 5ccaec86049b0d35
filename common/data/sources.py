"""Which rows are trained on: the `dataset_mixer` flag, and reading what it names.

    SOURCE[@REVISION][:SPLIT][=AMOUNT]     e.g. allenai/tulu-3-sft-mixture@main:train=10%   chats.jsonl=500

SOURCE is a Hugging Face hub id (ORG/NAME, or ORG/NAME/CONFIG), or local: a file of one of READERS' kinds, a glob, or a
folder (of such files, or of `save_to_disk`). A hub revision is resolved to its commit hash, local files to the sha256
of their contents: they key the token cache and are recorded in run_config.json.
"""

import codecs
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from common.data.conversations import COLUMNS
from common.failures import UserError, as_user_error, named_file

LOCAL_FILE = re.compile(r"\.(?P<kind>jsonl|json|csv|parquet|arrow)(\.(?P<packed>gz|zst))?$")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*(/[\w.+-]+)?)?")
TAIL = re.compile(r"(?:@(?P<revision>[^:=]+))?(?::(?P<split>[^=]+))?(?:=(?P<amount>.*))?")
Opened = tuple[Callable, np.ndarray, list[str]]  # of one file: Rows' read and numbers of it alone, and unread
CODECS = {"gz": "gzip", "zst": "zstd"}  # as pyarrow calls them


@dataclass(frozen=True)
class Source:
    """One parsed item of `dataset_mixer`."""

    text: str  # as typed
    path: str  # hub id, with its config, or a local path or glob
    revision: str | None
    split: str
    amount: str | None  # "10%", "500" or None for all rows
    is_local: bool


def parse_source(text: str) -> Source:
    """`SOURCE[@REVISION][:SPLIT][=AMOUNT]` -> Source. Only looks whether local files exist; reads nothing.

    A local path may itself hold '@', ':' or '=': it is the longest beginning of the text, up to one of these or the
    end, that exists here; else it ends with a suffix of a file. Raises UserError for anything that is not of this form.
    """
    cuts = [match.start() for match in re.finditer("[@:=]|$", text)]
    ends = [cut for cut in cuts if cut and local_files(text[:cut])]
    ends = ends or [cut for cut in cuts if LOCAL_FILE.search(text[:cut])]
    path = text[: max(ends or cuts[:1])]
    tail = TAIL.fullmatch(text[len(path) :])
    with as_user_error(f"dataset_mixer {text!r}", ValueError):
        if (
            tail is None
            or not (ends or HUB_ID.fullmatch(path))
            or (Path(path).is_file() and not LOCAL_FILE.search(path))
        ):
            kinds = ".jsonl, .json, .csv, .parquet or .arrow file (.gz, .zst too)"
            raise ValueError(f"write SOURCE[@REVISION][:SPLIT][=AMOUNT]; SOURCE: a hub id, folder, glob, {kinds}")
        if ends and (tail["revision"] or (tail["split"] not in (None, "train") and not Path(path).is_dir())):
            raise ValueError("a local file has neither revisions nor splits")
        if tail["amount"] is not None:
            check_amount(tail["amount"])
    return Source(text, path, tail["revision"], tail["split"] or "train", tail["amount"], bool(ends))


def local_files(path: str) -> list[str]:
    """The path itself if there is such a file or folder, else the files that it matches as a glob, in order."""
    return [path] if Path(path).exists() else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))


def check_amount(amount: str) -> None:
    """Raises ValueError unless it is a percentage or a number of rows. How many it may be, the rows decide."""
    if re.fullmatch(r"[0-9]*\.[0-9]+|[0-9]+\.", amount):
        number = float(amount)
        other = f"{number * 100:g}%" if number <= 1 else f"{int(number)} (rows)"
        raise ValueError(f"={amount} could mean two things; write ={other} or ={number:g}%")
    if not re.fullmatch(r"[0-9]+|([0-9]+(\.[0-9]+)?|\.[0-9]+)%", amount):
        raise ValueError(f"={amount} is not an amount; write =10% or =500 (rows)")


def subset_indices(num_rows: int, amount: str | None) -> np.ndarray:
    """The rows that `amount` ("10%", "500", None = all) takes of `num_rows`: int64 [n], in training order.

    INTERFACE: n = int(num_rows x percent / 100), in exact arithmetic; n = num_rows keeps the file's order. The seed is
    42 whatever the run's: these are the reference run's rows. Above 100% every row comes as often as n holds num_rows,
    each time in the file's order, then a subset of what is left of n.
    Raises ValueError where num_rows or n is 0, or a number of rows is more than num_rows.
    """
    amount = amount or "100%"
    is_share = amount.endswith("%")
    count = int(num_rows * Fraction(amount[:-1]) / 100) if is_share else int(amount)
    if num_rows == 0:
        raise ValueError("it holds no rows")
    if count == 0 or (count > num_rows and not is_share):
        raise ValueError(f"{amount} of {num_rows} rows is {'more than there are' if count else 'none'}")
    times, rest = divmod(count, num_rows)
    subset = np.random.RandomState(42).choice(num_rows, size=rest, replace=False)
    return np.concatenate([np.tile(np.arange(num_rows), times), subset])


@dataclass(frozen=True)
class Rows:
    """The rows of one source.

    identity: asked_for and path, what the contents are known by (sha256, or revision, a commit hash, and split), and
    num_rows of the source, rows_used of them.
    indices: int64 [n], the rows taken, in training order.
    read(indices): those rows, each a dict or the bytes of a JSON line, of which `decode_row` makes a dict.
    files: what the rows lie in.  file, numbers: int64 [rows of the source], which of `files` each is in, and what
    messages call it there: its line, or its place, counted from 1.
    unread: names of columns that no form of a row uses, and that are not read.
    """

    source: Source
    identity: dict
    indices: np.ndarray
    read: Callable
    files: list[str]
    file: np.ndarray
    numbers: np.ndarray
    unread: list[str]

    def place(self, index: int) -> str:
        """`file:row` of one row, for messages."""
        return f"{self.files[self.file[index]]}:{self.numbers[index]}"


def load_source(source: Source) -> Rows:
    """Opens one source, local files by reading them whole, so that their sha256 is that of the rows. Raises UserError,
    naming it, if it cannot be read or has not the rows asked for."""
    with as_user_error(source.path, OSError, ValueError, RuntimeError, MemoryError):
        known_by, names, opened = (_open_local if source.is_local else _open_hub)(source)
        reads, numbers, unread = zip(*opened, strict=True)
        file: np.ndarray = np.repeat(np.arange(len(names)), [*map(len, numbers)])
        indices = subset_indices(len(file), source.amount)

    def read(wanted: np.ndarray) -> list:
        found: dict[int, Any] = {}
        for i in np.unique(file[wanted]):
            of_file = wanted[file[wanted] == i]
            found |= zip(of_file.tolist(), reads[i](of_file - np.searchsorted(file, i)), strict=True)
        return [found[index] for index in wanted.tolist()]

    sizes = {"num_rows": len(file), "rows_used": len(indices)}
    identity = {"asked_for": source.text, "path": source.path, **known_by, **sizes}
    return Rows(source, identity, indices, read, names, file, np.concatenate(numbers), sorted({*chain(*unread)}))


def decode_row(raw: bytes | dict) -> dict:
    """One item of Rows.read -> the row. Raises UserError, without the row's place, if it is not a JSON object."""
    with as_user_error("not valid JSON", ValueError, RecursionError):
        row = json.loads(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


# ------------------------------------------------------------- local
def _open_local(source: Source) -> tuple[dict, list[str], list[Opened]]:
    """What the contents are known by, the files' names, and what they hold."""
    names, known_by = local_files(source.path) or [source.path], {}
    if Path(source.path).is_dir():
        names = _files_of_folder(source)
        there = {str(path) for path in Path(source.path).rglob("*") if LOCAL_FILE.search(path.name) and path.is_file()}
        if names[0].endswith(".arrow"):
            there = {name for name in there if name.endswith(".arrow")}  # save_to_disk writes .json beside them
        known_by = {"split": source.split, "left_out": sorted(there - {*names})}
    digests, files = [], []
    for name in names:
        with as_user_error(name, OSError, ValueError, RuntimeError, csv.Error):
            content = named_file(name).read_bytes()
            digests.append(hashlib.sha256(content).hexdigest())
            files.append(_open_file(name, content))
    whole = digests[0] if names == [source.path] else hashlib.sha256("\n".join([*names, *digests]).encode()).hexdigest()
    return {**known_by, "sha256": whole}, names, files


def _files_of_folder(source: Source) -> list[str]:
    """The files of a split, as `datasets` finds them, by their names or by a README's list."""
    from datasets import load_dataset_builder

    files = load_dataset_builder(source.path).config.data_files
    if source.split not in files:
        raise ValueError(f"it has no split {source.split!r}, but {[str(split) for split in files]}")
    inside = Path(source.path).resolve()
    return [str(Path(source.path) / Path(name).relative_to(inside)) for name in files[source.split]]


def _open_file(name: str, content: bytes) -> Opened:
    kind = LOCAL_FILE.search(name)
    if kind is None:
        raise ValueError("not a kind of file that is read here")
    if kind["packed"]:
        content = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), CODECS[kind["packed"]]).read()
    return READERS[kind["kind"]](content)


def _listed(rows: list, numbers: list[int] | None = None) -> Opened:
    return lambda indices: [rows[i] for i in indices], np.array(numbers or range(1, len(rows) + 1), np.int64), []


def _open_lines(content: bytes) -> Opened:
    """JSON lines; blank ones are left out."""
    lines = {number: line for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()}
    return _listed([*lines.values()], [*lines])


def _open_json(content: bytes) -> Opened:
    """A JSON array of objects; else JSON lines."""
    is_array = content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _listed(json.loads(content)) if is_array else _open_lines(content)


def _open_csv(content: bytes) -> Opened:
    """Comma-separated, with a line of names; every cell is a text, also one that reads `None` or `12`."""
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not as many cells as there are names of columns")
    return _listed(rows)


def _open_parquet(content: bytes) -> Opened:
    import pyarrow.parquet
    from datasets import Dataset

    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    names = file.schema_arrow.names  # those that are not used may be large, or of a type that `datasets` refuses
    return _arrow_rows(Dataset(file.read([name for name in names if name in COLUMNS] or None)), names)


def _open_arrow(content: bytes) -> Opened:
    from datasets import Dataset

    opened = pyarrow.ipc.open_file if content.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    table = opened(pyarrow.BufferReader(content)).read_all()
    return _arrow_rows(Dataset(table), table.column_names)


READERS = {"jsonl": _open_lines, "json": _open_json, "csv": _open_csv, "parquet": _open_parquet, "arrow": _open_arrow}


# ------------------------------------------------------------- hub
def _open_hub(source: Source) -> tuple[dict, list[str], list[Opened]]:
    """As _open_local, through `datasets`, at the commit that the revision names now; a commit hash is not looked up."""
    from datasets import load_dataset

    parts, commit = source.path.split("/"), source.revision
    name, config = "/".join(parts[:2]), parts[2:]
    with as_user_error(f"dataset_mixer {source.text!r}"):
        if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            commit = _commit_of(name, source.revision)
        dataset = load_dataset(name, *config, revision=commit, split=source.split)
        if not all(commit in file["filename"] for file in dataset.cache_files):  # offline, the last one cached is given
            raise ValueError(f"the hub cannot be reached, and what was last cached is not commit {commit}")
    names = dataset.column_names
    return {"revision": commit, "split": source.split}, [source.path], [_arrow_rows(dataset, names)]


def _commit_of(name: str, revision: str | None) -> str:
    """The commit that a revision names now. Raises what the hub's client does, with what is cached here."""
    from datasets import config
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:
        cached = Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).glob("*/*/" + 40 * "[0-9a-f]")
        if known := " or ".join(sorted({f"{name}@{folder.name}" for folder in cached})):
            raise ValueError(f"{type(error).__name__}; cached here, and read without the hub: {known}") from error
        raise


def _arrow_rows(dataset, names: list[str]) -> Opened:
    """Of a `datasets.Dataset`, only the columns that are used; names: of all. Arrow gives each struct of a column every
    key that any of them has, with null where a row has none: such nulls are left out. What is stored as JSON text keeps
    its own."""
    used = [name for name in names if name in COLUMNS] or names
    dataset = dataset.select_columns(used).with_format("arrow")

    def read(indices: np.ndarray) -> list[dict]:
        return [_without_fillers(row, dataset.features) for row in dataset[indices.tolist()].to_pylist()]

    return read, np.arange(1, len(dataset) + 1), [name for name in names if name not in used]


def _without_fillers(value, feature):
    """value: of arrow, as Python's.  feature: what `datasets` says that it is."""
    if isinstance(value, str) and type(feature).__name__ == "Json":
        return json.loads(value)
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _without_fillers(item, feature[key]) for key, item in value.items() if item is not None}
    of_items = getattr(feature, "feature", None)
    if isinstance(value, list) and type(of_items).__name__ not in ("NoneType", "Value"):
        return [_without_fillers(item, of_items) for item in value]
    return value
