"""The token cache: a data set tokenized once, keyed by all that its tokens depend on, memory-mapped by every rank.

A finished cache is a folder `<kind>-<key>` of flat arrays and a manifest. It is built in another folder and renamed,
and is used only if every size and digest in the manifest holds: a torn or edited one is built again. Nobody has to
delete one: whatever would change the tokens changes the key.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import types
import uuid
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import transformers
import xxhash

from common.data import chat_template as chat_templates
from common.data import sources as mixer
from common.data import tokens as tokenization
from common.data.chat_template import ChatTemplate, Dropped
from common.data.sources import Rows, decode_row, load_source, parse_source
from common.data.tokens import Encoder, PreferencePair, SFTSample
from common.failures import UserError, as_user_error, print_line, progress

BLOCK_ROWS = 128  # rows that go to a process at a time
MIN_ROWS_PER_PROCESS = 2048  # starting a process takes seconds: small data is tokenized in this one
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")

# The arrays of each kind, name: (dtype, shape of an item). Tokens and spans lie end to end, the others have an item a
# sample. rows: source, row number.
_BOTH = {
    "tokens": (np.int32, ()),
    "lengths": (np.int32, ()),
    "num_targets": (np.int32, ()),
    "truncated": (np.bool_, ()),
    "rows": (np.int64, (2,)),
}
ARRAYS = {
    "sft": {**_BOTH, "spans": (np.int32, (2,)), "num_spans": (np.int32, ())},
    "dpo": {**_BOTH, "pair_lengths": (np.int32, (3,)), "starts": (np.int32, (2,))},
}


# --------------------------------------------------------------------------------- reading
class DamagedCache(Exception):
    """A cache folder that is not exactly what was written."""


class TokenDataset:
    """A finished token cache, memory-mapped: indexing takes no memory, opening two int64 a sample.

    kind: "sft" or "dpo".  digest: hex, of all arrays, wherever they were read from.  stats: what `_stats` returned.
    lengths: int32 [n], tokens of each sample (of a pair: its prompt once, and both completions).
    num_targets: int32 [n], its target tokens (of a pair: the scored tokens of both sides).
    pair_lengths: DPO only, int32 [n, 3], tokens of the prompt, the rest of chosen, the rest of rejected.
    ds[i]: SFTSample or PreferencePair. All arrays are read-only views.
    """

    def __init__(self, path: str | Path):
        """Reads and checks every byte once. Raises DamagedCache."""
        folder, self._arrays = Path(path), {}
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            if not isinstance(manifest, dict) or manifest.pop("manifest_digest", None) != _digest_json(manifest):
                raise DamagedCache(f"{folder}: manifest.json was changed")
            self.kind, self.stats, self.digest = manifest["kind"], manifest["stats"], _digest_json(manifest["files"])
            for name, (dtype, shape) in ARRAYS[self.kind].items():
                if _digest_file(folder / f"{name}.bin") != manifest["files"][name]:
                    raise DamagedCache(f"{folder}: {name}.bin was changed")
                self._arrays[name] = np.asarray(np.memmap(folder / f"{name}.bin", dtype, "r")).reshape(-1, *shape)
        except (OSError, ValueError) as error:
            raise DamagedCache(f"{folder}: {error}") from error
        self.lengths, self.num_targets = self._arrays["lengths"], self._arrays["num_targets"]
        self.pair_lengths = self._arrays.get("pair_lengths")
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._span_ends = np.cumsum(self._arrays["num_spans"], dtype=np.int64) if self.kind == "sft" else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> SFTSample | PreferencePair:
        if not 0 <= i < len(self):
            raise IndexError(i)
        tokens = self._arrays["tokens"][self._ends[i] - self.lengths[i] : self._ends[i]]
        if self.kind == "sft":
            end = self._span_ends[i]
            return SFTSample(tokens, self._arrays["spans"][end - self._arrays["num_spans"][i] : end])
        prompt, chosen, _ = self.pair_lengths[i].tolist()
        return PreferencePair(
            tokens[:prompt],
            tokens[prompt : prompt + chosen],
            tokens[prompt + chosen :],
            *self._arrays["starts"][i].tolist(),
        )

    def source_of(self, i: int) -> str:
        """`file:row` of sample i, for messages."""
        source, row = self._arrays["rows"][i].tolist()
        return f"{self.stats['sources'][source]['path']}:{row}"


def tokenized_data(
    kind: str, config, tokenizer, tokenizer_folder: str, template: ChatTemplate, num_proc: int, ranks
) -> TokenDataset:
    """A run's data, tokenized by one rank of each node if no run has before, opened by every rank. Collective.

    config: common.config.TrainConfig; the rest as in prepare_tokens, with its errors and open_tokens' own.
    """
    path = ranks.once_per_node(
        lambda: prepare_tokens(
            kind,
            config.dataset_mixer,
            tokenizer,
            tokenizer_folder,
            template,
            config.max_seq_length,
            config.cache_dir,
            num_proc,
        )
    )
    return open_tokens(path)


def open_tokens(path: str) -> TokenDataset:
    """Opens what prepare_tokens returned. Raises UserError if the folder is not exactly what was written."""
    try:
        return TokenDataset(path)
    except DamagedCache as error:
        raise UserError(f"token cache {error}; run again, and it is rebuilt") from error


# --------------------------------------------------------------------------------- building
def prepare_tokens(
    kind: str,
    dataset_mixer: list[str],
    tokenizer,
    tokenizer_path: str,
    template: ChatTemplate,
    max_seq_length: int,
    cache_dir: str,
    num_proc: int,
    say=print_line,
) -> str:
    """The path of the finished cache of this data, built by num_proc processes if it is not there yet.

    kind: "sft" or "dpo". To be called by one process a node; several at once are safe. Raises UserError, with file
    and row, for data that cannot be used, and leaves nothing in cache_dir then.
    """
    sources = [load_source(parse_source(text)) for text in dataset_mixer]
    tokenize = BlockTokenizer(kind, template, Encoder(tokenizer), max_seq_length)
    key = cache_key(tokenize, sources, tokenizer_path)
    root = Path(cache_dir) / "tokens"
    final = root / f"{kind}-{key[:32]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(root)
        if "strftime_now" in template.jinja:
            say(
                f"warning: chat template {template.name!r} can print the date of the day on which data is tokenized; a run "
                f"resumes only while {final} is there"
            )
        if final.exists():
            try:
                say(f"data: {len(TokenDataset(final)):,} samples, tokenized before, in {final}")
                return str(final)
            except DamagedCache as error:
                say(f"data: token cache {error}; building it again")
        if not template.closing:
            say(f"warning: chat template {template.name!r} ends answers with no token: the model learns no end")
        with _build_folder(root) as folder:
            stats = _build(tokenize, sources, num_proc, folder, say)
            for rows in sources:
                rows.require_unchanged()
            _publish(folder, final)
    except OSError as error:
        raise UserError(f"cache_dir {cache_dir}: {error}") from error
    for role, count in stats["unrendered_roles"].items():
        say(f"warning: chat template {template.name!r} leaves out messages of role {role!r}: {count:,} of them")
    say(f"data: {stats['kept']:,} of {stats['rows_read']:,} rows kept, tokenized in {final}")
    return str(final)


def cache_key(tokenize: "BlockTokenizer", sources: list[Rows], tokenizer_path: str) -> str:
    """sha256, in hex, of all that the tokens and their rows' names depend on."""
    tokenizer = tokenize.template.tokenizer
    paths = [path for pattern in TOKENIZER_FILES for path in Path(tokenizer_path).glob(pattern) if path.is_file()]
    code = [module.__file__ for module in (mixer, chat_templates, tokenization)] + [__file__]
    return _digest_json(
        {
            "kind": tokenize.kind,
            "max_seq_length": tokenize.max_seq_length,
            "sources": [[rows.source.text, rows.identity] for rows in sources],
            "template": tokenize.template.digest,
            "tokenizer": hashlib.sha256(tokenize.encoder.backend.to_str().encode()).hexdigest(),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "files": [
                [Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest()] for path in sorted(paths) + code
            ],
            "versions": [module.__version__ for module in (np, jinja2, tokenizers, transformers)],
        }
    )


