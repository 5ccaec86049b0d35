"""Chat templates: what text a conversation becomes, and which characters of it are trained.

One rule for all templates. The text is what transformers renders for the whole conversation. Of it, each assistant
turn is trained from where its generation prompt ends (where there is none, its header) to the end of what closes the
turn: content, reasoning and tool calls as the template shows them, and the token that stops generation. Headers are not
trained, nor white space after that token. Where a turn lies is found by rendering, never by searching for its content:

1. The conversation is rendered a second time, with marks around each content, reasoning, name and argument. If the text
   without the marks is the first one, what lies between marks of two turns is the template's own.
2. In it, a turn begins where the generation prompt ends, as it is printed after a question; else where that of
   `messages[:i]` ends; else where the header of another answer does. It ends with what closes answers; else with what
   closes `messages[:i + 1]`; else with the next special token.
3. Where no marks can be set, `messages[:i]` with the generation prompt, and `messages[:i + 1]`, must render to
   beginnings of the whole text.
4. Where even that does not hold, the row is dropped.
"""

import hashlib
import json
import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jinja2

from common.data.conversations import Conversation
from common.failures import UserError, as_user_error, one_line

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

# A mark is BEGIN or END, a number, STOP: private-use characters, unchanged by strip, split and tojson.
BEGIN, END, STOP = "\ue0f1", "\ue0f2", "\ue0f3"
MARK = re.compile(f"([{BEGIN}{END}])([0-9]+){STOP}")
MARKER = BEGIN + END  # stands for a whole content
QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
MARKED_ANSWER = {"role": "assistant", "content": MARKER}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # what transformers takes a message's reasoning from
RENDER_SECONDS, RENDER_BYTES = 20.0, 2 * 2**30  # that the rendering of one row may take


class Dropped(Exception):
    """A well-formed row that holds nothing to train on; its text is the reason it is counted under."""


class Rendered(NamedTuple):
    """text: of the whole conversation.  spans: [start, end) characters that are trained, in order.

    notes: what the template does not show, "kind: example", one for each turn that it is true of.
    """

    text: str
    spans: list[tuple[int, int]]
    notes: list[str]


class Frame(NamedTuple):
    """What a template prints around an answer.

    prompt: the generation prompt; None where a header is printed only together with the answer.
    headers: what comes before an answer in the middle of a conversation, and before the last one.
    closing: what closes an answer, without the white space after it; "" if nothing does. Where the template prints EOS
    once, at the end of the text (Phi-3), closing is what comes before.
    after_last: what follows closing at the end of a text.
    """

    prompt: str | None
    headers: list[str]
    closing: str
    after_last: str


class Mark(NamedTuple):
    """position: its character in the text without marks.  leaf: the number of what it is the beginning or end of."""

    position: int
    leaf: int
    is_begin: bool


class Marked(NamedTuple):
    """messages: with marks.  leaves: what is marked in each, (number, kind: content, reasoning or call).
    marks: as they come out in the text, in order."""

    messages: list[dict]
    leaves: list[list[tuple[int, str]]]
    marks: list[Mark]


