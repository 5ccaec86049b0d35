"""Rows -> conversations -> tokens: what a row may look like, which tokens are targets, what is dropped.

A token is trained if it begins inside a trained span of the text (common/data/chat_template.py). So one that begins in
the header and runs into the content (a newline of each merged into one token) is not.
"""

import copy
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from common.data.chat_template import ChatTemplate, Dropped
from common.failures import UserError

# A text longer than CHARS_PER_TOKEN x max_seq_length + SPARE_CHARS is tokenized by its beginning first, of which the
# last SPARE_WORDS pre-tokenizer words are not trusted: what follows could change them.
CHARS_PER_TOKEN, SPARE_CHARS, SPARE_WORDS = 8, 4096, 16


class SFTSample(NamedTuple):
    """input_ids: int32 [L].  trained_spans: int32 [S, 2], [start, end) positions of the target tokens."""

    input_ids: np.ndarray
    trained_spans: np.ndarray


class PreferencePair(NamedTuple):
    """prompt_ids: int32 [P], shared by both sides.  chosen_ids [C], rejected_ids [R]: what follows on each side.

    chosen_start, rejected_start: how many tokens at the head of chosen_ids and rejected_ids are not scored. 0, except
    where a completion's beginning and the header's end are one token. A whole side is prompt_ids + chosen_ids.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int


# --------------------------------------------------------------------------------- rows to conversations
def sft_conversation(row: dict) -> tuple[str, list[dict]]:
    """-> (format, messages). Formats: `messages`; `prompt`+`completion`, each a text or a list of messages."""
    if "messages" in row:
        return "messages", _messages(row, "messages")
    if "prompt" in row and "completion" in row:
        return "prompt+completion", _messages(row, "prompt", "user") + _messages(row, "completion", "assistant")
    hint = "; this looks like preferences, for DPO" if "chosen" in row else ""
    raise UserError(f"SFT needs a column `messages`, or `prompt` and `completion`, not {_columns(row)}{hint}")


def preference_conversations(row: dict) -> tuple[str, list[dict], list[dict]]:
    """-> (format, chosen, rejected): two whole conversations with the same prompt, all messages but the last.

    Formats: `chosen`+`rejected`, lists of messages; `prompt`+`chosen`+`rejected`, each a text or a list. Beside a
    `prompt`, a list that begins with the assistant's message continues it; any other is the whole conversation.
    """
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"DPO needs columns `chosen` and `rejected`, not {_columns(row)}")
    prompt = None if row.get("prompt") is None else _messages(row, "prompt", "user")
    form, sides = "chosen+rejected", []
    for column in ("chosen", "rejected"):
        side = _messages(row, column, None if prompt is None else "assistant")
        if prompt is not None and side and side[0]["role"] == "assistant":
            form, side = "prompt+chosen+rejected", prompt + side
        sides.append(side)
    chosen, rejected = sides
    for i in range(max(len(chosen), len(rejected)) - 1):
        if chosen[i : i + 1] != rejected[i : i + 1] or i + 1 == min(len(chosen), len(rejected)):
            raise UserError(f"the prompts of chosen and rejected differ, first at message {i + 1}")
    return form, chosen, rejected


def _messages(row: dict, column: str, role: str | None = None) -> list[dict]:
    """A column's list of messages, checked, contents as text; where `role` is given, a text is one such message."""
    value = row[column]
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"`{column}` must be a list of messages, not {_name(value)}")
    messages = []
    for i, message in enumerate(value, start=1):
        where = f"`{column}` message {i}"
        if not isinstance(message, dict):
            raise UserError(f"{where} must be an object with a role and a content, not {_name(message)}")
        if not isinstance(message.get("role"), str):
            raise UserError(f"{where}: its role must be a text, not {_name(message.get('role'))}")
        kept = {key: item for key, item in message.items() if item is not None}
        messages.append({**kept, "content": _text(message.get("content"), where)})
    return messages


