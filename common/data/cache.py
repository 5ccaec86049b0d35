"""The token cache: a data set tokenized once, keyed by all that its tokens depend on, memory-mapped by every rank.

A finished cache is a folder `<kind>-<key>` of three flat files and a manifest. It is built in another folder and
renamed, by one process at a time, and used only if every digest in the manifest holds; else it is built again.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import transformers

from common.data import chat_template, sources, tokens
from common.data.chat_template import ChatTemplate, Dropped
from common.data.sources import Rows, decode_row, load_source, parse_source
from common.data.tokens import Encoder, PreferencePair, SFTSample
from common.failures import UserError, as_user_error, print_line, progress
from common.files import digest, file_digest, locked, naming

BLOCK_ROWS = 512  # rows that are rendered and then encoded together, by the tokenizer's threads

# What the files hold. tokens and marks lie end to end, sample after sample. marks of a conversation: its trained spans;
# of a pair: tokens of the prompt, of the rest of chosen, of the rest of rejected, chosen_start, rejected_start.
SAMPLE = [(name, np.int64) for name in ("length", "num_marks", "num_targets", "truncated", "source", "row")]
FILES = {"tokens.bin": np.int32, "marks.bin": np.int32, "samples.bin": np.dtype(SAMPLE)}


class TokenDataset:
    """A finished token cache, memory-mapped: indexing takes no memory, opening 24 bytes a sample.

    kind: "sft" or "dpo".  digest: hex, of all files, wherever they were read from.  stats: what `_stats` returned.
    lengths: int32 [n], tokens of each sample (of a pair: its prompt once, and both completions).
    num_targets: int32 [n], its target tokens (of a pair: the scored tokens of both sides).
    pair_lengths: DPO only, int32 [n, 3], tokens of the prompt, the rest of chosen, the rest of rejected.
    ds[i]: SFTSample or PreferencePair, read-only views.
    """

    def __init__(self, folder: str | Path):
        """Reads and checks every byte once. Raises UserError if one is not what was written."""
        try:
            manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
            digests = {name: file_digest(Path(folder) / name) for name in FILES}
            is_whole = manifest.pop("digest") == _json_digest(manifest) and manifest["files"] == digests
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            is_whole = False
        if not is_whole:
            raise UserError(f"token cache {folder} is not what was written; run again, and it is rebuilt")
        self.kind, self.stats, self.digest = manifest["kind"], manifest["stats"], _json_digest(digests)
        self._tokens, self._marks, self._samples = (
            np.asarray(np.memmap(Path(folder) / name, dtype, "r")) for name, dtype in FILES.items()
        )
        self.lengths, self.num_targets = (self._samples[name].astype(np.int32) for name in ("length", "num_targets"))
        self.pair_lengths = self._marks.reshape(-1, 5)[:, :3] if self.kind == "dpo" else None
        self._ends, self._mark_ends = (np.cumsum(self._samples[name]) for name in ("length", "num_marks"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> SFTSample | PreferencePair:
        ids = self._tokens[self._ends[i] - self.lengths[i] : self._ends[i]]
        marks = self._marks[self._mark_ends[i] - self._samples["num_marks"][i] : self._mark_ends[i]]
        if self.kind == "sft":
            return SFTSample(ids, marks.reshape(-1, 2))
        prompt, chosen, _, *starts = marks.tolist()
        return PreferencePair(*np.split(ids, [prompt, prompt + chosen]), *starts)

    def source_of(self, i: int) -> str:
        """`file:row` of sample i, for messages."""
        return f"{self.stats['sources'][self._samples['source'][i]]['path']}:{self._samples['row'][i]}"


def tokenized_data(kind: str, config, template: ChatTemplate, ranks) -> TokenDataset:
    """prepare_tokens by one rank of each node; opened by every rank. Collective. Raises their errors."""
    return TokenDataset(ranks.once_per_node(lambda: prepare_tokens(kind, config, template)))


# --------------------------------------------------------------------------------- building
def prepare_tokens(kind: str, config, template: ChatTemplate) -> str:
    """The path of the finished cache of a run's data, built if it is not there yet.

    kind: "sft" or "dpo".  config: common.config.TrainConfig; its dataset_mixer, max_seq_length and cache_dir count.
    Of several processes one builds, the others wait for it. Raises UserError, with file and row, for data that cannot
    be used, and leaves nothing of it in cache_dir.
    """
    all_rows = [load_source(parse_source(text)) for text in config.dataset_mixer]
    tokenize = BlockTokenizer(kind, template, Encoder(template.tokenizer, config.max_seq_length))
    root = Path(config.cache_dir) / "tokens"
    final = root / f"{kind}-{cache_key(tokenize, all_rows)}"
    warning = f"warning: chat template {template.name!r}"
    if "strftime_now" in template.jinja:
        print_line(f"{warning} can print the day's date; a run resumes only while {final} is there")
    if not template.closing:
        print_line(f"{warning} ends answers with no token: the model learns no end")
    if _is_whole(final):
        print_line(f"data: tokenized before, in {final}")
        return str(final)
    with as_user_error(f"cache_dir {config.cache_dir}", OSError):
        root.mkdir(parents=True, exist_ok=True)
        (root / ".lock").touch()
    with locked(root / ".lock", lambda: print_line(f"data: another run is building in {root}; waiting for it")):
        if not _is_whole(final):  # it may have been built while this process waited
            _build(tokenize, all_rows, final)
    for role, count in tokenize.unrendered_roles.items():
        print_line(f"{warning} leaves out messages of role {role!r}: {count:,} of them")
    return str(final)


def cache_key(tokenize: "BlockTokenizer", all_rows: list[Rows]) -> str:
    """Digest, in hex, of all that the tokens and their rows' names depend on."""
    special_tokens = tokenize.template.tokenizer.special_tokens_map
    code = [__file__, *(module.__file__ for module in (sources, chat_template, tokens))]
    parts = {
        "kind": tokenize.kind,
        "sources": [rows.identity for rows in all_rows],
        "template": tokenize.template.digest,
        "tokenizer": tokenize.encoder.backend.to_str(),  # max_seq_length is in it
        "special_tokens": {name: str(token) for name, token in special_tokens.items()},
        "code": [file_digest(Path(path)) for path in code],
        "versions": [module.__version__ for module in (np, jinja2, tokenizers, transformers)],
    }
    return _json_digest(parts)


