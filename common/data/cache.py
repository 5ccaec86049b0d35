"""The token cache: a data set tokenized once, keyed by all that its tokens depend on (dataset.py: how it is read).

A finished cache is a folder `<kind>-<key>` of three flat files and a manifest. It is built in another folder and
renamed, by one process at a time, and used only if every digest in the manifest holds; else it is built again.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import transformers

from common.data import chat_template, conversations, dataset, limits, sources, tokens
from common.data.chat_template import REASONING_KEYS, ChatTemplate
from common.data.conversations import Conversation, Dropped, json_of, preference_example, sft_example
from common.data.dataset import FILES, TokenDataset, flattened
from common.data.report import data_table
from common.data.sources import Rows, decode_row, load_source, parse_source
from common.data.tokens import Encoder
from common.failures import UserError, as_user_error, one_line, print_line, progress
from common.files import file_digest, json_digest, locked, naming

BLOCK_ROWS = 512  # rows that are rendered and then encoded together, by the tokenizer's threads


# --------------------------------------------------------------------------------- building
def prepare_tokens(kind: str, config, template: ChatTemplate, most_rows: int | None = None) -> str:
    """The path of the finished cache of a run's data, built if it is not there yet.

    kind: "sft" or "dpo".  config: common.config.TrainConfig; its dataset_mixer, max_seq_length, chat_template_kwargs,
    allow_dropped and cache_dir count.
    most_rows: of more rows than that, which no cache holds yet, a draw of so many is tokenized in their place.
    Of several processes one builds, the others wait for it. Raises UserError, with file and row, for data that cannot
    be used, and leaves nothing of it in cache_dir; and, once it is built, if more than a tenth of a source is dropped.
    """
    all_rows = [load_source(parse_source(text)) for text in config.dataset_mixer]
    tokenize = BlockTokenizer(kind, config, template)
    root = Path(config.cache_dir) / "tokens"
    final = root / f"{kind}-{cache_key(tokenize, all_rows)}"
    if most_rows and sum(len(rows.indices) for rows in all_rows) > most_rows and not _finished(final):
        all_rows = drawn_rows(all_rows, most_rows)
        final = root / f"{kind}-{cache_key(tokenize, all_rows)}"
    warning = f"warning: chat template {template.name!r}"
    if "strftime_now" in template.jinja:
        print_line(f"{warning} can print the day's date; a run resumes only while {final} is there")
    if not template.closing:
        print_line(f"{warning} ends answers with no token: the model learns no end")
    if ds := _finished(final):
        print_line(f"data: tokenized before, in {final}")
    else:
        with as_user_error(f"cache_dir {config.cache_dir}", OSError):
            root.mkdir(parents=True, exist_ok=True)
            (root / ".lock").touch()
        with locked(root / ".lock", lambda: print_line(f"data: another run is building in {root}; waiting for it")):
            if not _finished(final):  # it may have been built while this process waited
                _build(tokenize, all_rows, final)
        ds = TokenDataset(final)
        for role, count in tokenize.counts["unrendered_roles"].items():
            print_line(f"{warning} leaves out messages of role {role!r}: {count:,} of them")
    if (lost := too_much_dropped(ds)) and not config.allow_dropped:
        print_line(data_table(ds))
        raise UserError(lost)
    return str(final)


def drawn_rows(all_rows: list[Rows], number: int) -> list[Rows]:
    """`number` of all these rows, the same ones each time; identity["drawn_from"] says of how many of each source."""
    ends = np.cumsum([len(rows.indices) for rows in all_rows])
    drawn = np.sort(np.random.RandomState(42).choice(int(ends[-1]), size=number, replace=False))
    parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    result = []
    for rows, part, end in zip(all_rows, parts, ends, strict=True):
        sizes = {"rows_used": len(part), "drawn_from": len(rows.indices)}
        indices = rows.indices[part - end + len(rows.indices)]
        result.append(replace(rows, indices=indices, identity={**rows.identity, **sizes}))
    return result


def too_much_dropped(ds: TokenDataset) -> str | None:
    """What to say if more than a tenth of a source's rows is dropped."""
    for source in ds.stats["sources"]:
        number, of = source["rows_dropped"], source["rows_used"]
        if number * 10 > of:
            lost = f"{number:,} of {of:,} rows are dropped, more than a tenth ({_listed(source['dropped'])})"
            return f"{source['asked_for']}: {lost}; --allow_dropped true trains on the rest"
    return None


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {one_line(reason)}" for reason, count in dropped.items())


