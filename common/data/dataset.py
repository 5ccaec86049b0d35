"""A finished token cache, as every rank reads it."""

import copy
import json
from pathlib import Path

import numpy as np

from common.data.tokens import PreferencePair, SFTSample
from common.failures import UserError
from common.files import file_digest, json_digest

# What the files hold. tokens and marks lie end to end, sample after sample. marks of a conversation: its trained spans;
# of a pair: tokens of the prompt, of the rest of chosen, of the rest of rejected, chosen_start, rejected_start.
SAMPLE = [(name, np.int64) for name in ("length", "num_marks", "num_targets", "truncated", "file", "row")]
FILES = {"tokens.bin": np.int32, "marks.bin": np.int32, "samples.bin": np.dtype(SAMPLE)}


class TokenDataset:
    """A finished token cache, memory-mapped: indexing takes no memory, opening 24 bytes a sample.

    folder: where it lies.  kind: "sft" or "dpo".  digest: hex, of all files, wherever they were read from.
    stats: what cache.py's `_stats` returned.
    lengths: int32 [n], tokens of each sample (of a pair: its prompt once, and both completions).
    num_targets: int32 [n], its target tokens (of a pair: the scored tokens of both sides).
    source: int32 [n], which of stats["sources"] each is from.
    rows: int64 [n, 2], the file (of stats["files"]) and row of each.
    pair_lengths: DPO only, int32 [n, 3], tokens of the prompt, the rest of chosen, the rest of rejected.
    ds[i]: SFTSample or PreferencePair, read-only views.
    """

    def __init__(self, folder: str | Path):
        """Reads and checks every byte once. Raises UserError if one is not what was written."""
        try:
            manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
            digests = {name: file_digest(Path(folder) / name) for name in FILES}
            is_whole = manifest.pop("digest") == json_digest(manifest) and manifest["files"] == digests
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            is_whole = False
        if not is_whole:
            raise UserError(f"token cache {folder} is not what was written; run again, and it is rebuilt")
        self.folder = Path(folder)
        self.kind, self.stats, self.digest = manifest["kind"], manifest["stats"], json_digest(digests)
        files = [np.asarray(np.memmap(self.folder / name, dtype, "r")) for name, dtype in FILES.items()]
        self._tokens, self._marks, self._samples = files
        self.lengths, self.num_targets = (self._samples[name].astype(np.int32) for name in ("length", "num_targets"))
        self.pair_lengths = self._marks.reshape(-1, 5)[:, :3] if self.kind == "dpo" else None
        kept = [source["rows_used"] - source["rows_dropped"] for source in self.stats["sources"]]
        self.source: np.ndarray = np.repeat(np.arange(len(kept), dtype=np.int32), kept)
        self._ends, self._mark_ends = (np.cumsum(self._samples[name]) for name in ("length", "num_marks"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> SFTSample | PreferencePair:
        ids = self.tokens_of(i)
        marks = self._marks[self._mark_ends[i] - self._samples["num_marks"][i] : self._mark_ends[i]]
        if self.kind == "sft":
            return SFTSample(ids, marks.reshape(-1, 2))
        prompt, chosen, _, *starts = marks.tolist()
        return PreferencePair(*np.split(ids, [prompt, prompt + chosen]), *starts)

    def tokens_of(self, i: int) -> np.ndarray:
        """int32 [lengths[i]]: all tokens of sample i; of a pair, its prompt, chosen, rejected end to end."""
        return self._tokens[self._ends[i] - self.lengths[i] : self._ends[i]]

    @property
    def rows(self) -> np.ndarray:
        return np.stack([self._samples["file"], self._samples["row"]], axis=1)

    def select(self, indices: np.ndarray) -> "TokenDataset":
        """The samples `indices`, int [m], in that order, with a digest of their own; stats are the whole's."""
        part = copy.copy(self)
        for name in ("_samples", "_ends", "_mark_ends", "source", "lengths", "num_targets", "pair_lengths"):
            if (of_all := getattr(self, name)) is not None:
                setattr(part, name, of_all[indices])
        part.digest = json_digest([self.digest, indices.tolist()])
        return part

    @property
    def is_truncated(self) -> np.ndarray:
        """bool [n]: whether a sample was cut."""
        return self._samples["truncated"] > 0

    def source_of(self, i: int) -> str:
        """`file:row` of sample i, for messages."""
        return f"{self.stats['files'][self._samples['file'][i]]}:{self._samples['row'][i]}"

    def longest_side(self) -> int:
        """Tokens of the longest sample; of a pair, its prompt and its longer completion."""
        if self.pair_lengths is None:
            return int(self.lengths.max())
        return int((self.pair_lengths[:, 0] + self.pair_lengths[:, 1:].max(1)).max())

    def samples_of(self, place: str) -> list[int]:
        """The samples that a row, `file:row`, has become: as many as its source takes it."""
        name, _, row = place.rpartition(":")
        files = [i for i, file in enumerate(self.stats["files"]) if file == name]
        return np.flatnonzero(np.isin(self._samples["file"], files) & (self._samples["row"] == int(row))).tolist()

    def last_tokens(self) -> np.ndarray:
        """int32: the last token of each trained span; of a pair, of its chosen and its rejected side."""
        if self.pair_lengths is not None:
            return self._tokens[np.concatenate([self._ends - self.pair_lengths[:, 2], self._ends]) - 1]
        samples = (self[i] for i in range(len(self)))
        return np.concatenate([sample[0][sample[1][:, 1] - 1] for sample in samples])


def flattened(sample: SFTSample | PreferencePair) -> tuple[np.ndarray, np.ndarray | list[int], int]:
    """A sample as FILES hold it: tokens, marks, and the number of its targets."""
    if isinstance(sample, SFTSample):
        spans = sample.trained_spans
        return sample.input_ids, spans.ravel(), int((spans[:, 1] - spans[:, 0]).sum())
    *sides, start, other_start = sample
    lengths = [len(ids) for ids in sides]
    return np.concatenate(sides), [*lengths, start, other_start], sum(lengths[1:]) - start - other_start
