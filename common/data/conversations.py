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
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
FOR_EVERY_FORM = ("system", "tools", "chat_template_kwargs")
WEIGHTS = ("weight", "train", "training")  # what a message says of whether it is trained
NOT_TRAINED, EMPTY = "assistant turn not to be trained, or of a prompt", "empty assistant turn, not trained"
OF_OTHERS = "a weight of a message that is not the assistant's, not trained"


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


class Example(NamedTuple):
    """What a row gives. form: as the table calls it.  columns: those acted on.  notes: what is not trained, and why.

    One of: conversations, one for SFT, of a pair chosen's and rejected's; text, to be trained whole; tokens, the
    columns input_ids, labels and attention_mask.
    """

    form: str
    columns: tuple[str, ...]
    notes: list[str]
    conversations: list[Conversation] = []  # noqa: RUF012  (never changed)
    text: str | None = None
    tokens: dict | None = None


# --------------------------------------------------------------------------------- forms
def _alpaca(row: dict) -> list[dict]:
    question, more = checked(row["instruction"], str, "`instruction`"), checked(row.get("input", ""), str, "`input`")
    question = f"{question}\n\n{more}" if more.strip() else question
    return [{"role": "user", "content": question}, *_messages(row, "output", "assistant")]


def _prompted(row: dict) -> list[dict]:
    asked = [{**message, "weight": 0} for message in _messages(row, "prompt", "user")]
    return asked + _messages(row, "completion", "assistant")


# The columns that a form needs -> the columns that it may have, its name, its messages.
SFT_FORMS = {
    ("messages",): ((), "messages", lambda row: _messages(row, "messages")),
    ("conversations",): ((), "conversations (ShareGPT)", lambda row: _messages(row, "conversations")),
    ("prompt", "completion"): ((), "prompt+completion", _prompted),
    ("instruction", "output"): (("input",), "instruction+input+output (Alpaca)", _alpaca),
    ("input_ids",): (("labels", "attention_mask"), "input_ids", None),
    ("text",): ((), "text", None),
}
PAIR = ("chosen", "rejected")
COLUMNS = (*{name: 0 for need, (may, *_) in SFT_FORMS.items() for name in need + may}, *PAIR, *FOR_EVERY_FORM)


def sft_example(row: dict, variables: dict) -> Example:
    """variables: the run's own, which a row's chat_template_kwargs override. Raises Dropped; UserError for a weight
    that is neither 0 nor 1."""
    row = {name: value for name, value in row.items() if value is not None}
    needed = next((needed for needed in SFT_FORMS if row.keys() >= {*needed}), None)
    if needed is None:
        raise Dropped(f"no form of SFT has the columns {', '.join(sorted(row))}")
    possible, form, messages_of = SFT_FORMS[needed]
    columns = needed + possible
    if messages_of:
        conversation, notes = _conversation(messages_of(row), row, variables)
        return Example(form, columns + FOR_EVERY_FORM, notes, [conversation])
    if form == "text":
        if not checked(row["text"], str, "`text`").strip():
            raise Dropped("empty text")
        return Example(form, columns, [], text=row["text"])
    for name in columns:
        checked(row.get(name, []), list, f"`{name}`")
    return Example(form, columns, [], tokens={name: row.get(name) for name in columns})


def preference_example(row: dict, variables: dict) -> Example:
    """Two whole conversations, chosen's and rejected's. Beside a `prompt`, a list that begins with the assistant's
    message continues it; any other is the whole conversation. Raises as sft_example."""
    row = {name: value for name, value in row.items() if value is not None}
    if not row.keys() >= {*PAIR}:
        raise Dropped(f"no form of DPO has the columns {', '.join(sorted(row))}")
    form = "+".join(PAIR)
    if "prompt" in row:
        prompt, sides = _messages(row, "prompt", "user"), []
        for column in PAIR:
            side = _messages(row, column, "assistant")
            if side and side[0]["role"] == "assistant":
                form, side = "prompt+chosen+rejected", prompt + side
            sides.append(side)
    elif all(isinstance(row[column], str) for column in PAIR):
        form, sides = "chosen+rejected texts (HH)", _turns_of_texts(row["chosen"], row["rejected"])
    else:
        sides = [_messages(row, column) for column in PAIR]
    made = [_conversation(side, row, variables) for side in sides]
    for conversation, _ in made:
        if not conversation.messages or conversation.messages[-1]["role"] != "assistant":
            raise Dropped("does not end with the assistant's message")
        if not conversation.trained[-1]:
            is_empty = _is_empty(conversation.messages[-1])
            raise Dropped("empty completion" if is_empty else "its row says that a completion is not trained")
    return Example(form, (*PAIR, "prompt", *FOR_EVERY_FORM), [], [conversation for conversation, _ in made])