class ChatTemplate:
    """A chat template, with the tokenizer whose special tokens it prints.

    name: as asked for.  jinja: its text.  digest: sha256 of that text.  closing: Frame's, without variables.
    """

    def __init__(self, name: str, jinja: str, tokenizer):
        """Raises UserError if it does not compile, cannot render a question and an answer, or hides the answer."""
        self.name, self.jinja, self.tokenizer = name, jinja, tokenizer
        self.digest = hashlib.sha256(jinja.encode()).hexdigest()
        self._shows_role: dict[str, bool] = {"user": True, "assistant": True}
        self._frames: dict[str, Frame] = {}
        self.tails: dict[tuple, str | None] = {}
        added = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._arguments_as: str | None = None
        with as_user_error(f"chat template {name!r} for a question and an answer", Dropped), self._bounded():
            self.closing = self._frame({}).closing
            self._shows_tools = self._renders_tools()

    def apply(self, messages: list[dict], add_generation_prompt: bool = False, **options) -> str:
        """transformers' own rendering; options: tools, and variables of the template. Raises Dropped where the template
        refuses the conversation, by its `raise_exception`, or fails on it; UserError if it takes too much."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except (TimeoutError, MemoryError) as error:
            limits = f"{RENDER_SECONDS:g} seconds or {RENDER_BYTES / 2**30:g} GiB"
            raise UserError(f"chat template {self.name!r} takes more than {limits} for one conversation") from error
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # what raise_exception raises
                raise Dropped(f"refused by the chat template: {one_line(error)}") from error
            raise Dropped(f"the chat template fails: {type(error).__name__}: {one_line(error)}") from error

    def render(self, conversation: Conversation, only_last: bool = False) -> Rendered:
        """The text of a conversation, and what of it is trained: a span for each assistant turn that is to be trained
        and is shown (two where the template ends the turn twice); with only_last, at most one, the last turn's.
        Raises Dropped; UserError for a template that takes too much time or memory."""
        if not conversation.messages:
            return Rendered("", [], [])
        options = {"tools": conversation.tools, **conversation.variables}
        with self._bounded():
            frame = self._frame(conversation.variables)
            messages = [self._with_arguments(message) for message in conversation.messages]
            try:
                text = self.apply(messages, **options)
            except Dropped:
                if all("content" in message for message in messages):
                    raise
                messages = [{"content": "", **message} for message in messages]  # many templates add to it
                text = self.apply(messages, **options)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"][
                -1 if only_last else 0 :
            ]
            turns = [i for i in turns if conversation.trained[i]]
            marked = self._marked(messages, text, options) if turns else None
            places, spans = _Places(self, frame, text, options, marked), []
            for i in turns:
                if marked is None or not marked.leaves[i]:
                    spans.append(self._unmarked_span(messages, i, text, frame, options))
                else:
                    spans += places.spans(i, messages[i])
        if conversation.tools and not self._shows_tools:
            places.notes.append("tools that the template does not show")
        return Rendered(text, [(spans[0][0], spans[-1][1])] if only_last and spans else spans, places.notes)

    def end_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and the last of what closes a turn, if special or the only one."""
        closing = self.tokenizer.encode(self.closing, add_special_tokens=False)
        is_end = len(closing) == 1 or (closing and closing[-1] in self.tokenizer.added_tokens_decoder)
        return sorted({self.tokenizer.eos_token_id, *(closing[-1:] if is_end else ())})

    def shows_role(self, role: str) -> bool:
        """Whether messages of this role show their content. One that is refused counts: its rows will say so."""
        if role not in self._shows_role:
            message = {"role": role, "content": MARKER}
            try:
                texts = [self.apply([message, QUESTION]), self.apply([QUESTION, ANSWER, message])]
                self._shows_role[role] = any(MARKER in text for text in texts)
            except Dropped:
                self._shows_role[role] = True
        return self._shows_role[role]

    def warnings(self) -> list[str]:
        """What of the template itself makes a model that differs from what is expected; a line each."""
        tokenizer, lines, start = self.tokenizer, [], self.apply([QUESTION])[:40]
        own, bos = tokenizer.chat_template, tokenizer.bos_token
        if self.name != "tokenizer" and isinstance(own, str) and own.strip() != self.jinja.strip():
            lines.append("differs from the tokenizer's own, which users of the model may expect")
        if bos and tokenizer.encode("a")[0] == tokenizer.bos_token_id and not start.startswith(bos):
            lines.append(f"begins with {start!r}, without {bos}, which the tokenizer puts in front of other texts")
        closing = tokenizer.tokenize(self.closing)
        if len(closing) > 1 and tokenizer.convert_tokens_to_ids(closing[-1]) not in self.end_ids():
            lines.append(f"ends answers with {closing}, several ordinary tokens, where generation does not stop")
        return [f"warning: chat template {self.name!r} {line}" for line in lines]

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Inside, Python raises TimeoutError after RENDER_SECONDS (in the main thread), and MemoryError where
        RENDER_BYTES more than now would be mapped: a template is a program of the user's, and may never end."""

        def stop(*_):
            raise TimeoutError

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = [mapped + RENDER_BYTES, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
        has_alarm = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGALRM, stop) if has_alarm else None
        try:
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
            if has_alarm:
                signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS, 1)  # again, where one is swallowed
            yield
        finally:
            if has_alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _frame(self, variables: dict) -> Frame:
        """What is printed around an answer, with these variables of the template."""
        key = json.dumps(variables, sort_keys=True, default=str)
        if key not in self._frames:
            eos = self.tokenizer.eos_token
            answered = self.apply([QUESTION, MARKED_ANSWER], **variables)
            asked = self.apply([QUESTION], **variables)
            prompted = self.apply([QUESTION], add_generation_prompt=True, **variables)
            if answered.count(MARKER) != 1:
                raise Dropped("it does not show the assistant's content exactly once")
            before, tail = answered.split(MARKER)
            try:
                middle, _, after = self.apply([QUESTION, MARKED_ANSWER, QUESTION, ANSWER], **variables).partition(
                    MARKER
                )
            except Dropped:
                middle, after = before, tail
            if not prompted.startswith(asked):
                asked = asked.removesuffix(eos)  # of templates that end every text with it
            closing = tail.rstrip()
            before_eos = closing.removesuffix(eos)
            if before_eos.strip() and after.startswith(before_eos) and not after.startswith(closing):
                closing = before_eos.rstrip()  # an EOS that earlier answers do not have
            prompt = prompted.removeprefix(asked) if prompted.startswith(asked) else None
            if prompt == "" and before.rstrip() != asked.rstrip():
                prompt = None
            headers = [header.removeprefix(asked) for header in (middle, before) if header.startswith(asked)]
            headers = [header for header in headers if header.strip()]
            self._frames[key] = Frame(prompt, headers, closing, tail[len(closing) :])
        return self._frames[key]

    def _renders_tools(self) -> bool:
        """Whether tools change the text at all. A template that refuses the example counts: its rows will say so."""
        tool = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
        try:
            return self.apply([QUESTION], tools=[{"type": "function", "function": tool}]) != self.apply([QUESTION])
        except Dropped:
            return True

    def _with_arguments(self, message: dict) -> dict:
        """The message, with the arguments of its calls as the template wants them. Raises Dropped for a text that is no
        JSON object where it wants an object."""
        if not message.get("tool_calls"):
            return message
        if self._arguments_as is None:
            self._arguments_as = self._form_of_arguments()
        calls = []
        for call in message["tool_calls"]:
            function = call.get("function") or call
            arguments = function.get("arguments")
            if self._arguments_as == "object" and isinstance(arguments, str):
                with suppress(ValueError):
                    arguments = json.loads(arguments)
                if not isinstance(arguments, dict):
                    raise Dropped("tool calls whose arguments are no JSON object")
            elif self._arguments_as == "text" and isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {**function, "arguments": arguments} if "arguments" in function else function
            calls.append({**call, "function": function} if call.get("function") else function)
        return {**message, "tool_calls": calls}

    def _form_of_arguments(self) -> str:
        """As what the template shows a call's arguments well: "object", "text", or "either"."""

        def shown(arguments) -> str:
            """The text, if the arguments are in it; "" if they are not."""
            function = {"name": "look", "arguments": arguments}
            call = {"id": "call00000", "type": "function", "function": function}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            result = {"role": "tool", "name": "look", "tool_call_id": "call00000", "content": "seen"}
            for messages in ([QUESTION, calling], [QUESTION, calling, result, ANSWER]):
                try:
                    text = self.apply(messages)
                except Dropped:
                    continue
                return text if "value0" in text else ""
            return ""

        as_object, as_text = shown({"key0": "value0"}), shown('{"key0": "value0"}')
        if not as_object or "{'key0'" in as_object:  # as Python writes it
            return "text" if as_text else "either"
        return "object" if not as_text or '\\"key0' in as_text else "either"  # a text within a text

    def _marked(self, messages: list[dict], text: str, options: dict) -> Marked | None:
        """The conversation with marks in all that its messages show, or in what the assistant's show; None where both
        change the text."""
        for roles, has_blank in ((None, True), (("assistant",), False)):
            leaves, copies, count = [], [], 0
            for message in messages:
                marking = _Marking(count, has_blank)
                copies.append(marking.message(message) if roles is None or message["role"] in roles else message)
                leaves.append(marking.leaves)
                count += len(marking.leaves)
            try:
                unmarked, marks = _without_marks(self.apply(copies, **options))
            except Dropped:  # for a content with a mark in it
                continue
            if unmarked == text:
                return Marked(copies, leaves, marks)
        return None

    def _unmarked_span(self, messages: list[dict], i: int, text: str, frame: Frame, options: dict) -> tuple[int, int]:
        """Step 3 of the module's docstring."""
        end = self.apply(messages[: i + 1], **options).removesuffix(frame.after_last)
        begin = self.apply(messages[:i], add_generation_prompt=True, **options) if i else ""
        calls = [call.get("function") or call for call in messages[i].get("tool_calls") or ()]
        has_calls = all(call.get("name") in text[len(begin) : len(end)] for call in calls)
        if not (
            i and text.startswith(begin) and text.startswith(end) and begin.endswith(frame.prompt or "") and has_calls
        ):
            raise Dropped("where an assistant's turn lies in the template's text cannot be told")
        return len(begin), len(end)


