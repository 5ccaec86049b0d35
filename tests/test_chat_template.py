"""What each template renders and which characters of it are trained.   pytest tests/test_chat_template.py"""

import json
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from models import refused
from tiny_tokenizer import ANSWER, USER

from common.data import limits
from common.data.chat_template import TULU, resolve_template
from common.data.conversations import Conversation, Dropped
from common.failures import UserError

TOKENIZER = tiny_tokenizer.tiny_tokenizer()


def template_of(tmp_path_factory, jinja: str):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(jinja)
    return resolve_template(str(file), TOKENIZER)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    names = (REFERENCES | GRAMMARS).keys() - {"TULU"}
    own = {name: template_of(tmp_path_factory, getattr(tiny_tokenizer, name)) for name in names}
    return {"TULU": resolve_template("tulu", TOKENIZER), **own}


def rendered(template, messages, only_last=False, trained=None, **more):
    return template.render(Conversation(messages, trained or [True] * len(messages), **more), only_last)


def trained(template, messages, **more) -> list[str]:
    text, spans, _ = rendered(template, messages, **more)
    return [text[start:end] for start, end in spans]


# --- independent references: each template written as the pieces (text, is trained) that its turns consist of
def tulu(messages):
    for i, message in enumerate(messages):
        role, content, end = message["role"], message["content"], "\n" if i < len(messages) - 1 else ""
        if role in ("system", "user"):
            yield f"<|{role}|>\n{content}\n", False
        elif role == "assistant":
            yield from (("<|assistant|>\n", False), (content + "<eos>", True), (end, False))


def chatml(messages):
    return elements(messages, None)


def llama3(messages):
    yield "<bos>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


def prompting(messages):
    yield from llama3(messages)
    yield "<|start_header_id|>assistant<|end_header_id|>\n\n", False


def mistral(messages):
    yield "<bos>", False
    for message in messages:
        user = message["role"] == "user"
        yield f"[INST] {message['content']} [/INST]" if user else f" {message['content']}<eos>", not user


def plain(messages, header="### {}:\n", after_answer="<eos>", after_others=""):
    for message in messages:
        is_answer = message["role"] == "assistant"
        yield header.format(message["role"]), False
        yield message["content"] + (after_answer if is_answer else after_others), is_answer
        yield "\n", False


def phi3(messages):
    yield from plain(messages, "<|{}|>\n", "<|end|>", "<|end|>")
    yield "<eos>", False


FUNCTIONS = (tulu, chatml, llama3, prompting, mistral, plain, phi3)
REFERENCES = {function.__name__.upper(): function for function in FUNCTIONS}


def laid_out(pieces) -> tuple[str, list[tuple[int, int]]]:
    """The text of (text, is trained) pieces, and where those that are trained lie in it, next to one another as one."""
    text, spans = "", []
    for piece, is_trained in pieces:
        if is_trained and piece:
            start = spans.pop()[0] if spans and spans[-1][1] == len(text) else len(text)
            spans.append((start, len(text) + len(piece)))
        text += piece
    return text, spans


SNIPPETS = ["so.", "why?", "\n", "\n\n", " ", "\t", "<|assistant|>\n", "<eos>", "ü漢🙂", "42", "</think>", "<think>"]
SNIPPETS += ["### user:", "<|im_end|>\n", "{{ eos_token }}", "[/INST]", "'ll"]
CONTENTS = st.lists(st.sampled_from(SNIPPETS), max_size=5).map("".join)
ROLES = ("system", "user", "assistant", "tool")


@st.composite
def conversations(draw):
    message = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(ROLES), CONTENTS)
    messages = draw(st.lists(message, min_size=1, max_size=6))
    if len(messages) > 2 and draw(st.booleans()):  # somebody quotes somebody else word for word
        i, j = draw(st.integers(0, len(messages) - 1)), draw(st.integers(0, len(messages) - 1))
        messages[i]["content"] = messages[j]["content"]
    return messages


CLOSINGS = {"TULU": "<eos>", "CHATML": "<|im_end|>", "LLAMA3": "<|eot_id|>", "PROMPTING": "<|eot_id|>"}
CLOSINGS |= {"MISTRAL": "<eos>", "PHI3": "<|end|>"}  # the last is several tokens