def cache_key(tokenize: "BlockTokenizer", all_rows: list[Rows]) -> str:
    """Digest, in hex, of all that the tokens and their rows' names depend on."""
    special_tokens = tokenize.template.tokenizer.special_tokens_map
    modules = (sources, conversations, chat_template, limits, tokens, dataset)
    code = [__file__, *(str(module.__file__) for module in modules)]
    parts = {
        "kind": tokenize.kind,
        "sources": [rows.identity for rows in all_rows],
        "template": tokenize.template.digest,
        "variables": tokenize.variables,
        "tokenizer": [tokenize.encoder.backend.to_str(), tokenize.encoder.bos],  # max_seq_length is in it
        "special_tokens": {name: str(token) for name, token in special_tokens.items()},
        "code": [file_digest(Path(path)) for path in code],
        "versions": [module.__version__ for module in (np, jinja2, tokenizers, transformers)],
    }
    return json_digest(parts)


def _finished(folder: Path) -> TokenDataset | None:
    with suppress(UserError):
        return TokenDataset(folder)
    return None


def _build(tokenize: "BlockTokenizer", all_rows: list[Rows], final: Path) -> None:
    """Builds the cache in another folder and gives it its name. The caller holds the lock."""
    folder = final.parent / "building"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed, or it would hold the lock
    folder.mkdir()
    try:
        stats = _write_files(tokenize, all_rows, folder)
        digests = {name: file_digest(folder / name) for name in FILES}
        manifest = {"kind": tokenize.kind, "stats": stats, "files": digests}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": json_digest(manifest)}, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # what is there is not what was written
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_line(f"data: {stats['kept']:,} of {stats['rows_read']:,} rows kept, tokenized in {final}")


def _write_files(tokenize: "BlockTokenizer", all_rows: list[Rows], folder: Path) -> dict:
    """Tokenizes all rows into FILES; what data_table shows and run_config.json records. Raises UserError if no row is
    left."""
    by_source: list[dict] = []
    names: list[str] = []
    num_rows = sum(len(rows.indices) for rows in all_rows)
    with ExitStack() as stack:
        stack.enter_context(naming(folder))
        files = [stack.enter_context(open(folder / name, "wb")) for name in FILES]
        advance = stack.enter_context(progress("tokenizing", num_rows, "rows"))
        for rows in all_rows:
            before = tokenize.counts["dropped"].copy()
            for start in range(0, len(rows.indices), BLOCK_ROWS):
                block = rows.indices[start : start + BLOCK_ROWS]
                for sample in tokenize(rows, block, len(names)):
                    for file, values, dtype in zip(files, sample, FILES.values(), strict=True):
                        file.write(np.array(values, dtype).tobytes())
                advance(len(block))
            names += rows.files
            dropped = tokenize.counts["dropped"] - before
            by_source.append({**rows.identity, "rows_dropped": dropped.total(), "dropped": dict(dropped.most_common())})
            for column in rows.unread:
                tokenize.count("ignored", f"column {column!r}", rows.source.path, len(rows.indices))
    samples = np.fromfile(folder / "samples.bin", FILES["samples.bin"])
    if len(samples) == 0:
        asked_for = ", ".join(rows.source.text for rows in all_rows)
        raise UserError(f"{asked_for}: no row is left to train on ({_listed(tokenize.counts['dropped'])})")
    percentiles = {f"p{q}": int(np.percentile(samples["length"], q)) for q in (5, 50, 95)}
    return {
        "sources": by_source,
        "files": names,
        "rows_read": num_rows,
        "kept": len(samples),
        "truncated": int(samples["truncated"].sum()),
        **{name: dict(counter.most_common()) for name, counter in tokenize.counts.items()},
        "places": tokenize.places,
        "tokens": int(samples["length"].sum()),
        "target_tokens": int(samples["num_targets"].sum()),
        "length_percentiles": {**percentiles, "max": int(samples["length"].max())},
        "largest_token_id": int(np.memmap(folder / "tokens.bin", FILES["tokens.bin"], "r").max()),
    }


# Rows of each form; rows dropped for each reason; what of a row is not trained as it says; columns, and keys of
# messages, that nothing acts on; messages of each role that the template does not show.
COUNTED = ("formats", "dropped", "notes", "ignored", "unrendered_roles")


def _names_read(jinja: str) -> tuple[set[str], set[str]]:
    """Keys of messages and variables that a template's code reads. A key of a tool or of a call is none of a message's,
    though it may have the same name."""
    lexed = jinja2.Environment().lex(re.sub(r"(?<=[\w\])])\[\s*['\"](\w+)['\"]\s*\]", r".\1", jinja))  # x["y"] as x.y
    words = ["", "", *(word for _, kind, word in lexed if kind in ("name", "string", "operator")), ""]
    keys, variables = set(), set()
    for owner, sign, word, after in zip(words, words[1:], words[2:], words[3:], strict=False):
        name = word.strip("'\"")
        is_item = name != word and (owner.endswith(("get", "attr", "attribute")) or after in ("in", "not"))
        if (is_item or sign == ".") and not owner.endswith(("tool", "call", "function")):
            keys.add(name)
        elif name == word and sign != ".":
            variables.add(name)
    return keys | ({*REASONING_KEYS} if keys & {*REASONING_KEYS} else set()), variables  # transformers fills them all


