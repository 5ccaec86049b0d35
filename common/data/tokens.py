"""Text -> tokens: which of them are targets, and what is dropped.

A token is trained if it begins inside a trained span of the text (common/data/chat_template.py). So one that begins in
the header and runs into the content (a newline of each merged into one token) is not. Nor is the token at position 0:
nothing predicts it. Samples and pairs are made so here, and whoever reads them relies on it.
"""

import copy
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from common.data.chat_template import ChatTemplate
from common.data.conversations import Conversation, Dropped


class SFTSample(NamedTuple):
    """input_ids: int32 [L].  trained_spans: int32 [S, 2], [start, end) positions of the target tokens; start >= 1."""

    input_ids: np.ndarray
    trained_spans: np.ndarray


class PreferencePair(NamedTuple):
    """prompt_ids: int32 [P], shared by both sides.  chosen_ids [C], rejected_ids [R]: what follows on each side.

    chosen_start, rejected_start: how many tokens at the head of chosen_ids and rejected_ids are not scored. 0, except
    where a completion's beginning and the header's end are one token, and where P is 0: P + start >= 1.
    A whole side is prompt_ids + chosen_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int


# --------------------------------------------------------------------------------- text to tokens
# What the tokenizer raises for a lone surrogate, which JSON allows, and for megabytes of white space (no Exception).
UNUSABLE = {"TypeError": "text is not valid Unicode", "PanicException": "the tokenizer fails on its text"}


class Encoder:
    """The bare fast tokenizer: the first max_seq_length tokens, no special tokens added, no padding, exact offsets.

    bos: the token that the tokenizer by itself puts before a text; "" if none.
    """

    def __init__(self, tokenizer, max_seq_length: int):
        begins_with_bos = tokenizer.backend_tokenizer.encode("a").ids[:1] == [tokenizer.bos_token_id]
        self.bos = tokenizer.bos_token if begins_with_bos else ""
        self.max_seq_length, self.num_ids = max_seq_length, max(tokenizer.get_vocab().values()) + 1
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.enable_truncation(max_seq_length + 1)  # one more, to know of texts that are cut
        self.backend.no_padding()
        self.backend.post_processor = None  # some trim white space off the offsets

    def encode(self, texts: list[str]) -> list[Encoding | Dropped]:
        """Each text's encoding, `overflowing` if it was cut, or why it has none; in parallel, by the tokenizer's own
        threads."""
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
            for encoding in encodings:
                encoding.truncate(self.max_seq_length)  # whose overflow some versions do not tell by themselves
            return encodings
        except BaseException as error:
            if type(error).__name__ not in UNUSABLE:
                raise
            if len(texts) > 1:
                return [result for text in texts for result in self.encode([text])]
            return [Dropped(UNUSABLE[type(error).__name__])]


def render_pair(chosen: Conversation, rejected: Conversation, template: ChatTemplate) -> tuple[str, str, str, list]:
    """-> (prompt, chosen's completion, rejected's, notes). Prompts that the template renders alike are the same. Raises
    Dropped."""
    prompts, completions, all_notes = [], [], []
    for conversation in (chosen, rejected):
        text, spans, notes = template.render(conversation, only_last=True)
        if not spans:
            raise Dropped(notes[0].partition(": ")[0] if notes else "the template does not show a completion")
        start, end = spans[0]
        prompts.append(text[:start])
        completions.append(text[start:end])
        all_notes += notes
    if prompts[0] != prompts[1]:
        raise Dropped("the prompts of chosen and rejected differ")
    if completions[0] == completions[1]:
        raise Dropped("equal completions")
    if "".join(completions[0].split()) == "".join(completions[1].split()):
        all_notes.append("chosen and rejected differ in white space only")
    return prompts[0], completions[0], completions[1], [*dict.fromkeys(all_notes)]


def sample_of_ids(encoder: Encoder, input_ids: list, labels: list | None, attention_mask: list | None) -> SFTSample:
    """Of a row that holds tokens. Those whose attention_mask is 0 are left out; labels of -100 are not trained, without
    labels all are. Raises Dropped."""
    rows = [input_ids, input_ids if labels is None else labels]
    rows.append([1] * len(input_ids) if attention_mask is None else attention_mask)
    if any(len(row) != len(input_ids) or {*map(type, row)} != {int} for row in rows):
        raise Dropped("input_ids, labels and attention_mask are not as many whole numbers")
    ids, targets, mask = map(np.array, rows)
    ids, targets = (row[mask != 0][: encoder.max_seq_length] for row in (ids, targets))
    is_target = targets != -100
    if ((ids < 0) | (ids >= encoder.num_ids)).any() or (targets != ids)[is_target].any():
        raise Dropped("input_ids that the tokenizer has no token for, or labels that are neither -100 nor these")
    is_target[:1] = False
    spans = np.flatnonzero(np.diff(is_target, prepend=False, append=False)).reshape(-1, 2)
    if len(spans) == 0:
        raise Dropped("no target token within max_seq_length")
    return SFTSample(ids.astype(np.int32), spans.astype(np.int32))


def sft_sample(encoding: Encoding, char_spans: list[tuple[int, int]]) -> SFTSample:
    """char_spans: the [start, end) characters of the encoded text that are trained. Raises Dropped."""
    spans = [(_first_target(encoding, start), _first_target(encoding, end)) for start, end in char_spans]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise Dropped("no target token within max_seq_length")
    return SFTSample(np.array(encoding.ids, np.int32), np.array(spans, np.int32))


def preference_pair(chosen: Encoding, rejected: Encoding, prompt_chars: int) -> PreferencePair:
    """chosen, rejected: of the prompt's prompt_chars characters and a completion. Raises Dropped."""
    sides, prompt_lengths, scored_from = [], [], []
    for encoding in (chosen, rejected):
        first = _first_target(encoding, prompt_chars)
        if first >= len(encoding):
            raise Dropped("prompt fills max_seq_length")
        # The token before it may be the header's last and the content's first in one: not the prompt's alone.
        is_merged = _chars(encoding, first - 1)[1] > prompt_chars
        sides.append(np.array(encoding.ids, np.int32))
        prompt_lengths.append(first - is_merged)
        scored_from.append(first)
    if np.array_equal(*sides):  # they differ after max_seq_length: all that could be learned is rounding
        raise Dropped("equal within max_seq_length")
    shared = min(prompt_lengths)
    is_same = sides[0][:shared] == sides[1][:shared]
    shared = int(np.argmin([*is_same, False]))  # the first token that differs
    starts = [start - shared for start in scored_from]
    return PreferencePair(sides[0][:shared], sides[0][shared:], sides[1][shared:], *starts)


def _first_target(encoding: Encoding, char: int) -> int:
    """The first token from position 1 on that begins at this character or after it; len(encoding) or more if none."""
    return max(1, bisect_left(range(len(encoding)), char, key=lambda token: _chars(encoding, token)[0]))


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """[start, end) characters of a token."""
    chars = encoding.token_to_chars(token)
    assert chars is not None  # of one text, without special tokens added, every token has some
    return chars