class _Marking:
    """Puts marks into one message. leaves: (number, kind) of each text that is marked, numbered from `first` on."""

    def __init__(self, first: int, has_blank: bool):
        self.first, self.has_blank = first, has_blank
        self.leaves: list[tuple[int, str]] = []

    def message(self, message: dict) -> dict:
        """A copy with marks in its content, its reasoning, and the names and arguments of its calls."""
        marked, calls = dict(message), message.get("tool_calls")
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str):
                marked[key] = self.text(message[key], "reasoning")
        if isinstance(message.get("content"), str):
            pieces = re.split("(</?think>)", message["content"])
            for k in range(0, len(pieces), 2):
                is_thought = pieces[k + 1 : k + 2] == ["</think>"]
                is_last = k == len(pieces) - 1 and self.has_blank and not calls
                pieces[k] = self.text(pieces[k], "reasoning" if is_thought else "content", even_blank=is_last)
            marked["content"] = "".join(pieces)
        if calls:
            marked["tool_calls"] = [
                {**call, "function": self._function(call["function"])} if call.get("function") else self._function(call)
                for call in calls
            ]
        return marked

    def text(self, text: str, kind: str, even_blank: bool = False) -> str:
        """The text with marks inside its outer white space, which templates strip."""
        content = text.strip()
        if not content and not even_blank:
            return text
        before, _, after = text.partition(content) if content else (text, "", "")
        number = self.first + len(self.leaves)
        self.leaves.append((number, kind))
        return f"{before}{BEGIN}{number}{STOP}{content}{END}{number}{STOP}{after}"

    def _function(self, function: dict) -> dict:
        return {k: self._values(v) if k in ("name", "arguments") else v for k, v in function.items()}

    def _values(self, value):
        """Marks each text in a JSON value, and each key."""
        if isinstance(value, dict):
            return {self.text(key, "call"): self._values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(item) for item in value]
        return self.text(value, "call") if isinstance(value, str) else value