def _build(tokenize: "BlockTokenizer", sources: list[Rows], num_proc: int, folder: Path, say) -> dict:
    """Tokenizes all rows into the arrays of `folder` and writes the manifest. Returns the stats."""
    num_rows = sum(len(rows.indices) for rows in sources)
    num_proc = max(1, min(num_proc, num_rows // MIN_ROWS_PER_PROCESS))
    counts = Counter()
    with ExitStack() as stack:
        advance = stack.enter_context(progress("tokenizing", num_rows, "rows", say))
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in ARRAYS[tokenize.kind]}
        for arrays, block_counts in _map_blocks(tokenize, sources, num_proc):
            for name, array in arrays.items():
                files[name].write(array.tobytes())
            counts.update(block_counts)
            advance(block_counts["rows_read", ""])
    if (folder / "lengths.bin").stat().st_size == 0:
        reasons = ", ".join(f"{count} x {reason}" for (what, reason), count in counts.items() if what == "dropped")
        raise UserError(f"{', '.join(rows.source.text for rows in sources)}: no row is left to train on ({reasons})")
    stats = _stats(folder, counts, sources)
    manifest = {
        "kind": tokenize.kind,
        "stats": stats,
        "files": {name: _digest_file(folder / f"{name}.bin") for name in files},
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "manifest_digest": _digest_json(manifest)}, indent=1))
    return stats


