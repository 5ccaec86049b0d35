"""What a row means, before any template: its messages, which of them are trained, its tools, a template's variables.

The form of a row is told by its columns. SFT, the first form all of whose columns are there:

    messages                        a list of messages, or its JSON text
    conversations                   the same, of `from` and `value` (ShareGPT), or of `role` and `content`
    prompt, completion              each a text or a list of messages; only the completion is trained
    instruction, output             (Alpaca) with `input`, if there is any, below the instruction
    input_ids                       tokens, trained where `labels` are not -100, all of them where there are none
    text                            trained from its first character to an EOS behind its last

DPO: chosen, rejected, each a list of messages; with `prompt`, each a text or a list that goes on from it; two texts of
turns that begin with `Human:` and `Assistant:` (HH).
"""

import json
import re
from typing import NamedTuple

from common.failures import UserError, one_line

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
FOR_EVERY_FORM = ("system", "tools", "chat_template_kwargs")
WEIGHTS = ("weight", "train", "training")  # what a message says of whether it is trained
NOT_TRAINED, EMPTY = "message that its row says is not trained", "empty assistant turn, not trained"
NO_CALLS: tuple = (None, [], {}, "")


class Dropped(Exception):
    """A row that cannot be used, or holds nothing to train on; its text is the reason it is counted under."""


class Conversation(NamedTuple):
    """messages: role, content and what else a template may show, as transformers takes them; no filler nulls. A content
    is a text; there is none only where an assistant's message has tool_calls and no text.

    trained: for each message, whether it may be trained; only an assistant's is.
    tools: JSON schemas of functions, or None. variables: further names that the template sees (`enable_thinking`).
    """

    messages: list[dict]
    trained: list[bool]
    tools: list | None = None
    variables: dict = {}  # noqa: RUF012  (never changed)


class Dropped(Exception):
    """A well-formed row that holds nothing to train on; its text is the reason it is counted under."""
