"""Chat templates: what text a conversation becomes, and which characters of it are trained.

One rule for all templates. The text is what transformers renders for the whole conversation. Of it, each assistant
turn is trained from where its generation prompt ends (where there is none, its header) to the end of what closes the
turn: the content and the token that stops generation. Headers are not trained, nor white space after that token.
Where a turn lies is found by rendering, never by searching for its content:

1. A marker for every content shows what the template prints around contents. If that and the contents make up the
   whole text, an assistant's content between the generation prompt and the closing token is a turn. Nearly always
   this is all.
2. Else `messages[:i]` with the generation prompt, and `messages[:i + 1]`, must render to beginnings of the whole
   text: their lengths are where turn i begins and ends (a template that writes more than the content into a turn).
3. Where one of them does not, a marker for content i alone must leave the text before and after it as it is, and
   bounds the content (a template that drops the reasoning of earlier turns; a conversation the assistant opens).
4. Where even that does not hold, the row is refused.
"""

import hashlib
import re
from pathlib import Path

import jinja2

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

MARKER = "\ue0f1\ue0f2"  # stands for a content; private-use characters, unchanged by strip, split or tojson
QUESTION, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
MARKED_ANSWER = {"role": "assistant", "content": MARKER}


class Dropped(Exception):
    """A well-formed row that holds nothing to train on; its text is the reason it is counted under."""


