"""What a row means, before any template: its messages, which of them are trained, its tools, a template's variables."""

from typing import NamedTuple


class Conversation(NamedTuple):
    """messages: role, content and what else a template may show, as transformers takes them; no filler nulls.

    trained: for each message, whether it may be trained; only an assistant's is.
    tools: JSON schemas of functions, or None. variables: further names that the template sees (`enable_thinking`).
    """

    messages: list[dict]
    trained: list[bool]
    tools: list | None = None
    variables: dict = {}  # noqa: RUF012  (never changed)


class Dropped(Exception):
    """A well-formed row that holds nothing to train on; its text is the reason it is counted under."""
