"""Packing: the samples of one optimizer step laid into micro-batches, and a micro-batch as tensors.

A micro-batch is one row of T tokens without padding. Each sample in it is a *document*: it starts at position 0 and
attends to nothing outside itself. A document may end in two *branches* after a shared stem (a preference pair: prompt,
chosen, rejected). The branches do not see each other, and both continue the stem's positions. How that is enforced on a
device is common/model/attention.py's.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data.tokens import PreferencePair, SFTSample

STEM, CHOSEN, REJECTED = 0, 1, 2  # branch of a token; an ordinary sample is all stem


def plan_step(lengths: list[int], num_ranks: int, budget: int, opening: int = 0) -> list[list[list[int]]]:
    """Lays samples of `lengths` tokens into micro-batches of at most `budget` tokens, the first of each rank of at most
    `opening`, if that is more; longer samples take as much as they need, in the ranks' first ones if those suffice.

    Returns plan[rank][micro_batch] = positions in `lengths`. Every rank gets the same number of micro-batches (some may
    be empty), the fewest for which longest-first assignment to the least loaded micro-batch fits, where the first ones
    count as loaded with as many tokens less as they may hold more; that rule also spreads the tokens evenly (Graham
    1969, LPT). After the first the fullest come first, so that too little memory shows at once, and the ranks' m-th
    micro-batches are alike in size, so that ranks do not wait for one another.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest, longest_of_others = (max([0, *(lengths[i] for i in order[skipped:][:1])]) for skipped in (0, num_ranks))
    budget = max(budget, longest_of_others)
    more = max(0, opening - budget, longest - budget)
    num_micro_batches = max(1, -(-(sum(lengths) - num_ranks * more) // (num_ranks * budget)))
    while max(bins := _longest_first(order, lengths, num_ranks, num_micro_batches, more))[0] > budget:
        num_micro_batches += 1
    return [[members for _, members in bins[rank::num_ranks]] for rank in range(num_ranks)]


def one_ahead(prepared: Callable[[int], Any], steps: range) -> Iterator[tuple[int, Any]]:
    """(step, prepared(step)) of each step in order; a thread prepares the next one meanwhile, and never more."""
    with ThreadPoolExecutor(1) as thread:
        ahead = [thread.submit(prepared, step) for step in steps[:1]]
        for i, step in enumerate(steps):
            value = ahead.pop().result()
            ahead += [thread.submit(prepared, later) for later in steps[i + 1 : i + 2]]
            yield step, value


def _longest_first(
    order: list[int], lengths: list[int], num_ranks: int, num_micro_batches: int, more: int
) -> list[tuple[int, list[int]]]:
    """[(tokens, members)] of each bin: those that may hold `more` tokens, of which they are counted as empty, then the
    others, each fullest first."""
    heap = [(-more * (b < num_ranks), b) for b in range(num_ranks * num_micro_batches)]
    members: list[list[int]] = [[] for _ in heap]
    heapq.heapify(heap)
    for i in order:
        tokens, b = heapq.heappop(heap)
        members[b].append(i)
        heapq.heappush(heap, (tokens + lengths[i], b))
    in_order = sorted(heap, key=lambda bin: (more > 0 and bin[1] >= num_ranks, -bin[0], bin[1]))
    return [(tokens, members[b]) for tokens, b in in_order]


@dataclass
class Document:
    """One sample's place in a micro-batch, before it is laid out.

    input_ids int [L]; stem: how many leading tokens are shared by both branches (L for a plain sample); chosen: how
    many tokens the chosen branch has (0 for a plain sample), the rest being rejected; target_rows int [N]: the token,
    counted from 0 at the document's start, whose hidden state predicts; target_ids int [N]: what it has to predict;
    target_counts: how many of the N belong to each scored sequence (a conversation is one; a document with branches
    has two: chosen, then rejected).
    """

    input_ids: np.ndarray
    stem: int
    chosen: int
    target_rows: np.ndarray
    target_ids: np.ndarray
    target_counts: list[int]

    def __post_init__(self) -> None:
        assert (self.target_rows >= 0).all(), "a target that no token of its document predicts"


def sft_documents(sample: SFTSample | PreferencePair) -> list[Document]:
    """A conversation: every token of a trained span is a target, predicted from the token before it."""
    assert isinstance(sample, SFTSample)  # of a data set of conversations
    ids = np.asarray(sample.input_ids)
    positions = np.concatenate([np.arange(start, end) for start, end in sample.trained_spans])
    return [Document(ids, len(ids), 0, positions - 1, ids[positions], [len(positions)])]


def pair_lengths(parts: np.ndarray, share_prompt: bool) -> np.ndarray:
    """int64 [P]: tokens that each pair takes in a micro-batch; parts int [P, 3]: of the prompt, chosen, rejected."""
    return parts @ np.array([1 if share_prompt else 2, 1, 1])


def pair_documents(pair: SFTSample | PreferencePair, share_prompt: bool) -> list[Document]:
    """A preference pair: one document with two branches, or one document for each side.

    Only completion tokens, EOS included, are targets. The first of a branch is predicted from the prompt's last token.
    """
    assert isinstance(pair, PreferencePair)  # of a data set of preferences
    prompt, num_chosen, documents = np.asarray(pair.prompt_ids), len(pair.chosen_ids), []
    for completion, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
        tokens = np.concatenate([prompt, completion])
        scored = np.arange(len(prompt) + start, len(tokens))
        documents.append(Document(tokens, len(tokens), 0, scored - 1, tokens[scored], [len(scored)]))
    if not share_prompt:
        return documents
    chosen, rejected = documents
    ids = np.concatenate([chosen.input_ids, pair.rejected_ids])
    rows = rejected.target_rows + num_chosen * (rejected.target_rows >= len(prompt))  # the last of the prompt stays
    rows, targets = np.concatenate([chosen.target_rows, rows]), np.concatenate([chosen.target_ids, rejected.target_ids])
    return [Document(ids, len(prompt), num_chosen, rows, targets, chosen.target_counts + rejected.target_counts)]


@dataclass
class MicroBatch:
    """One packed row, in host memory.

    input_ids, position_ids int64 [T]; document (0, 1, ... in order), branch int32 [T]: who may see whom; target_rows,
    target_ids int64 [N], sequence after sequence; target_counts: how many belong to each sequence, in the order in
    which the samples (and within a pair: chosen, rejected) were given; shares_prompts: whether the run's documents end
    in branches, though this row may hold none; sum_squared_lengths: twice the causal attention area, in the large.

    segments: (queries, keys) of each, int64 places in the row: tokens that are computed together, and what they see. A
    document is one; one with branches is two, stem and chosen together, and rejected, which sees the stem and itself.
    Queries end where their keys do; those of all segments follow one another as in the row.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    document: np.ndarray
    branch: np.ndarray
    target_rows: np.ndarray
    target_ids: np.ndarray
    target_counts: list[int]
    num_tokens: int
    sum_squared_lengths: int
    shares_prompts: bool
    segments: list[tuple[np.ndarray, np.ndarray]]


def pack(samples: list[list[Document]], share_prompt: bool = False) -> MicroBatch:
    """Lays the documents of each sample one after another into one row.

    With no samples the row is two tokens without a target, for a rank's part in every collective: one token alone would
    be compiled as a case of its own, and token 0 often is padding, embedded as zeros, where some have no gradient.
    """
    documents = [doc for sample in samples for doc in sample]
    documents = documents or [Document(np.full(2, 2), 2, 0, np.arange(0), np.arange(0), [])]
    parts = [(doc.stem, doc.chosen, len(doc.input_ids) - doc.stem - doc.chosen) for doc in documents]
    lengths = [sum(part) for part in parts]
    starts = np.cumsum([0, *lengths[:-1]])
    # What the branches do not see of each other is left out.
    squared_lengths = [n**2 - 2 * chosen * rejected for n, (_, chosen, rejected) in zip(lengths, parts, strict=True)]

    segments = []
    for start, (stem, chosen, rejected) in zip(starts, parts, strict=True):
        first, rest = np.split(np.arange(start, start + stem + chosen + rejected), [stem + chosen])
        segments += [(first, first)] + [(rest, np.concatenate([first[:stem], rest]))] * (rejected > 0)

    def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([*arrays]).astype(np.int64)

    return MicroBatch(
        input_ids=joined(doc.input_ids for doc in documents),
        position_ids=joined(np.r_[0 : stem + chosen, stem : stem + rejected] for stem, chosen, rejected in parts),
        document=np.repeat(np.arange(len(documents), dtype=np.int32), lengths),
        branch=np.repeat(np.array([STEM, CHOSEN, REJECTED] * len(parts), np.int32), np.ravel(parts)),
        target_rows=joined(doc.target_rows + start for doc, start in zip(documents, starts, strict=True)),
        target_ids=joined(doc.target_ids for doc in documents),
        target_counts=[n for doc in documents for n in doc.target_counts],
        num_tokens=sum(lengths) if samples else 0,
        sum_squared_lengths=sum(squared_lengths) if samples else 0,
        shares_prompts=share_prompt,
        segments=segments,
    )
