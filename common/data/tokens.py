"""Rows -> conversations -> tokens: what a row may look like, which tokens are targets, what is dropped.

A token is trained if it begins inside a trained span of the text (common/data/chat_template.py). So one that begins in
the header and runs into the content (a newline of each merged into one token) is not. Nor is the token at position 0:
nothing predicts it. Samples and pairs are made so here, and whoever reads them relies on it.
"""

import copy
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from common.data.chat_template import ChatTemplate, Dropped
from common.failures import UserError


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


# --------------------------------------------------------------------------------- rows to conversations
# The forms of an SFT row: the columns that it needs, and its messages. The first form whose columns are there is taken.
SFT_FORMS = {
    ("messages",): lambda row: _messages(row, "messages"),
    ("prompt", "completion"): lambda row: _messages(row, "prompt", "user") + _messages(row, "completion", "assistant"),
}


def sft_conversation(row: dict) -> tuple[str, list[dict]]:
    """-> (form, messages). `prompt` and `completion` are each a text or a list of messages. Raises UserError."""
    for columns, messages_of in SFT_FORMS.items():
        if all(column in row for column in columns):
            return "+".join(columns), messages_of(row)
    raise UserError(f"SFT needs a column `messages`, or `prompt` and `completion`; this row has {list(row)}")


def preference_conversations(row: dict) -> tuple[str, list[dict], list[dict]]:
    """-> (form, chosen, rejected): two whole conversations with the same prompt, all messages but the last.

    Forms: `chosen`+`rejected`, lists of messages; `prompt`+`chosen`+`rejected`, each a text or a list. Beside a
    `prompt`, a list that begins with the assistant's message continues it; any other is the whole conversation.
    Raises UserError.
    """
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"DPO needs columns `chosen` and `rejected`; this row has {list(row)}")
    prompt = None if row.get("prompt") is None else _messages(row, "prompt", "user")
    form, sides = "chosen+rejected", []
    for column in ("chosen", "rejected"):
        side = _messages(row, column, None if prompt is None else "assistant")
        if prompt is not None and side and side[0]["role"] == "assistant":
            form, side = "prompt+chosen+rejected", prompt + side
        sides.append(side)
    for i, (one, other) in enumerate(zip_longest(sides[0][:-1], sides[1][:-1]), start=1):
        if one != other:
            raise UserError(f"the prompts of chosen and rejected differ, first at message {i}")
    return form, *sides


def _messages(row: dict, column: str, role: str | None = None) -> list[dict]:
    """A column's list of messages, checked, contents as text; where `role` is given, a text is one such message."""
    value = row[column]
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    messages = []
    for i, message in enumerate(_checked(value, list, f"`{column}`"), start=1):
        place = f"`{column}` message {i}"
        _checked(message, dict, place)
        _checked(message.get("role"), str, f"{place}: its role")
        content = message.get("content")
        if isinstance(content, list):
            texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else p for p in content]
            content = "".join(_checked(text, str, f"{place}: each part of its content") for text in texts)
        given = {key: item for key, item in message.items() if item is not None}
        messages.append({**given, "content": _checked(content, str, f"{place}: its content")})
    return messages


def _checked(value, kind: type, place: str):
    """The value, which must be of this kind. Raises UserError."""
    if not isinstance(value, kind):
        wanted = {list: "a list of messages", dict: "an object with a role and a content", str: "a text"}[kind]
        raise UserError(f"{place} must be {wanted}, not {'null' if value is None else type(value).__name__}")
    return value


# --------------------------------------------------------------------------------- text to tokens
# What the tokenizer raises for a lone surrogate, which JSON allows, and for megabytes of white space (no Exception).
UNUSABLE = {"TypeError": "text is not valid Unicode", "PanicException": "the tokenizer fails on its text"}


class Encoder:
    """The bare fast tokenizer: the first max_seq_length tokens, no special tokens added, no padding, exact offsets."""

    def __init__(self, tokenizer, max_seq_length: int):
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.enable_truncation(max_seq_length)
        self.backend.no_padding()
        self.backend.post_processor = None  # some trim white space off the offsets

    def encode(self, texts: list[str]) -> list[Encoding | Dropped]:
        """Each text's encoding, or why it has none; in parallel, by the tokenizer's own threads."""
        try:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ not in UNUSABLE:
                raise
            if len(texts) > 1:
                return [result for text in texts for result in self.encode([text])]
            return [Dropped(UNUSABLE[type(error).__name__])]


def render_pair(chosen: list[dict], rejected: list[dict], template: ChatTemplate) -> tuple[str, str, str]:
    """-> (prompt, chosen's completion, rejected's). Raises Dropped; UserError if the template makes two prompts."""
    prompts, completions = [], []
    for messages in (chosen, rejected):
        if not messages or messages[-1]["role"] != "assistant":
            raise Dropped("does not end with the assistant's message")
        text, [(start, end)] = template.render(messages, only_last=True)
        prompts.append(text[:start])
        completions.append(text[start:end])
    if prompts[0] != prompts[1]:
        raise UserError(f"chat template {template.name!r} renders the prompts of chosen and rejected differently")
    if not all(completion.removesuffix(template.closing).strip() for completion in completions):
        raise Dropped("empty completion")
    if completions[0] == completions[1]:
        raise Dropped("equal completions")
    return prompts[0], *completions


def sft_sample(encoding: Encoding, char_spans: list[tuple[int, int]]) -> SFTSample:
    """char_spans: the [start, end) characters of the encoded text that are trained. Raises Dropped."""
    spans = [(_first_target(encoding, start), _first_target(encoding, end)) for start, end in char_spans]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise Dropped("no target token within max_seq_length" if char_spans else "no assistant message")
    return SFTSample(np.array(encoding.ids, np.int32), np.array(spans, np.int32))


def preference_pair(chosen: Encoding, rejected: Encoding, prompt_chars: int) -> PreferencePair:
    """chosen, rejected: of the prompt's prompt_chars characters and a completion. Raises Dropped."""
    sides, prompt_lengths, scored_from = [], [], []
    for encoding in (chosen, rejected):
        first = _first_target(encoding, prompt_chars)
        if first >= len(encoding):
            raise Dropped("prompt fills max_seq_length")
        # The token before it may be the header's last and the content's first in one: not the prompt's alone.
        is_merged = encoding.token_to_chars(first - 1)[1] > prompt_chars
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
    if len(encoding) == 0 or char >= encoding.token_to_chars(len(encoding) - 1)[1]:
        return max(1, len(encoding))
    while (token := encoding.char_to_token(char)) is None:  # a character that the tokenizer leaves out
        char += 1
    while token < len(encoding) and encoding.token_to_chars(token)[0] < char:
        token += 1
    return max(1, token)