@pytest.mark.parametrize("name", CLOSINGS)
def test_what_closes_an_answer_ends_generation_where_it_is_one_token(templates, name):
    assert templates[name].closing == CLOSINGS[name]
    ends = {"<eos>"} if name == "PHI3" else {"<eos>", CLOSINGS[name]}
    assert templates[name].end_ids() == sorted(TOKENIZER.convert_tokens_to_ids([*ends]))


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=50)
@given(messages=conversations())
@example([{"role": "system", "content": ""}, {"role": "assistant", "content": "<think></think>\n"}])
def test_trained_text_is_every_assistant_content_and_what_closes_it(templates, name, messages):
    if name == "MISTRAL":
        for i, message in enumerate(messages):
            message["role"] = "assistant" if i % 2 else "user"
    is_trained = [message["content"].replace("</think>", "").strip() != "" for message in messages]
    text, spans, _ = rendered(templates[name], messages, trained=is_trained)
    expected, turns = laid_out(REFERENCES[name](messages))
    answers = [shown for shown, message in zip(is_trained, messages, strict=True) if message["role"] == "assistant"]
    assert (text, spans) == (expected, [span for span, shown in zip(turns, answers, strict=True) if shown])
    assert text == TOKENIZER.apply_chat_template(messages, chat_template=templates[name].jinja, tokenize=False)
    last = rendered(templates[name], messages, only_last=True, trained=is_trained)
    assert last[:2] == (text, spans[-1:] if answers[-1:] == [True] else [])


# --- tools and reasoning: each template's grammar, as (text, is trained), for conversations as a row gives them
def parts(message):
    """Reasoning and answer of an assistant's message, by the text of its content where there is no key."""
    content = message.get("content") or ""
    thought, closing, answer = content.rpartition("</think>")
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    return (thought.split("<think>")[-1], answer) if closing else ("", content)


def arguments_of(call):
    arguments = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def dumped(value):
    return json.dumps(value, ensure_ascii=False)


def calls(messages, tools):
    if tools:
        yield "<|im_start|>system\n" + "".join(dumped(tool) + "\n" for tool in tools) + "<|im_end|>\n", False
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", False
        if message["role"] != "assistant":
            yield message["content"] + "<|im_end|>\n", False
            continue
        reasoning, answer = parts(message)
        thought_in_content = "</think>" in (message.get("content") or "") and not message.get("reasoning_content")
        turn = answer.lstrip("\n") if thought_in_content else answer
        texts = [
            f'<call>{{"name": "{call["function"]["name"]}", "arguments": '
            + (a if isinstance(a := call["function"]["arguments"], str) else dumped(a))
            + "}</call>"
            for call in message.get("tool_calls", [])
        ]
        turn = "\n".join([turn, *texts]) if turn else "\n".join(texts)
        if i > last_user and (i == len(messages) - 1 or reasoning.strip("\n")):
            turn = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + turn
        yield turn + "<|im_end|>", True
        yield "\n", False


def brackets(messages, tools):
    yield "<bos>", False
    users = [message for message in messages if message["role"] == "user"]
    for message in messages:
        if message["role"] == "user":
            yield ("[TOOLS]" + dumped(tools) + "[/TOOLS]" if tools and message == users[-1] else ""), False
            yield f"[INST] {message['content']}[/INST]", False
        elif message["role"] == "tool":
            yield f"[RESULT]{message['content']}{message['tool_call_id']}[/RESULT]", False
        elif message.get("tool_calls"):
            functions = [{**call["function"], "arguments": arguments_of(call)} for call in message["tool_calls"]]
            ids = [call["id"] for call in message["tool_calls"]]
            texts = [dumped(f)[:-1] + f', "id": "{i}"}}' for f, i in zip(functions, ids, strict=True)]
            yield f"[CALLS] [{', '.join(texts)}]<eos>", True
        else:
            yield message["content"] + "<eos>", True


def blocks(messages, tools):
    yield "<bos>", False
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield ("<|Assistant|>" if i > 0 and messages[i - 1]["role"] != "tool" else ""), False
            yield (message.get("content") or "").split("</think>")[-1], True
            for call in message.get("tool_calls", []):
                arguments = call["function"]["arguments"]
                text = arguments if isinstance(arguments, str) else dumped(arguments)
                yield f"<call>{call['function']['name']}\n{text}</call>", True
            yield "<eos>", True
        else:
            tags = ("<result>", "</result>") if message["role"] == "tool" else ("<|User|>", "")
            yield tags[0] + message["content"] + tags[1], False