def _stats(folder: Path, counts: Counter, sources: list[Rows]) -> dict:
    """What data_table shows and run_config.json records. counts: (what, detail) -> number."""

    def by_detail(what):
        return {detail: number for (name, detail), number in counts.most_common() if name == what}

    lengths = np.fromfile(folder / "lengths.bin", np.int32)
    percentiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)}
    return {
        "sources": [
            {
                "asked_for": rows.source.text,
                "path": rows.source.path,
                **rows.identity,
                "num_rows": len(rows.numbers),
                "rows_used": len(rows.indices),
            }
            for rows in sources
        ],
        "formats": by_detail("format"),
        "rows_read": counts["rows_read", ""],
        "kept": len(lengths),
        "truncated": int(np.fromfile(folder / "truncated.bin", np.bool_).sum()),
        "dropped": by_detail("dropped"),
        "unrendered_roles": by_detail("unrendered_role"),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "target_tokens": int(np.fromfile(folder / "num_targets.bin", np.int32).sum(dtype=np.int64)),
        "length_percentiles": {**percentiles, "max": int(lengths.max())},
    }


def _map_blocks(tokenize: "BlockTokenizer", sources: list[Rows], num_proc: int):
    """Yields tokenize(block) of every block of rows, in order, computed by num_proc processes."""

    def blocks():
        for number, rows in enumerate(sources):
            for start in range(0, len(rows.indices), BLOCK_ROWS):
                indices = rows.indices[start : start + BLOCK_ROWS]
                with as_user_error(rows.source.path, OSError):
                    read = rows.read(indices)
                yield number, rows.source.path, rows.numbers[indices].tolist(), read

    if num_proc == 1:
        yield from map(tokenize, blocks())
        return
    # Fresh processes: a fork would copy the locks of this one's torch, NCCL and tokenizer threads as they stand.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, spawn, _start_worker, (pickle.dumps(tokenize),)) as pool:
        waiting = deque()
        try:
            for block in blocks():
                with _main_module_hidden():
                    waiting.append(pool.submit(_work, block))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a tokenizing process was killed, most likely for want of memory") from error
        finally:
            pool.shutdown(cancel_futures=True)