def _text(content: str | list, where: str) -> str:
    """A text unchanged, a list of text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: its content must be a text, not {_name(content)}")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else _name(part)
            raise UserError(f"{where}: only parts of type text can be trained on, not {kind}")
    return "".join(texts)


def _columns(row: dict) -> str:
    return ", ".join(map(str, row)) or "an empty row"


def _name(value) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


# --------------------------------------------------------------------------------- text to tokens
class Encoder:
    """The bare fast tokenizer: no special tokens added, no truncation or padding of its own, exact offsets."""

    def __init__(self, tokenizer):
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None  # some trim white space off the offsets
        self.longest_added_token = max(map(len, tokenizer.get_added_vocab()), default=0)

    def encode(self, text: str, max_tokens: int) -> tuple[Encoding, bool]:
        """-> (the first max_tokens tokens of the text, whether more were cut off).

        A text far longer than that is tokenized by its beginning: a longer one each time, until max_tokens lie in
        words that what follows cannot change. Tokens never cross a pre-tokenizer's word, and where a word ends
        depends on what follows only up to the end of a run of like characters, so the last SPARE_WORDS words are not
        trusted, nor what an added token cut in two could reach. A tokenizer without words is given the whole text.
        """
        size = CHARS_PER_TOKEN * max_tokens + SPARE_CHARS
        encoding = self._encode(text[:size])
        while size < len(text) and not self._is_settled(encoding, size, max_tokens):
            size *= 4
            encoding = self._encode(text[:size])
        truncated = len(encoding) > max_tokens
        if truncated:
            encoding.truncate(max_tokens)
        return encoding, truncated

    def _is_settled(self, encoding: Encoding, size: int, max_tokens: int) -> bool:
        """Whether the first max_tokens of this encoding of text[:size] are those of the whole text, and not all."""
        if len(encoding) <= max_tokens:
            return False
        last = len(encoding) - 1
        return (
            encoding.token_to_word(max_tokens) < encoding.token_to_word(last) - SPARE_WORDS
            and encoding.token_to_chars(max_tokens)[1] < size - SPARE_WORDS - self.longest_added_token
        )

    def _encode(self, text: str) -> Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # a lone surrogate, "\ud800": JSON allows it, UTF-8 does not
            raise Dropped("text is not valid Unicode") from error
        except BaseException as error:  # a panic in the tokenizer's Rust is one: megabytes of nothing but white space
            if type(error).__name__ != "PanicException":
                raise
            raise Dropped("the tokenizer fails on its text") from error


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


def tokenize_sft(text: str, char_spans: list[tuple[int, int]], encoder: Encoder, max_seq_length: int):
    """-> (SFTSample, whether it was truncated). char_spans: what is trained of the text. Raises Dropped."""
    encoding, truncated = encoder.encode(text, max_seq_length)
    # Position 0 is no target: there is nothing to predict it from.
    spans = [(max(1, _first_token(encoding, start)), _first_token(encoding, end)) for start, end in char_spans]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise Dropped("no target token within max_seq_length" if char_spans else "no assistant message")
    return SFTSample(np.array(encoding.ids, np.int32), np.array(spans, np.int32)), truncated


def tokenize_pair(prompt: str, chosen: str, rejected: str, encoder: Encoder, max_seq_length: int):
    """-> (PreferencePair, whether a side was truncated). Raises Dropped."""
    sides, prompt_lengths, scored_from, truncated = [], [], [], False
    for completion in (chosen, rejected):
        encoding, cut = encoder.encode(prompt + completion, max_seq_length)
        first = _first_token(encoding, len(prompt))
        if max(1, first) >= len(encoding):
            raise Dropped("prompt fills max_seq_length")
        # The last token of the header may be the first of the content too.
        is_merged = first > 0 and encoding.token_to_chars(first - 1)[1] > len(prompt)
        sides.append(np.array(encoding.ids, np.int32))
        prompt_lengths.append(first - is_merged)
        scored_from.append(max(1, first))
        truncated |= cut
    if np.array_equal(*sides):  # they differ after max_seq_length: all that could be learned is rounding
        raise Dropped("equal within max_seq_length")
    shared = min(prompt_lengths)
    differing = np.flatnonzero(sides[0][:shared] != sides[1][:shared])
    shared = int(differing[0]) if len(differing) else shared
    pair = PreferencePair(
        sides[0][:shared], sides[0][shared:], sides[1][shared:], scored_from[0] - shared, scored_from[1] - shared
    )
    return pair, truncated


def _first_token(encoding: Encoding, char: int) -> int:
    """The first token that begins at this character or after it; len(encoding) if none does."""
    if len(encoding) == 0 or char >= encoding.token_to_chars(len(encoding) - 1)[1]:
        return len(encoding)
    while (token := encoding.char_to_token(char)) is None:  # a character that the tokenizer leaves out
        char += 1
    while token < len(encoding) and encoding.token_to_chars(token)[0] < char:
        token += 1
    return token