def channels(messages, tools):
    name = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("tool_calls"):
            call, reasoning = message["tool_calls"][0], message.get("reasoning_content")
            name = call["function"]["name"]
            yield "<|im_start|>assistant", False
            yield f" thinks<|im_end|>{reasoning}<|stop|><|im_start|>assistant" if reasoning else "", True
            yield f" to={name}<|im_end|>{dumped(arguments_of(call))}<|call|>", True
        elif message["role"] == "assistant":
            yield "<|im_start|>assistant", False
            yield f" says<|im_end|>{message['content']}{'<eos>' if i == len(messages) - 1 else '<|stop|>'}", True
        else:
            is_result = message["role"] == "tool"
            header = message["tool_call_id"] + name + " to=assistant" if is_result else message["role"]
            content = dumped(message["content"]) if is_result else message["content"]
            yield f"<|im_start|>{header}<|im_end|>{content}<|stop|>", False


def elements(messages, tools):
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        turn = message.get("content") or ""
        for call in message.get("tool_calls", []):
            arguments = sorted(arguments_of(call).items(), key=lambda item: item[0].lower())
            inner = "".join(f"<{key}>{json.dumps(value)}</{key}>" for key, value in arguments)
            turn += f"<call {call['function']['name']} {call['function']['name']}>{inner}</call>"
        yield turn + "<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def turns(messages, tools):
    results = "["  # what a result follows
    yield "<bos>", False
    for before, message, after in zip([None, *messages], messages, [*messages[1:], {"role": ""}], strict=False):
        if message["role"] == "tool":
            yield results + message["content"], False
            results = ", "
        elif message["role"] == "user":
            yield "<|user|>" + message["content"], False
        else:
            yield ("<|im_start|>" if before is None or before["role"] == "user" else ""), False
            if message.get("content"):
                yield ("]" if results == ", " else ""), False
                results = "["
            yield message.get("content") or "", True
            for call in message.get("tool_calls", []):
                arguments = call["function"]["arguments"]
                text = arguments if isinstance(arguments, str) else dumped(arguments)
                yield f"<|call|>{call['function']['name']}{text}<|im_end|>", True
            yield ("<|stop|>" if after["role"] == "user" else ""), True
    yield ("]" if results == ", " else ""), False


GRAMMARS = {function.__name__.upper(): function for function in (calls, brackets, blocks, channels, elements, turns)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | CONTENTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(CONTENTS, inner, max_size=2),
    max_leaves=3,
)
TEXTS = st.lists(st.sampled_from([*SNIPPETS[:10], "<eos>", "x", "<|im_end|>\n", "<call>"]), max_size=4).map("".join)
TEXTS = TEXTS.filter(lambda text: text.strip() and "think>" not in text)


@st.composite
def tool_conversations(draw, most_calls=2):
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        for number in range(draw(st.integers(0, 2))):
            made = []
            for _ in range(draw(st.integers(1, most_calls))):
                arguments = draw(st.dictionaries(st.sampled_from(["city", "n", "<eos>"]), JSON, max_size=2))
                arguments = arguments if draw(st.booleans()) else dumped(arguments)
                function = {"name": f"tool{draw(st.integers(0, 2))}", "arguments": arguments}
                made.append({"type": "function", "id": f"call{number}", "function": function})
            content = draw(st.sampled_from([{}, {"content": None}, {"content": ""}, {"content": draw(TEXTS)}]))
            reasoning = draw(st.sampled_from([{}, {"reasoning_content": draw(TEXTS).strip()}]))
            messages.append({"role": "assistant", **content, **reasoning, "tool_calls": made})
            messages += [{"role": "tool", "content": draw(CONTENTS), "tool_call_id": call["id"]} for call in made]
        thought = draw(st.sampled_from(["", f"<think>\n{draw(TEXTS)}\n</think>\n\n"]))
        messages.append({"role": "assistant", "content": thought + draw(TEXTS)})
    return messages[: len(messages) - draw(st.integers(0, 1))]


