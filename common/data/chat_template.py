"""Chat templates: what text a conversation becomes, and which characters of it are trained.

The text is what transformers renders for the whole conversation. Of it, each assistant turn is trained from where its
generation prompt ends (where there is none, its header) to the end of what closes it: content, reasoning and calls as
the template shows them, and the token that stops generation, without white space after it. A turn is found by
rendering, never by searching for its content. The conversation is rendered again with marks around each content,
reasoning, name and argument; if the text without the marks is the same, then between the marks of two messages lies
only what the template prints. There a turn begins where the generation prompt ends that follows a question; else where
that of `messages[:i]` ends; else after the header of other answers. It ends with what closes other answers; else with
a special token; else where `messages[:i + 1]` ends. Within a turn of several answers, calls and results (Apertus) the
text and that of the first messages need only begin alike. A row for which none of that holds is dropped.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from itertools import accumulate, count, dropwhile, groupby, islice, takewhile
from typing import Any, NamedTuple

import jinja2

from common.data import limits
from common.data.conversations import Conversation, Dropped
from common.failures import UserError, as_user_error, named_file, one_line

# The reference run's template: <|role|>, a new line, the content (and EOS, if the assistant's), a new line except at
# the end. Other roles render nothing.
TULU = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- '<|system|>\\n' }}{{- message['content'] }}{{- '\\n' }}
{%- elif message['role'] == 'user' %}{{- '<|user|>\\n' }}{{- message['content'] }}{{- '\\n' }}
{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>\\n' }}{{- message['content'] }}{{- eos_token }}
{%- if not loop.last %}{{- '\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# A mark is BEGIN or END, a number, STOP: signs that no data holds, unchanged by strip, split, tojson and repr.
BEGIN, END, STOP = "\U000101d0", "\U000101d1", "\U000101d2"
MARK = re.compile(f"([{BEGIN}{END}])([0-9]+){STOP}")
ESCAPED = {json.dumps(sign)[1:-1]: sign for sign in (BEGIN, END, STOP)}  # as tojson(ensure_ascii=true) prints them
NUMBERED = r"\w*\d\w*"  # a number, or a name with digits
MARKER = BEGIN + END  # stands for a whole content
QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
MARKED_ANSWER = {"role": "assistant", "content": MARKER}
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {}}}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # where transformers takes a message's reasoning from


class Rendered(NamedTuple):
    """text: of the whole conversation.  spans: [start, end) characters that are trained, in order.  notes: what is not
    trained or not shown, once for each turn."""

    text: str
    spans: list[tuple[int, int]]
    notes: list[str]


class Frame(NamedTuple):
    """What a template prints around an answer.

    prompt: the generation prompt; None where a header is printed only together with the answer.  headers: what precedes
    an answer within a conversation, and the last one.  closing: what closes an answer, without white space; "" if
    nothing does, and without an EOS that only the end of a text has (Phi-3).  after_last: what follows it at the end.
    closing_within: closing; where there is none, a special token that closes an answer if a question follows (Apertus).
    """

    prompt: str | None
    headers: tuple[str, ...]
    closing: str
    after_last: str
    closing_within: str


class ChatTemplate:
    """A chat template, with the tokenizer whose special tokens it prints.

    name: as asked for.  jinja: its text.  digest: sha256 of that text.  closing: Frame's.
    """

    def __init__(self, name: str, jinja: str, tokenizer):
        """Raises UserError if it does not compile, cannot render a question and an answer, or hides the answer."""
        self.name, self.jinja, self.tokenizer = name, jinja, tokenizer
        self.digest = hashlib.sha256(jinja.encode()).hexdigest()
        special = "|".join(map(re.escape, sorted(tokenizer.added_tokens_encoder, reverse=True))) or "$^"
        self.special, self.piece = re.compile(rf"\s*({special})"), re.compile(rf"{special}|.", re.DOTALL)
        self._no_variables = {*signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
        self._shows_role: dict[str, bool] = {"user": True, "assistant": True}
        self._frames: dict[str, Frame] = {}
        self.known: dict[tuple, Any] = {}  # of _Layout: what regions of other turns were
        with as_user_error(f"chat template {name!r} for a question and an answer", Dropped):
            self.closing = self.frame({}).closing
            self._shows_tools = self.attempt([QUESTION], tools=[TOOL]) != self.attempt([QUESTION])
            self._arguments_as = self._form_of_arguments()

    def apply(self, messages: list[dict], add_generation_prompt: bool = False, **options) -> str:
        """transformers' own rendering; options: tools, and variables of the template. Raises Dropped where the template
        refuses the conversation, by its `raise_exception`, or fails on it; UserError if it takes too much."""
        options |= {"chat_template": self.jinja, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            with limits.bounded():
                return self.tokenizer.apply_chat_template(messages, **options)
        except (TimeoutError, MemoryError):
            most = f"{limits.RENDER_SECONDS:g} seconds or {limits.RENDER_BYTES / 2**30:g} GiB"
            raise UserError(f"chat template {self.name!r} takes more than {most} for one conversation") from None
        except Exception as error:
            is_refusal = type(error) is jinja2.TemplateError  # what raise_exception raises
            what = "refused by the chat template" if is_refusal else f"the chat template fails: {type(error).__name__}"
            raise Dropped(f"{what}: {one_line(error)}") from error

    def attempt(self, messages: list[dict], add_generation_prompt: bool = False, **options) -> str | None:
        """As apply; None where that raises Dropped."""
        with suppress(Dropped):
            return self.apply(messages, add_generation_prompt, **options)
        return None

    def render(self, conversation: Conversation, only_last: bool = False) -> Rendered:
        """The text of a conversation, and what of it is trained: a span for each assistant turn that may be and that is
        shown; with only_last, of the last turn alone. Raises Dropped."""
        if not conversation.messages:
            return Rendered("", [], [])
        if no_variables := self._no_variables & conversation.variables.keys():
            raise Dropped(f"chat_template_kwargs may not set {min(no_variables)!r}")
        options = {"tools": conversation.tools, **conversation.variables}
        messages = [self._with_arguments(message) for message in conversation.messages]
        text = self.attempt(messages, **options)
        if text is None:  # many templates add to a content that is not there
            messages = [{**message, "content": message.get("content") or ""} for message in messages]
            text = self.apply(messages, **options)
        layout = _Layout(self, messages, text, options, self.frame(conversation.variables))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked_for = [i for i in (turns[-1:] if only_last else turns) if conversation.trained[i]]
        spans = [layout.span(i) for i in asked_for if layout.is_shown(i)]
        if conversation.tools and not self._shows_tools:
            layout.notes.append("tools that the template does not show")
        return Rendered(text, spans, layout.notes)

    def frame(self, variables: dict) -> Frame:
        """What is printed around an answer, with these variables of the template. Raises Dropped."""
        key = json.dumps(variables, sort_keys=True, default=str)
        if key not in self._frames:
            if len(self._frames) > 1000:  # variables that differ in each row
                self._frames.clear()
            self._frames[key] = self._frame(variables)
        return self._frames[key]

    def _frame(self, variables: dict) -> Frame:
        eos, answered = self.tokenizer.eos_token, self.apply([QUESTION, MARKED_ANSWER], **variables)
        asked, prompted = self.apply([QUESTION], **variables), self.apply([QUESTION], True, **variables)
        within = self.attempt([QUESTION, MARKED_ANSWER, QUESTION, ANSWER], **variables) or answered
        if answered.count(MARKER) != 1:
            raise Dropped("it does not show the assistant's content exactly once")
        (header, tail), (header_within, _, after) = answered.split(MARKER), within.partition(MARKER)
        if not prompted.startswith(asked):
            asked = asked.removesuffix(eos)  # of templates that end every text with it
        closing = tail.rstrip()
        before_eos = closing.removesuffix(eos).rstrip()
        if before_eos and after.startswith(before_eos) and not after.startswith(closing):
            closing = before_eos
        opening, opening_within = asked.rpartition("question")[0], after.partition("question")[0]
        users = self.shared(opening, opening_within, -1)
        between = opening_within.removesuffix(users).rstrip()
        is_header = prompted == asked and header.rstrip() != asked.rstrip()
        prompt = prompted[len(asked) :] if prompted.startswith(asked) and not is_header else None
        ending = self.shared(asked.removesuffix(eos), tail, -1).strip()  # of a text without and with an answer
        if prompted == asked and not after.startswith(closing) and ending:
            is_clear = header == asked and between and tail.startswith(between)
            if not is_clear or self.special.sub("", opening.removesuffix(users)).strip():
                raise Dropped("it ends every text with a generation prompt, and what closes an answer is not clear")
            closing, prompt = between, tail[len(between) :]
        headers = [h.removeprefix(asked) for h in (header_within, header) if h.startswith(asked)]
        closing_within = closing or (between if self.special.fullmatch(between) else "")
        return Frame(prompt, tuple(h for h in headers if h.strip()), closing, tail[len(closing) :], closing_within)

    def shared(self, text: str, other: str, step: int = 1) -> str:
        """What both begin with (step -1: end with), in whole special tokens and other characters."""
        pieces = [self.piece.findall(of_text)[::step] for of_text in (text, other)]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*pieces, strict=False))
        return "".join([piece for piece, _ in same][::step])

    def _with_arguments(self, message: dict) -> dict:
        """The message, with its calls' arguments as the template wants them. Raises Dropped for bad text."""
        if not message.get("tool_calls"):
            return message
        message = copy.deepcopy(message)
        for call in message["tool_calls"]:
            function = call.get("function") or call
            arguments = function.get("arguments")
            if self._arguments_as == "object" and isinstance(arguments, str):
                with suppress(ValueError):
                    function["arguments"] = json.loads(arguments)
                if not isinstance(function["arguments"], dict):
                    raise Dropped("tool calls whose arguments are no JSON object")
            elif self._arguments_as == "text" and isinstance(arguments, dict):
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return message

    def _form_of_arguments(self) -> str:
        """As what the template shows a call's arguments well: "object", "text", or "either"."""
        texts = []
        for arguments in ({"key0": "value0"}, '{"key0": "value0"}'):
            calling, result = _called(arguments, "seen")
            shown = (self.attempt([QUESTION, *rest]) for rest in ([calling], [calling, result, ANSWER]))
            texts.append(next((text for text in shown if text and "value0" in text), ""))
        if not texts[0] or "{'key0'" in texts[0]:  # as Python writes it
            return "text" if texts[1] else "either"
        return "either" if texts[0] == texts[1] else "object"

    def end_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and the last of what closes a turn, if special or the only one."""
        closing = self.tokenizer.encode(self.closing, add_special_tokens=False)
        is_end = len(closing) == 1 or (closing and closing[-1] in self.tokenizer.added_tokens_decoder)
        return sorted({self.tokenizer.eos_token_id, *(closing[-1:] if is_end else ())})

    def shows_role(self, role: str) -> bool:
        """Whether messages of this role show their content. One that is refused counts: its rows will say so."""
        if role not in self._shows_role:
            message = {"role": role, "content": MARKER}
            texts = [self.attempt([message, QUESTION]), self.attempt([QUESTION, ANSWER, message])]
            if role == "tool":  # some show a call's result alone
                texts.append(self.attempt([QUESTION, *_called({}, MARKER), ANSWER]) or "")
            self._shows_role[role] = any(text is None or MARKER in text for text in texts)
        return self._shows_role[role]


def _called(arguments: dict | str, result: str) -> tuple[dict, dict]:
    """A message that calls TOOL, and its result."""
    call = {"type": "function", "id": "call00000", "function": {"name": "look", "arguments": arguments}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return calling, {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": result}


def _marked(message: dict, numbers: Iterator[int], has_blank: bool) -> tuple[dict, dict[int, str]]:
    """A copy with marks around its content, reasoning, and the names and arguments of its calls, inside the white space
    that templates strip; and the number of each of an assistant's, with its kind. Others have number 0.
    has_blank: whether a blank content has marks too, where there are no calls."""
    calls, is_assistant, kinds = message.get("tool_calls"), message["role"] == "assistant", {}

    def put(text: str, kind: str, even_blank: bool = False) -> str:
        content, before = text.strip(), text[: len(text) - len(text.lstrip())]
        if not content and not even_blank:
            return text
        number = next(numbers) if is_assistant else 0
        kinds[number] = kind
        begin, end = f"{BEGIN}{number:06}{STOP}", f"{END}{number:06}{STOP}"
        return f"{before}{begin}{content}{end}{text[len(before) + len(content) :]}"

    def in_calls(value, is_shown: bool = False):
        if isinstance(value, dict):
            keys = {key: put(key, "call") if is_shown else key for key in sorted(value, key=str.lower)}  # as dictsort
            return {keys[key]: in_calls(value[key], is_shown or key in ("name", "arguments")) for key in value}
        if isinstance(value, list):
            return [in_calls(item, is_shown) for item in value]
        return put(value, "call") if is_shown and isinstance(value, str) else value

    reasoning = {key: message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)}
    marked = message | {key: put(text, "reasoning") for key, text in reasoning.items()}
    if isinstance(message.get("content"), str):
        thought, closing, answer = message["content"].rpartition("</think>")
        before, opening, thought = thought.rpartition("<think>")
        if not is_assistant or not (answer.strip() or thought.strip() or has_blank):
            before, opening, thought, closing, answer = "", "", "", "", message["content"]
        is_blank = bool(closing) and not answer.strip()  # then the text is the reasoning, if only its tags
        thought = put(thought, "reasoning", has_blank and is_blank)
        answer = put(answer, "content" if answer.strip() else "blank", has_blank and not calls)
        marked["content"] = f"{before}{opening}{thought}{closing}{answer}"
    return {**marked, "tool_calls": in_calls(calls)} if calls else marked, kinds if is_assistant else {}


def _split(marked: str) -> tuple[list[str], list[tuple[int, bool]]]:
    """The n + 1 texts before, between and behind n marks; and of each mark its number, and whether it is a BEGIN."""
    for escaped, sign in ESCAPED.items():
        marked = marked.replace(escaped, sign)
    pieces = MARK.split(marked)
    return pieces[::3], [(int(n), sign == BEGIN) for sign, n in zip(pieces[1::3], pieces[2::3], strict=True)]


class _Layout:
    """Where the turns of one conversation lie in its text. notes: Rendered's.

    marked: its messages, with marks.  kinds: of each, those of its marks by their numbers.  regions, marks: _split's of
    the whole.  first: where each mark is met first.  runs: of each message, by its place, the marks from its first one
    to where one of another message comes.  apart: messages that are shown behind that, too.
    """

    def __init__(self, template: ChatTemplate, messages: list[dict], text: str, options: dict, frame: Frame):
        self.template, self.options, self.frame = template, options, frame
        self.notes: list[str] = []
        self.failed: set[tuple] = set()  # of _offset
        for every in (True, False):  # else what the assistant's messages show, where they are not blank
            numbers = count(1)
            marked = [_marked(m, numbers, every) if every or m["role"] == "assistant" else (m, {}) for m in messages]
            self.marked, self.kinds = [m for m, _ in marked], [kinds for _, kinds in marked]
            self.regions, self.marks = _split(template.attempt(self.marked, **options) or "")
            if "".join(self.regions) == text:
                break
        else:
            raise Dropped("where the messages lie in the template's text cannot be told")
        self.starts = [0, *accumulate(map(len, self.regions))]
        self.first = {mark: k for k, mark in reversed([*enumerate(self.marks)])}
        message_of = {number: i for i, kinds in enumerate(self.kinds) for number in kinds}
        self.runs: dict[int, list[int]] = {}
        self.apart: set[int] = set()
        for i, run in groupby(range(len(self.marks)), lambda k: message_of.get(self.marks[k][0], -1)):
            places = [*run]
            if self.runs.setdefault(i, places) is not places and any(self._is_first(k) for k in places):
                self.apart.add(i)

    def _is_first(self, k: int) -> bool:
        return self.first[self.marks[k]] == k

    def is_shown(self, i: int) -> bool:
        """Whether assistant message i is, its calls and all; notes what is not."""
        shown: dict[str, list[bool]] = {"call": [], "reasoning": [], "content": [], "blank": []}
        for number, kind in self.kinds[i].items():
            shown[kind].append((number, True) in self.first and (number, False) in self.first)
        if not all(shown["call"]):
            self.notes.append("tool calls that the template does not show: turn not trained")
            return False
        if not any(shown["call"] + shown["reasoning"] + shown["content"]):
            self.notes.append("assistant turns of which the template shows nothing: not trained")
            return False
        if shown["reasoning"] and not any(shown["reasoning"]):
            self.notes.append("reasoning that the template leaves out")
        if not all(shown["content"]):
            self.notes.append("content that the template leaves out")
        if i in self.apart:
            self.notes.append("assistant turns that the template shows in parts: the first is trained")
        return True

    def span(self, i: int) -> tuple[int, int]:
        """What is trained of assistant message i, which is shown. Raises Dropped."""
        start, run = self._start(i), self.runs[i]
        last = max(k for k in run if self._is_first(k))
        return start, self._end(i, last + (self._num_shown_again(i, last) if last < run[-1] else 0))

    def _num_shown_again(self, i: int, last: int) -> int:
        """How many of the run's marks behind `last` are the turn's own, as in <key>value</key>, and not of a result
        that names its call: those that messages[:i + 1] show. Rendered once for each text between them."""
        behind, known = self.runs[i][self.runs[i].index(last) + 1 :], self.template.known
        key = *(self._without_numbers(self.regions[k]) for k in behind if self.marks[k][1]), "again"
        if key not in known:
            _, marks = _split(self.template.attempt(self.marked[: i + 1], **self.options) or "")
            own = islice(dropwhile(lambda mark: mark != self.marks[last], marks), 1, None)
            known[key] = sum(1 for _ in takewhile(lambda k: next(own, None) == self.marks[k], behind))
        return known[key]

    def _start(self, i: int) -> int:
        first = self.runs[i][0]
        region, prompt = self.regions[first], self.frame.prompt
        is_begin = self.marks[first][1]
        find = region.rfind if is_begin else region.find  # behind the header only white space, or some of the content
        if prompt and prompt.strip() and prompt in region:
            return self.starts[first] + find(prompt) + len(prompt)
        offset = self._offset(i, first - 1, is_prompt=True) if prompt is not None else None
        if offset is None:
            header = next((header for header in self.frame.headers if header in region), "")
            offset = find(header) + len(header) if header else None
            if not header and (offset := self._offset(i, first - 1, in_part=self._is_within_turn(i - 1))) is not None:
                header = self._header(region[offset:])
                offset += len(header)
            if header or prompt:
                self.notes.append(f"answers after {header!r}, where the generation prompt is {prompt or ''!r}")
        if offset is None and region.strip():
            raise Dropped("where an assistant's turn begins in the template's text cannot be told")
        return self.starts[first] + (offset or 0)

    def _header(self, text: str) -> str:
        """What a text has of the generation prompt's beginning, up to a special token or the end of a line: the header
        of an answer with another form of reasoning than the prompt's. With what is blank before it."""
        begun = text.lstrip()
        pieces = self.template.piece.findall(self.template.shared((self.frame.prompt or "").lstrip(), begun))
        num_pieces = max((n for n, piece in enumerate(pieces, 1) if len(piece) > 1 or piece == "\n"), default=0)
        return text.removesuffix(begun) + "".join(pieces[:num_pieces]) if num_pieces else ""

    def _end(self, i: int, last: int) -> int:
        """Where the turn ends whose last mark is number `last`."""
        region, closing = self.regions[last + 1], self.frame.closing_within
        if closing and closing in region:
            offset: int | None = region.index(closing) + len(closing)
        elif (offset := self._offset(i + 1, last)) is None:
            if special := self.template.special.match(region):
                offset = special.end()
            elif self._is_within_turn(i + 1):
                offset = self._offset(i + 1, last, in_part=True)
        if offset is None or self.marks[last][1]:
            raise Dropped("where an assistant's turn ends in the template's text cannot be told")
        return self.starts[last + 1] + (len(region[:offset].rstrip()) if self.frame.closing else offset)

    def _is_within_turn(self, i: int) -> bool:
        """Whether message i may lie within one turn of several answers and results (Apertus)."""
        return 0 <= i < len(self.marked) and self.marked[i]["role"] not in ("system", "user")

    @staticmethod
    def _without_numbers(text: str) -> str:
        """The text without numbers, and names with digits, that differ from turn to turn."""
        return re.sub(NUMBERED, "0", text)

    def _offset(self, num_messages: int, k: int, is_prompt: bool = False, in_part: bool = False) -> int | None:
        """How much of the region behind mark k the first messages render to; in_part: as far as both are the same, else
        None if they are not. Rendered once for all regions that are the same without numbers."""
        known, region = self.template.known, self.regions[k + 1]
        key = is_prompt, in_part, self.frame, self._without_numbers(region)
        if key in self.failed:
            return None
        if found := key in known and known[key].match(region):
            return found.end()
        shorter = self.marked[:num_messages]
        if not is_prompt and num_messages - 1 in self.apart:  # its first part alone, as of calls
            kinds = self.kinds[num_messages - 1]
            if all(kinds[self.marks[mark][0]] != "content" for mark in self.runs[num_messages - 1]):
                shorter[-1] = shorter[-1] | {"content": ""}
        text = self.template.attempt(shorter, is_prompt, **self.options) if shorter else None
        if text is None:
            return None
        regions, marks = _split(text)
        tail = regions[-1] if is_prompt else regions[-1].removesuffix(self.frame.after_last)
        tail = self.template.shared(tail, region) if in_part else tail
        if marks[-1:] != self.marks[max(k, 0) : k + 1] or not region.startswith(tail):
            self.failed.add(key)
            return None
        if len(known) > 1000:  # regions that hold some of the data
            known.clear()
        known[key] = re.compile(NUMBERED.join(map(re.escape, re.split(NUMBERED, tail))))
        return len(tail)


def resolve_template(name_or_path: str, tokenizer) -> ChatTemplate:
    """`tulu`, `tokenizer` (the tokenizer's own), `auto` (its own where it has one, else tulu), or the path of a .jinja
    file. Raises UserError."""
    if name_or_path == "auto":
        name_or_path = "tokenizer" if tokenizer.chat_template else "tulu"
    with as_user_error(f"chat_template {name_or_path!r} is not tulu, nor a tokenizer's only one, nor a .jinja file"):
        own = tokenizer.chat_template
        if name_or_path == "tokenizer" and isinstance(own, dict) and {"default", "tool_use"} <= own.keys():
            with_tools, without = (own[name].removesuffix("\n") for name in ("tool_use", "default"))
            jinja = "{% if tools %}" + with_tools + "{% else %}" + without + "{% endif %}"  # as transformers chooses
        elif name_or_path == "tokenizer":
            jinja = tokenizer.get_chat_template()
        else:
            jinja = TULU if name_or_path == "tulu" else named_file(name_or_path).read_text(encoding="utf-8-sig")
    return ChatTemplate(name_or_path, jinja, tokenizer)