def _turns_of_texts(chosen: str, rejected: str) -> list[list[dict]]:
    """The messages of each: what both begin with, up to the last `Assistant:` in it, and the answer that follows."""
    ends = [match.end() for match in re.finditer("\n\nAssistant:", chosen)]
    cut = max((end for end in ends if chosen[:end] == rejected[:end]), default=0)
    first, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", chosen[:cut])
    answers = [text[cut:].strip() for text in (chosen, rejected)]
    if cut == 0 or first.strip():
        raise Dropped("texts without a `prompt`, and not of turns that begin with `Human:` and `Assistant:`")
    if any("\n\nHuman:" in answer for answer in answers):
        raise Dropped("the prompts of chosen and rejected differ")
    asked = zip(turns[:-2:2], turns[1:-2:2], strict=True)
    prompt = [{"role": ROLES[speaker.lower()], "content": said.strip()} for speaker, said in asked]
    return [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]


# --------------------------------------------------------------------------------- messages
def _conversation(messages: list[dict], row: dict, variables: dict) -> tuple[Conversation, list[str]]:
    """The messages with what the row's other columns say; and notes."""
    notes: list[str] = []
    trained = [_is_trained(message, notes) for message in messages]
    system = checked(row.get("system", ""), str, "`system`")
    if system.strip() and [message.get("content") for message in messages if message["role"] == "system"] != [system]:
        if any(message["role"] == "system" for message in messages):
            raise Dropped("a column `system` beside another system message")
        messages, trained = [{"role": "system", "content": system}, *messages], [False, *trained]
    tools = _parsed(row.get("tools") or None, "`tools`")
    if tools:
        tools = [json_of(tool, dict, "each of `tools`") for tool in (tools if isinstance(tools, list) else [tools])]
    own = json_of(row.get("chat_template_kwargs") or {}, dict, "`chat_template_kwargs`")
    return Conversation(messages, trained, tools or None, {**variables, **own}), notes


def _is_trained(message: dict, notes: list[str]) -> bool:
    """Whether a message may be; takes WEIGHTS off it, and notes what is not as they say. Raises UserError for another
    weight than 0 and 1."""
    weights = {name: message.pop(name) for name in WEIGHTS if name in message}
    if message["role"] != "assistant":
        notes += [OF_OTHERS] * any(weights.values())
        return False
    for name, weight in weights.items():
        if weight not in (0, 1, None):
            raise UserError(f"a message's `{name}` is {one_line(repr(weight))}; it may be 0 or 1, trained or not")
    if not all(weight is None or weight for weight in weights.values()):
        notes.append(NOT_TRAINED)
        return False
    if is_empty := _is_empty(message):
        notes.append(EMPTY)
    return not is_empty


def _messages(row: dict, column: str, role: str | None = None) -> list[dict]:
    """A column's messages, checked, with transformers' names. Where `role` is given, a text is one such message; else
    it is the JSON text of a list."""
    if isinstance(row[column], str) and role is not None:
        return [{"role": role, "content": row[column]}]
    place, messages = f"a message of `{column}`", []
    for message in json_of(row[column], list, f"`{column}`"):
        message = dict(checked(message, dict, place))
        if "role" not in message and "from" in message:
            message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
        speaker = checked(message.get("role"), str, f"the role of {place}")
        message["role"] = ROLES.get(speaker.strip().lower(), speaker)
        if calls := _parsed(message.pop("tool_calls", None) or None, f"the tool_calls of {place}"):
            calls = checked(calls, list, f"the tool_calls of {place}")
            message["tool_calls"] = [checked(call, dict, f"each of the tool_calls of {place}") for call in calls]
        if speaker == "function_call":
            call = json_of(message.pop("content", None), dict, "a function_call")
            message |= {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
        if message.get("content") is not None or "tool_calls" not in message:
            message["content"] = _text(message.get("content"), message["role"], f"the content of {place}")
        else:
            message.pop("content", None)
        messages.append(message)
    return messages


def _text(content, role: str, place: str) -> str:
    """A text; of a list of parts their texts; nothing is an empty answer."""
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else p for p in content]
        return "".join(checked(text, str, f"each part of {place}") for text in texts)
    return checked("" if content is None and role == "assistant" else content, str, place)


def _is_empty(message: dict) -> bool:
    return not message.get("content", "").strip() and "tool_calls" not in message


def _parsed(value, place: str):
    """Of a text, the JSON in it. Raises Dropped."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Dropped(f"{place}: a text that is not valid JSON") from None


def checked(value, kind: type[list] | type[dict] | type[str], place: str):
    """The value, which must be of this kind. Raises Dropped."""
    if not isinstance(value, kind):
        wanted = {"list": "a list", "dict": "an object", "str": "a text"}[kind.__name__]
        raise Dropped(f"{place} must be {wanted}, not {'null' if value is None else type(value).__name__}")
    return value


def json_of(value, kind: type[list] | type[dict], place: str):
    """As checked, of a value or its JSON text."""
    return checked(_parsed(value, place), kind, place)