TOOL = {"type": "function", "function": {"name": "tool0", "description": "<eos>", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", GRAMMARS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_calls_and_reasoning_are_trained_as_the_template_shows_them(templates, name, data):
    messages = data.draw(tool_conversations(1 if name == "CHANNELS" else 2))
    tools, is_trained = data.draw(st.sampled_from([None, [TOOL]])), data.draw(st.lists(st.booleans(), min_size=9))
    is_trained = [message["role"] == "assistant" and is_trained[i % 9] for i, message in enumerate(messages)]
    text, spans, _ = rendered(templates[name], messages, tools=tools, trained=is_trained)
    all_spans = rendered(templates[name], messages, tools=tools).spans
    assert (text, all_spans) == laid_out(GRAMMARS[name](messages, tools))
    answers = [shown for shown, message in zip(is_trained, messages, strict=True) if message["role"] == "assistant"]
    assert spans == [span for span, shown in zip(all_spans, answers, strict=True) if shown]


# Each turn is rendered differently once another follows, and what one says also appears in the first line.
CHANGING = """\
{%- if messages|length > 2 %}{{ messages[1].content|length }}{% endif %}
{%- for message in messages %}{{- '<' + message.role + '>' + message.content + eos_token }}
{%- if not loop.last %}{{ messages|length }}{% endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}"""
REFUSING = "{% if messages|length == 4 and messages[1].content != 'so.' %}{{ raise_exception('so!') }}{% endif %}"


@pytest.mark.parametrize("jinja", [tiny_tokenizer.CHATML + REFUSING, CHANGING])
def test_a_row_whose_text_changes_with_any_mark_or_turn_is_dropped(tmp_path_factory, jinja):
    template = template_of(tmp_path_factory, jinja)
    with pytest.raises(Dropped, match="cannot be told"):
        rendered(template, [USER, ANSWER, USER, ANSWER])
    assert [text[:3] for text in trained(template, [USER, ANSWER])] == ["so."]


@pytest.mark.parametrize("content", ["<r>seen</r>", ""])
def test_a_template_that_looks_at_what_others_say_still_serves(tmp_path_factory, content):
    """At how it begins, or whether there is any: marks change that, and are left out of it."""
    looking = "{% if messages[0].content.startswith('<r>') or not messages[0].content %}odd{% endif %}"
    template = template_of(tmp_path_factory, looking + tiny_tokenizer.CHATML)
    text, spans, _ = rendered(template, [{**USER, "content": content}, ANSWER])
    assert text.startswith("odd") and [text[start:end] for start, end in spans] == ["so.<|im_end|>"]


def test_what_the_template_does_not_show_is_counted_and_a_call_never_becomes_an_empty_answer(templates):
    call = {"type": "function", "id": "call0", "function": {"name": "look", "arguments": {"n": 1}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages, tools = [USER, calling, {"role": "tool", "content": "seen", "tool_call_id": "call0"}, ANSWER], [TOOL]
    text, spans, notes = rendered(templates["TULU"], messages, tools=tools)
    assert [text[start:end] for start, end in spans] == ["so.<eos>"]
    assert sorted(note.split(" that")[0] for note in notes) == ["tool calls", "tools"]
    assert rendered(templates["TULU"], messages[:2], only_last=True).spans == []
    both = [calling | {"tool_calls": [call, call]}]
    assert rendered(templates["CHANNELS"], [USER, *both]).spans == []  # it shows the first call alone
    assert rendered(templates["CALLS"], messages, tools=tools).notes == []


@pytest.mark.parametrize("rest", [[], [USER, ANSWER]])
def test_an_answer_of_reasoning_alone_that_is_left_out_is_no_empty_answer(templates, rest):
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n"}, *rest]
    assert trained(templates["BLOCKS"], messages) == ["so.<eos>"] * bool(rest)
    notes = rendered(templates["BLOCKS"], messages).notes
    assert any("shows nothing" in note for note in notes)
    assert trained(templates["CALLS"], [USER, messages[1]]) == ["<think>\nhm\n</think>\n\n<|im_end|>"]


@pytest.mark.parametrize("name", ["messages", "conversation", "tools", "tokenize", "chat_template", "padding"])
def test_what_transformers_takes_otherwise_is_no_variable_of_a_template(templates, name):
    with pytest.raises(Dropped, match=f"'{name}'"):
        rendered(templates["CHATML"], [USER, ANSWER], variables={name: [{}]})


@pytest.mark.parametrize("closing", ["<|im_end|>", "/"])
def test_a_turn_that_is_shown_in_parts_is_noted(tmp_path_factory, closing):
    """Gemma 4 prints a call, its result, and only then the content beside the call."""
    result = "(messages[2].content if messages|length > 2 else '')"
    shown = f"(message.tool_calls[0].function.name + '{closing}' + {result} if message.tool_calls else '')"
    jinja = tiny_tokenizer.CHATML.replace("message['content']", f"{shown} + message['content']")
    jinja = jinja.replace("in messages %}", "in messages if message.role != 'tool' %}")
    template = template_of(tmp_path_factory, jinja)
    calling = {**ANSWER, "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    text, spans, [note] = rendered(template, [USER, calling, {"role": "tool", "content": "seen"}])
    assert [text[start:end] for start, end in spans] == ["look" + closing] and "in parts" in note
    assert template.shows_role("tool")


def test_the_header_of_an_answer_with_other_reasoning_than_the_prompts_is_not_trained(tmp_path_factory):
    thought = "('<think>' + (message.reasoning_content or '') + '</think>' if message.role == 'assistant' else '')"
    jinja = tiny_tokenizer.CHATML.replace("message['content']", f"{thought} + message['content']")
    template = template_of(tmp_path_factory, jinja.replace("assistant\\n' }}{%", "assistant\\n<think></think>' }}{%"))
    messages = [USER, ANSWER, USER, {**ANSWER, "reasoning_content": "hm"}]
    assert trained(template, messages) == ["so.<|im_end|>", "<think>hm</think>so.<|im_end|>"]


@pytest.mark.parametrize("earlier, last", [(1, 0), (0, 1), (2, 1)])
def test_reasoning_that_is_left_out_is_counted_and_only_that(templates, earlier, last):
    thinking = [{"role": "assistant", "content": "<think>hm</think>so."}, {**ANSWER, "reasoning_content": "hm"}]
    messages = [message for i in range(earlier) for message in (USER, thinking[i % 2])]
    messages += [USER, thinking[0] if last else ANSWER]
    assert rendered(templates["CALLS"], messages).notes == ["reasoning that the template leaves out"] * earlier
    left_out = [note for note in rendered(templates["BLOCKS"], messages).notes if note.startswith("reasoning")]
    assert len(left_out) == earlier + last


def test_a_prompt_that_no_trained_answer_follows_is_noted_with_both(templates, tmp_path_factory):
    [note] = rendered(templates["BLOCKS"], [USER, ANSWER]).notes
    assert repr("<|Assistant|>") in note and repr("<|Assistant|><think>\n") in note
    lines = template_of(tmp_path_factory, tiny_tokenizer.CHATML.replace("assistant\\n' }}{%", "assistant\\n\\n' }}{%"))
    [note] = rendered(lines, [USER, ANSWER]).notes
    assert repr("<|im_start|>assistant\n\n") in note and repr("<|im_start|>assistant\n") in note


def test_a_templates_variables_reach_it_and_its_prompt(templates):
    quiet = rendered(templates["CALLS"], [USER, ANSWER], variables={"enable_thinking": False})
    assert [quiet.text[start:end] for start, end in quiet.spans] == ["so.<|im_end|>"] and quiet.notes == []
    assert trained(templates["CALLS"], [USER, ANSWER]) == ["<think>\n\n</think>\n\nso.<|im_end|>"]


@pytest.mark.parametrize("name", GRAMMARS)
def test_rendering_is_linear_in_the_turns(tmp_path_factory, monkeypatch, name):
    """The number of renderings does not depend on the turns, which all hold other numbers and names."""

    def renderings(turns: int) -> int:
        messages, counted = [], []
        for i in range(turns):
            function = {"name": f"look{i}", "arguments": {"n": i, "x": -i}}
            call = {"type": "function", "id": f"call{i}", "function": function}
            messages += [{**USER, "content": f"why {i}?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            messages += [{"role": "tool", "content": f"{i}", "tool_call_id": f"call{i}"}]
            messages += [{"role": "assistant", "content": f"<think>{i}</think>so {i}."}]
        template = template_of(tmp_path_factory, getattr(tiny_tokenizer, name))
        apply = template.apply
        monkeypatch.setattr(template, "apply", lambda *args, **options: counted.append(1) or apply(*args, **options))
        assert len(rendered(template, messages).spans) == 2 * turns
        return len(counted)

    assert renderings(30) == renderings(10) <= 10


ENDLESS = [
    "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{% for i in range(10 ** 5) %}{{ message ~ 'x' * 10 ** 5 }}{% endfor %}",
    "{{ 'x'.center(10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ (range(99999)|list) * 10 ** 6 }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = [ns.x|join, ns.x|join] %}{% endfor %}",
]
# A single step of Python, which nothing could end.
LARGE = [
    "{{ 9 ** (9 ** 9) }}",
    "{{ 1|round(10 ** 9, 'ceil') }}",
    "{{ 10|round(-(10 ** 9)) }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ ('f' * 10 ** 8)|int(base=16) % ('e' * 10 ** 7)|int(base=16) }}",
]


def test_what_is_bounded_computes_as_before():
    env = ImmutableSandboxedEnvironment()
    text = "{{ 1 ** 5000 }} {{ 2 ** 9 % 7 }} {{ 3.75|round(1, 'floor') }} {{ 3.7|round(none) }} {{ 'ab' * 2 }}"
    assert env.from_string(text).render() == "1 1 3.7 4 abab"


@pytest.mark.parametrize("jinja", [*ENDLESS, *LARGE, "{% for i in range(10 ** 12) %}{% endfor %}"])
def test_a_template_that_never_ends_or_takes_all_memory_is_ended(tmp_path_factory, monkeypatch, jinja):
    monkeypatch.setattr(limits, "RENDER_SECONDS", 0.3)
    monkeypatch.setattr(limits, "RENDER_BYTES", 2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(r"chat\.jinja"):
        template_of(tmp_path_factory, jinja + tiny_tokenizer.CHATML)
    row = tiny_tokenizer.CHATML + "{% if messages|length > 4 %}" + jinja + "{% endif %}"
    template = template_of(tmp_path_factory, row)
    for where in (lambda f, *words: f(*words), lambda f, *words: ThreadPoolExecutor().submit(f, *words).result()):
        with pytest.raises((UserError, Dropped)):
            where(rendered, template, [USER, ANSWER] * 3)  # a run renders in a thread
    assert trained(template, [USER, ANSWER]) == ["so.<|im_end|>"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**29 / 1024
    assert len(bytearray(2**30)) == 2**30  # nothing is limited any longer


def test_auto_is_the_tokenizers_own_template_or_tulu_and_a_byte_order_mark_is_no_part(tmp_path):
    own = tiny_tokenizer.tiny_tokenizer(chat_template=tiny_tokenizer.CHATML)
    assert resolve_template("auto", own).jinja == tiny_tokenizer.CHATML
    assert resolve_template("auto", TOKENIZER).jinja == TULU
    (tmp_path / "chat.jinja").write_text("\ufeff" + tiny_tokenizer.CHATML)
    assert resolve_template(str(tmp_path / "chat.jinja"), own).digest == resolve_template("tokenizer", own).digest


def test_of_two_own_templates_the_one_for_tools_serves_rows_with_tools():
    """As transformers chooses. The one for tools cannot do without."""
    needs_tools = "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}" + tiny_tokenizer.CHATML + "\n"
    own = {"default": "\n" + tiny_tokenizer.LLAMA3, "tool_use": needs_tools}
    tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=own)
    template = resolve_template("auto", tokenizer)
    for tools in (None, [TOOL]):
        expected = tokenizer.apply_chat_template([USER, ANSWER], tools=tools, tokenize=False)
        text, spans, _ = rendered(template, [USER, ANSWER], tools=tools)
        assert text == expected
        assert [text[start:end] for start, end in spans] == ["so.<|im_end|>" if tools else "so.<|eot_id|>"]


def test_roles_that_are_not_shown_are_told(templates):
    assert [templates["TULU"].shows_role(role) for role in ("system", "user", "assistant", "tool")] == [1, 1, 1, 0]
    assert templates["CHATML"].shows_role("tool") and templates["MISTRAL"].shows_role("system")


def test_a_templates_own_refusal_is_told_from_its_failure(templates, tmp_path_factory):
    with pytest.raises(Dropped, match=r"refused by the chat template: .*alternate"):
        rendered(templates["MISTRAL"], [USER, USER])
    division = "{% if messages|length > 2 %}{{ 1 / 0 }}{% endif %}"
    failing = template_of(tmp_path_factory, division + tiny_tokenizer.CHATML)
    with pytest.raises(Dropped, match="ZeroDivisionError"):
        rendered(failing, [USER, ANSWER, USER])


USELESS = [
    ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
    ("{{ messages[0].content }}", "content exactly once"),
    ("hello", "content exactly once"),
    ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "exactly once"),
    ("{{ raise_exception('never') }}", "never"),
    ("{{ messages[9].content }}", "Undefined"),
    ("{{ 1 / 0 }}", "ZeroDiv"),
]


@pytest.mark.parametrize("jinja, said", USELESS)
def test_a_template_that_cannot_serve_is_refused_by_name(tmp_path_factory, jinja, said):
    with refused(said, r"chat\.jinja"):
        template_of(tmp_path_factory, jinja)


def test_a_template_that_is_not_there_or_never_ends_is_refused(tmp_path, endless_file):
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    for name in (endless_file, "tuluu", str(tmp_path), str(tmp_path / "binary.jinja"), "tokenizer"):
        with refused("tulu", re.escape(name)):
            resolve_template(name, TOKENIZER)