class ChatTemplate:
    """A chat template, with the tokenizer whose special tokens it prints.

    name: as asked for.  jinja: its text.  digest: sha256 of that text.
    closing: what closes an assistant turn, without the white space after it; "" if nothing does. Where the template
    prints EOS once, at the end of the text (Phi-3), closing is what comes before.
    """

    def __init__(self, name: str, jinja: str, tokenizer):
        """Raises UserError if it does not compile, cannot render a question and an answer, or hides the answer."""
        self.name, self.jinja, self.tokenizer = name, jinja, tokenizer
        self.digest = hashlib.sha256(jinja.encode()).hexdigest()
        self._shows_role, self._printed = {"user": True, "assistant": True}, {}
        with as_user_error(f"chat template {name!r} for a question and an answer", Dropped):
            answered = self.apply([QUESTION, MARKED_ANSWER])
            asked, prompted = self.apply([QUESTION]), self.apply([QUESTION], add_generation_prompt=True)
        if answered.count(MARKER) != 1:
            raise UserError(f"chat template {name!r} does not show the assistant's content exactly once")
        header, tail = answered.split(MARKER)
        if not prompted.startswith(asked):
            asked = asked.removesuffix(tokenizer.eos_token)  # of templates that end every text with it
        self.closing = self._tail_of_every_answer(tail, tokenizer.eos_token).rstrip()
        self._after_last = tail[len(self.closing) :]
        # What opens an answer; None where a header does that is printed only together with the answer.
        self._generation_prompt = prompted[len(asked) :] if prompted.startswith(asked) else None
        if prompted == asked and header.rstrip() != asked.rstrip():
            self._generation_prompt = None

    def _tail_of_every_answer(self, tail: str, eos: str) -> str:
        """What follows the last answer, without an EOS that earlier ones do not have."""
        before_eos = tail.rstrip().removesuffix(eos)
        if not before_eos.strip() or before_eos == tail.rstrip():
            return tail
        try:
            after = self.apply([QUESTION, MARKED_ANSWER, QUESTION, ANSWER]).partition(MARKER)[2]
        except (Dropped, UserError):
            return tail
        return before_eos if after.startswith(before_eos) and not after.startswith(tail.rstrip()) else tail

    def end_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and what closes a turn, if that is one token."""
        closing = self.tokenizer.encode(self.closing, add_special_tokens=False)
        return sorted({self.tokenizer.eos_token_id, *(closing if len(closing) == 1 else ())})

    def apply(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """transformers' own rendering. Raises Dropped where the template itself refuses the conversation, by its
        `raise_exception`; UserError for any other failure: a template is a program of the user's."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # what raise_exception raises
                raise Dropped(f"refused by the chat template: {one_line(error)}") from error
            raise UserError(f"chat template {self.name!r}: {type(error).__name__}: {one_line(error)}") from error

    def render(self, messages: list[dict], only_last: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the [start, end) characters of it that are trained: a span for each assistant
        message, in order; with only_last, the last of them alone. Raises Dropped, or UserError where a turn's place in
        the text cannot be told."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text = self.apply(messages) if messages else ""
        plain = self._plain_spans(messages, text) if turns else {}
        return text, [plain.get(i) or self._span(messages, i, text) for i in turns[-1 if only_last else 0 :]]

    def _plain_spans(self, messages: list[dict], text: str) -> dict[int, tuple[int, int]]:
        """[start, end) of those assistant messages that step 1 of the module's docstring bounds, by their index."""
        printed = self._printed_around(messages)
        numbers, spans, position = list(map(int, printed[1::2])), {}, 0
        printed[1::2] = [messages[i]["content"] for i in numbers]
        if "".join(printed) != text or not self._generation_prompt or not self.closing:
            return {}
        for i, before, content, after in zip(numbers, printed[::2], printed[1::2], printed[2::2], strict=False):
            start = position + len(before)
            position = start + len(content)
            is_whole = before.endswith(self._generation_prompt) and after.startswith(self.closing)
            if messages[i]["role"] == "assistant" and is_whole:
                spans[i] = start, position + len(self.closing)
        return spans

    def _printed_around(self, messages: list[dict]) -> list[str]:
        """What is printed around the contents: [text, index of the message whose content follows, text, ..., text].
        It depends on the contents for no template that step 1 is for, so each order of roles is rendered once."""
        roles = tuple(message["role"] for message in messages) if all(len(m) == 2 for m in messages) else None
        if roles is None or roles not in self._printed:  # None: messages that hold more, rendered every time
            marked = [{**message, "content": f"{MARKER}{i}{MARKER}"} for i, message in enumerate(messages)]
            try:
                self._printed[roles] = re.split(f"{MARKER}([0-9]+){MARKER}", self.apply(marked))
            except (UserError, Dropped):  # for a content that is a marker
                self._printed[roles] = []
        return list(self._printed[roles])

    def _span(self, messages: list[dict], i: int, text: str) -> tuple[int, int]:
        """[start, end) of assistant message i in the text of all messages: steps 2 to 4 of the module's docstring."""
        start = end = None
        if i > 0 and self._generation_prompt is not None:
            prompt = self.apply(messages[:i], add_generation_prompt=True)
            if text.startswith(prompt) and prompt.endswith(self._generation_prompt):
                start = len(prompt)
        until = (text if i == len(messages) - 1 else self.apply(messages[: i + 1])).removesuffix(self._after_last)
        if text.startswith(until):
            end = len(until)
        if start is not None and end is not None:
            return start, end
        marked = self.apply([*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]])
        before, _, after = marked.partition(MARKER)
        content_end = len(text) - len(after)
        exact = marked.count(MARKER) == 1 and text.startswith(before) and text.endswith(after)
        if not exact or len(before) > content_end or (end is None and not after.startswith(self.closing)):
            what = f"chat template {self.name!r}: its text of message {i + 1} (assistant) cannot be told from the rest"
            raise UserError(f"{what}; use another chat_template or leave the row out")
        start = len(before) if start is None else min(start, len(before))
        return start, content_end + len(self.closing) if end is None else end

    def shows_role(self, role: str) -> bool:
        """Whether messages of this role show their content. One that is refused counts: its rows will say so."""
        if role not in self._shows_role:
            message = {"role": role, "content": MARKER}
            try:
                texts = [self.apply([message, QUESTION]), self.apply([QUESTION, ANSWER, message])]
                self._shows_role[role] = any(MARKER in text for text in texts)
            except (UserError, Dropped):
                self._shows_role[role] = True
        return self._shows_role[role]


def resolve_template(name_or_path: str, tokenizer) -> ChatTemplate:
    """`tulu`, `tokenizer` (the tokenizer's own), or the path of a .jinja file. Raises UserError."""
    with as_user_error(f"chat_template {name_or_path!r} is not tulu, nor a tokenizer's only one, nor a .jinja file"):
        if name_or_path == "tokenizer":
            jinja = tokenizer.get_chat_template()
        else:
            jinja = TULU if name_or_path == "tulu" else Path(name_or_path).read_text(encoding="utf-8")
    return ChatTemplate(name_or_path, jinja, tokenizer)