class BlockTokenizer:
    """Tokenizes blocks of rows; picklable. A block: source number, its path, row numbers, rows as Rows.read gave them.

    Returns ({name: array as in ARRAYS}, Counter of (what, detail)). Raises UserError naming file and row.
    """

    def __init__(self, kind: str, template: ChatTemplate, encoder: Encoder, max_seq_length: int):
        self.kind, self.template, self.encoder, self.max_seq_length = kind, template, encoder, max_seq_length

    def __call__(self, block):
        source, path, numbers, rows = block
        counts, rendered, samples = Counter({("rows_read", ""): len(rows)}), [], []
        render, tokenize = (
            (self._render_sft, self._tokenize_sft) if self.kind == "sft" else (self._render_dpo, self._tokenize_dpo)
        )
        # In two passes: rendering between any two rows' tokenization would cost that a fifth more, in cache misses.
        for number, raw in zip(numbers, rows, strict=True):
            with _in_row(f"{path}:{number}", counts):
                rendered.append((number, render(decode_row(raw), counts)))
        for number, texts in rendered:
            with _in_row(f"{path}:{number}", counts):
                samples.append({**tokenize(*texts, self.encoder, self.max_seq_length), "rows": (source, number)})
        arrays = {}
        for name, (dtype, shape) in ARRAYS[self.kind].items():
            items = [sample[name] for sample in samples]
            items = np.concatenate(items) if name in ("tokens", "spans") and items else items
            arrays[name] = np.array(items, dtype).reshape(-1, *shape)
        return arrays, counts

    def _render_sft(self, row: dict, counts: Counter) -> tuple:
        form, messages = tokenization.sft_conversation(row)
        self._count(form, messages, counts)
        return self.template.render(messages)

    def _render_dpo(self, row: dict, counts: Counter) -> tuple:
        form, chosen, rejected = tokenization.preference_conversations(row)
        self._count(form, chosen, counts)
        return tokenization.render_pair(chosen, rejected, self.template)

    def _tokenize_sft(self, *arguments) -> dict:
        (ids, spans), truncated = tokenization.tokenize_sft(*arguments)
        return {
            "tokens": ids,
            "lengths": len(ids),
            "truncated": truncated,
            "spans": spans,
            "num_spans": len(spans),
            "num_targets": (spans[:, 1] - spans[:, 0]).sum(),
        }

    def _tokenize_dpo(self, *arguments) -> dict:
        (*ids, start, other_start), truncated = tokenization.tokenize_pair(*arguments)
        lengths, tokens = list(map(len, ids)), np.concatenate(ids)
        return {
            "tokens": tokens,
            "lengths": len(tokens),
            "truncated": truncated,
            "pair_lengths": lengths,
            "starts": (start, other_start),
            "num_targets": sum(lengths[1:]) - start - other_start,
        }

    def _count(self, form: str, messages: list[dict], counts: Counter):
        counts["format", form] += 1
        for message in messages:
            if not self.template.shows_role(message["role"]):
                counts["unrendered_role", message["role"]] += 1


@contextmanager
def _in_row(where: str, counts: Counter):
    """Counts the row if it is dropped; says its place if there is a mistake in it."""
    try:
        yield
    except Dropped as reason:
        counts["dropped", str(reason)[:120]] += 1
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


_tokenize = None  # this worker process's BlockTokenizer


def _start_worker(pickled: bytes):
    global _tokenize
    _tokenize = pickle.loads(pickled)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed: nobody else would end this process


def _work(block):
    return _tokenize(block)


@contextmanager
def _main_module_hidden():
    """Processes started within do not import the training script, and torch and DeepSpeed with it, once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --------------------------------------------------------------------------------- folders
@contextmanager
def _locked(path: Path):
    """An exclusive lock on a file, made if need be. The kernel frees it when its process dies, however it dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _build_folder(root: Path):
    """A new folder to build in, locked so that others see it is in use; removed at the end unless it was renamed."""
    folder = root / f"{uuid.uuid4().hex}.build"
    with ExitStack() as stack:
        with _locked(root / ".lock"):
            folder.mkdir()
            stack.enter_context(_locked(folder / ".lock"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_dead_builds(root: Path):
    """Removes the build folders of processes that were killed: those that nobody holds locked."""
    with _locked(root / ".lock"):
        for folder in root.glob("*.build"):
            try:
                with open(folder / ".lock", "w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue  # in use


def _publish(folder: Path, final: Path):
    """Gives a finished build its name, unless another process has just put a good one there."""
    with _locked(folder.parent / ".lock"):
        try:
            TokenDataset(final)
        except DamagedCache:
            if final.exists():
                final.rename(folder / "damaged")
            (folder / ".lock").unlink()
            folder.rename(final)
            shutil.rmtree(final / "damaged", ignore_errors=True)


def _digest_file(path: Path) -> list:
    """[bytes, xxh3-128]: against accidents, at the speed of memory; read in pieces, so that nothing stays mapped."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return [size, digest.hexdigest()]


def _digest_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