class BlockTokenizer:
    """Tokenizes blocks of rows, and counts what it met.

    counts: for each of COUNTED, how often each text was met.  places: where it was met first.
    variables: what the template sees beside the messages; a row's own chat_template_kwargs come before them.
    """

    def __init__(self, kind: str, config, template: ChatTemplate):
        """Raises UserError for chat_template_kwargs that are no JSON object."""
        self.kind, self.template = kind, template
        self.encoder = Encoder(template.tokenizer, config.max_seq_length)
        try:
            self.variables = json_of(config.chat_template_kwargs or {}, dict, "it")
        except Dropped as reason:
            raise UserError(f"--chat_template_kwargs {config.chat_template_kwargs!r}: {reason}") from reason
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
        self.places: dict[str, dict[str, str]] = {name: {} for name in COUNTED}
        self._keys_read, self._variables_read = _names_read(template.jinja)

    def count(self, name: str, text: str, place: str, number: int = 1) -> None:
        """Of a kind only the first 50 texts are told apart."""
        counter, text = self.counts[name], text[:120]
        if text not in counter:
            text = text if len(counter) < 50 else "others"
            self.places[name].setdefault(text, place)
        counter[text] += number

    def __call__(self, rows: Rows, block: np.ndarray, first_file: int = 0) -> Iterator[tuple]:
        """(tokens, marks, a SAMPLE) of each row of `block` that is kept; first_file is the number of rows.files[0].
        Raises UserError naming file and row."""
        rendered = []
        with as_user_error(rows.source.path, OSError, ValueError):
            raw_rows = rows.read(block)
        for index, raw in zip(block.tolist(), raw_rows, strict=True):
            with self._in_row(rows.place(index)):
                rendered.append((index, *self._render(decode_row(raw), rows.place(index))))
        encodings = iter(self.encoder.encode([text for _, texts, _ in rendered for text in texts]))
        for index, texts, sample_of in rendered:
            encoded = [next(encodings) for _ in texts]
            with self._in_row(rows.place(index)):
                is_truncated = False
                for encoding in encoded:
                    if isinstance(encoding, Dropped):
                        raise encoding
                    is_truncated |= bool(encoding.overflowing)
                ids, marks, num_targets = flattened(sample_of(*encoded))
                position = first_file + int(rows.file[index]), int(rows.numbers[index])
                yield ids, marks, (len(ids), len(marks), num_targets, is_truncated, *position)

    def _render(self, row: dict, place: str) -> tuple[list[str], Callable]:
        """The texts of a row, and what makes a sample of their encodings. Raises Dropped."""
        example = (sft_example if self.kind == "sft" else preference_example)(row, self.variables)
        self.count("formats", example.form, place)
        for column in row.keys() - {*example.columns}:
            self.count("ignored", f"column {column!r}", place)
        if example.tokens is not None:
            return [], partial(tokens.sample_of_ids, self.encoder, **example.tokens)
        if example.text is not None:  # begun as the tokenizer begins a text, with an EOS at its end; trained whole
            text, bos, eos = example.text, self.encoder.bos, self.template.tokenizer.eos_token
            text = f"{'' if text.startswith(bos) else bos}{text}{'' if text.endswith(eos) else eos}"
            return [text], partial(tokens.sft_sample, char_spans=[(0, len(text))])
        self._count_what_is_not_shown(example.conversations[0], place)
        if self.kind == "sft":
            text, spans, notes = self.template.render(example.conversations[0])
            notes = example.notes + notes
            if not spans:
                raise Dropped(notes[0].partition(": ")[0] if notes else "no assistant message")
            texts = [text]
            sample_of: Callable = partial(tokens.sft_sample, char_spans=spans)
        else:
            chosen, rejected = example.conversations
            prompt, *completions, notes = tokens.render_pair(chosen, rejected, self.template)
            texts = [prompt + completion for completion in completions]
            sample_of = partial(tokens.preference_pair, prompt_chars=len(prompt))
        for note in notes:
            what, _, instance = note.partition(": ")
            self.count("notes", what, f"{place}: {instance}" if instance else place)
        return texts, sample_of

    def _count_what_is_not_shown(self, conversation: Conversation, place: str) -> None:
        """Of roles by a rendering; of keys and variables by whether the template's code reads them."""
        for message in conversation.messages:
            if not self.template.shows_role(message["role"]):
                self.count("unrendered_roles", message["role"], place)
            for key in message.keys() - {"role", "content"} - self._keys_read:
                if message[key] is not None:
                    self.count("ignored", f"key {key!r} of messages", place)
        for name in conversation.variables:
            if name not in self._variables_read:
                self.count("ignored", f"{name!r} of chat_template_kwargs", place)

    @contextmanager
    def _in_row(self, place: str) -> Iterator[None]:
        """Counts the row if it is dropped; says its place if there is a mistake in it."""
        try:
            yield
        except Dropped as reason:
            self.count("dropped", str(reason), place)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