def _without_marks(marked: str) -> tuple[str, list[Mark]]:
    """The text without its marks, and where they were."""
    pieces, marks, position = MARK.split(marked), [], 0
    for piece, sign, number in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
        position += len(piece)
        marks.append(Mark(position, int(number), sign == BEGIN))
    return "".join(pieces[::3]), marks


class _Places:
    """Where the turns of one conversation lie in its text. notes: what the template does not show of them."""

    def __init__(self, template: ChatTemplate, frame: Frame, text: str, options: dict, marked: Marked | None):
        self.template, self.frame, self.text, self.options = template, frame, text, options
        self.notes: list[str] = []
        self.messages, self.leaves, self.marks = marked or Marked([], [], [])
        self.headers = [header for header in (frame.prompt, *frame.headers) if header and header.strip()]
        message_of = {leaf: i for i, leaves in enumerate(self.leaves) for leaf, _ in leaves}
        self.runs: dict[int, tuple[int, int]] = {}  # message -> its first and last mark, before what is shown again
        self.met: set[tuple[int, bool]] = set()
        for k, mark in enumerate(self.marks):
            i = message_of[mark.leaf]
            first, last = self.runs.get(i, (k, k))
            if mark[1:] not in self.met and last >= k - 1:
                self.runs[i] = first, k
            self.met.add(mark[1:])

    def spans(self, i: int, message: dict) -> list[tuple[int, int]]:
        """What is trained of assistant message i; nothing where the template does not show it. Raises Dropped."""
        shown: dict[str, list[bool]] = {"call": [], "reasoning": [], "content": []}
        for leaf, kind in self.leaves[i]:
            shown[kind].append({(leaf, True), (leaf, False)} <= self.met)
        example = one_line({key: message[key] for key in message if key != "role"})[:100]
        if not all(shown["call"]):
            self.notes.append(f"tool calls that the template does not show (turn not trained): {example}")
            return []
        if i not in self.runs:
            self.notes.append(f"assistant turns that the template does not show: {example}")
            return []
        if shown["reasoning"] and not any(shown["reasoning"]):
            self.notes.append(f"reasoning that the template leaves out: {example}")
        if not all(shown["content"]):
            self.notes.append(f"content that the template leaves out: {example}")
        first, last = self.runs[i]
        spans, start = [], self._start(i, first)
        for k in range(first, last):  # an end and another beginning between two marks of the message
            gap, end = self.text[self.marks[k].position : self.marks[k + 1].position], -1
            if not self.marks[k].is_begin and self.frame.closing:
                end = gap.find(self.frame.closing)
            begins = [
                gap.find(header, end) + len(header) for header in self.headers if end >= 0 and header in gap[end:]
            ]
            if begins:
                spans.append((start, self.marks[k].position + end + len(self.frame.closing)))
                start = self.marks[k].position + begins[0]
        return [*spans, (start, self._end(i, last))]

    def _start(self, i: int, first: int) -> int:
        """Where the turn begins whose first mark is number `first`."""
        begin = self.marks[first - 1].position if first else 0
        before = self.text[begin : self.marks[first].position]
        # What precedes a BEGIN is the template's own: a header is the last there. Else some of the content precedes.
        find = before.rfind if self.marks[first].is_begin else before.find
        prompt = self.frame.prompt
        if prompt and prompt.strip() and prompt in before:
            return begin + find(prompt) + len(prompt)
        if i > 0 and prompt is not None:
            tail = self._tail(i, first - 1, before, add_generation_prompt=True)
            if tail is not None and before.startswith(tail):
                return begin + len(tail)
        example = f"the prompt ends in {(prompt or '')[-40:]!r}, the answer follows {before[-40:]!r}"
        self.notes.append(f"answers that do not follow the generation prompt: {example}")
        for header in self.headers:
            if header in before:
                return begin + find(header) + len(header)
        if not self.marks[first].is_begin:
            raise Dropped("where an assistant's turn begins in the template's text cannot be told")
        return self.marks[first].position

    def _end(self, i: int, last: int) -> int:
        """Where the turn ends whose last mark is number `last`."""
        end = self.marks[last].position
        after = self.text[end : self.marks[last + 1].position if last + 1 < len(self.marks) else None]
        closing = self.frame.closing
        if not self.marks[last].is_begin:
            if closing and closing in after:
                return end + after.index(closing) + len(closing)
            tail = self._tail(i + 1, last, after)
            if tail is not None:
                tail = tail.rstrip() or tail.removesuffix(self.frame.after_last)
                if after.startswith(tail) and (tail.strip() or not closing):
                    return end + len(tail)
            if special := self.template.special.search(after):
                return end + special.end()
        raise Dropped("where an assistant's turn ends in the template's text cannot be told")

    def _tail(self, num_messages: int, k: int, region: str, add_generation_prompt: bool = False) -> str | None:
        """What the first messages render to after mark k, if that is their last one. Rendered once for each
        region, which is the text after that mark in the whole conversation."""
        key = add_generation_prompt, region, json.dumps(self.options, sort_keys=True, default=str)
        tails = self.template.tails
        if key not in tails:
            if len(tails) > 1000:
                tails.clear()
            try:
                text, marks = _without_marks(
                    self.template.apply(self.messages[:num_messages], add_generation_prompt, **self.options)
                )
                ends_there = (marks[-1][1:] if marks else None) == (self.marks[k][1:] if k >= 0 else None)
                tails[key] = text[marks[-1].position if marks else 0 :] if ends_there else None
            except Dropped:
                tails[key] = None
        return tails[key]


def resolve_template(name_or_path: str, tokenizer) -> ChatTemplate:
    """`tulu`, `tokenizer` (the tokenizer's own), `auto` (its own where it has one, else tulu), or the path of a .jinja
    file. Raises UserError."""
    if name_or_path == "auto":
        name_or_path = "tokenizer" if tokenizer.chat_template else "tulu"
    with as_user_error(f"chat_template {name_or_path!r} is not tulu, nor a tokenizer's only one, nor a .jinja file"):
        if name_or_path == "tokenizer":
            jinja = tokenizer.get_chat_template()
        else:
            jinja = TULU if name_or_path == "tulu" else Path(name_or_path).read_text(encoding="utf-8-sig")
    return ChatTemplate(name_or_path, jinja, tokenizer)