def _is_whole(folder: Path) -> bool:
    try:
        TokenDataset(folder)
    except UserError:
        return False
    return True


def _build(tokenize: "BlockTokenizer", all_rows: list[Rows], final: Path) -> None:
    """Builds the cache in another folder and gives it its name. The caller holds the lock."""
    folder = final.parent / "building"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed, or it would hold the lock
    folder.mkdir()
    try:
        _write_files(tokenize, all_rows, folder)
        stats, digests = _stats(tokenize, all_rows, folder), {name: file_digest(folder / name) for name in FILES}
        manifest = {"kind": tokenize.kind, "stats": stats, "files": digests}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": _json_digest(manifest)}, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # what is there is not what was written
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_line(f"data: {stats['kept']:,} of {stats['rows_read']:,} rows kept, tokenized in {final}")


def _write_files(tokenize: "BlockTokenizer", all_rows: list[Rows], folder: Path) -> None:
    """Tokenizes all rows into FILES. Raises UserError if no row is left."""
    num_rows = sum(len(rows.indices) for rows in all_rows)
    with ExitStack() as stack:
        stack.enter_context(naming(folder))
        files = [stack.enter_context(open(folder / name, "wb")) for name in FILES]
        advance = stack.enter_context(progress("tokenizing", num_rows, "rows"))
        for source, rows in enumerate(all_rows):
            for start in range(0, len(rows.indices), BLOCK_ROWS):
                block = rows.indices[start : start + BLOCK_ROWS]
                for sample in tokenize(source, rows, block):
                    for file, values, dtype in zip(files, sample, FILES.values(), strict=True):
                        file.write(np.array(values, dtype).tobytes())
                advance(len(block))
    if (folder / "samples.bin").stat().st_size == 0:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in tokenize.dropped.items())
        raise UserError(f"{', '.join(rows.source.text for rows in all_rows)}: no row is left to train on ({reasons})")


def _stats(tokenize: "BlockTokenizer", all_rows: list[Rows], folder: Path) -> dict:
    """What data_table shows and run_config.json records."""
    samples = np.fromfile(folder / "samples.bin", FILES["samples.bin"])
    percentiles = {f"p{q}": int(np.percentile(samples["length"], q)) for q in (5, 50, 95)}
    return {
        "sources": [rows.identity for rows in all_rows],
        "formats": dict(tokenize.forms.most_common()),
        "rows_read": sum(len(rows.indices) for rows in all_rows),
        "kept": len(samples),
        "truncated": int(samples["truncated"].sum()),
        "dropped": dict(tokenize.dropped.most_common()),
        "unrendered_roles": dict(tokenize.unrendered_roles.most_common()),
        "tokens": int(samples["length"].sum()),
        "target_tokens": int(samples["num_targets"].sum()),
        "length_percentiles": {**percentiles, "max": int(samples["length"].max())},
    }


class BlockTokenizer:
    """Tokenizes blocks of rows, and counts what it met: rows of each form, messages of each role that the template does
    not show, rows dropped for each reason."""

    def __init__(self, kind: str, template: ChatTemplate, encoder: Encoder):
        self.kind, self.template, self.encoder = kind, template, encoder
        self.forms, self.unrendered_roles, self.dropped = Counter(), Counter(), Counter()

    def __call__(self, source: int, rows: Rows, block: np.ndarray) -> Iterator[tuple]:
        """(tokens, marks, a SAMPLE) of each row of `block` that is kept; the rows are those of source number `source`.
        Raises UserError naming file and row."""
        rendered = []
        with as_user_error(rows.source.path, OSError, ValueError):
            raw_rows = rows.read(block)
        for number, raw in zip(rows.numbers[block].tolist(), raw_rows, strict=True):
            with self._in_row(f"{rows.source.path}:{number}"):
                rendered.append((number, *self._render(decode_row(raw))))
        encodings = iter(self.encoder.encode([text for _, texts, _ in rendered for text in texts]))
        for number, texts, trained in rendered:
            encoded = [next(encodings) for _ in texts]
            with self._in_row(f"{rows.source.path}:{number}"):
                ids, marks, num_targets = self._sample(encoded, trained)
                truncated = any(encoding.overflowing for encoding in encoded)
                yield ids, marks, (len(ids), len(marks), num_targets, truncated, source, number)

    def _render(self, row: dict) -> tuple[list[str], list | int]:
        """The texts of a row, and what is trained of them, as sft_sample and preference_pair take it."""
        is_sft = self.kind == "sft"
        form, *conversations = (tokens.sft_conversation if is_sft else tokens.preference_conversations)(row)
        self.forms[form] += 1
        roles = [message["role"] for message in conversations[0]]
        self.unrendered_roles.update(role for role in roles if not self.template.shows_role(role))
        if is_sft:
            text, spans = self.template.render(*conversations)
            return [text], spans
        prompt, *completions = tokens.render_pair(*conversations, self.template)
        return [prompt + completion for completion in completions], len(prompt)

    def _sample(self, encodings: list, trained: list | int) -> tuple[np.ndarray, list | np.ndarray, int]:
        """(tokens, marks, number of targets) of one sample, as FILES hold them. Raises Dropped."""
        for encoding in encodings:
            if isinstance(encoding, Dropped):
                raise encoding
        if self.kind == "sft":
            ids, spans = tokens.sft_sample(*encodings, trained)
            return ids, spans.ravel(), (spans[:, 1] - spans[:, 0]).sum()
        *sides, start, other_start = tokens.preference_pair(*encodings, trained)
        lengths = [len(ids) for ids in sides]
        return np.concatenate(sides), [*lengths, start, other_start], sum(lengths[1:]) - start - other_start

    @contextmanager
    def _in_row(self, place: str) -> Iterator[None]:
        """Counts the row if it is dropped; says its place if there is a mistake in it."""
        try:
            yield
        except Dropped as reason:
            self.dropped[str(reason)[:120]] += 1
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def _json_digest(value) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())
