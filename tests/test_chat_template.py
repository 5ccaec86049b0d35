"""What each template renders and which characters of it are trained.   pytest tests/test_chat_template.py"""

import pytest
import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.chat_template import Dropped, resolve_template
from common.data.conversations import Conversation
from common.failures import UserError

TOKENIZER = tiny_tokenizer.tiny_tokenizer()
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}


def template_of(tmp_path_factory, jinja: str):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(jinja)
    return resolve_template(str(file), TOKENIZER)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    own = {name: template_of(tmp_path_factory, getattr(tiny_tokenizer, name)) for name in REFERENCES if name != "TULU"}
    return {"TULU": resolve_template("tulu", TOKENIZER), **own}


def rendered(template, messages, only_last=False, **more):
    return template.render(Conversation(messages, [True] * len(messages), **more), only_last)


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
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield message["content"] + "<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def llama3(messages):
    yield "<bos>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


def qwen3(messages):
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", False
        if message["role"] != "assistant":
            yield message["content"] + "<|im_end|>\n", False
            continue
        is_last = i > last_user and i == len(messages) - 1
        answer = message["content"].split("</think>")[-1].lstrip("\n") + "<|im_end|>"
        yield ("<think>\n\n</think>\n\n" if is_last else ""), True  # the model has to write it, after its header
        yield answer, True
        yield "\n", False


def mistral(messages):
    yield "<bos>", False
    for message in messages:
        user = message["role"] == "user"
        yield f"[INST] {message['content']} [/INST]" if user else f" {message['content']}<eos>", not user


def plain(messages):
    for message in messages:
        yield f"### {message['role']}:\n", False
        yield message["content"] + ("<eos>" if message["role"] == "assistant" else ""), message["role"] == "assistant"
        yield "\n", False


def phi3(messages):
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "<|end|>", message["role"] == "assistant"
        yield "\n", False
    yield "<eos>", False


REFERENCES = {function.__name__.upper(): function for function in (tulu, chatml, llama3, qwen3, mistral, plain, phi3)}


def reference(name, messages):
    text, spans = "", []
    for piece, trained in REFERENCES[name](messages):
        if trained and piece:
            if spans and spans[-1][1] == len(text) and name == "QWEN3":
                spans[-1] = (spans[-1][0], len(text) + len(piece))
            else:
                spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


SNIPPETS = ["so.", "why?", "\n", "\n\n", " ", "\t", "<|assistant|>\n", "<eos>", "ü漢🙂", "42", "</think>", "<think>"]
SNIPPETS += ["### user:", "<|im_end|>\n", "{{ eos_token }}", "[/INST]", "'ll"]
CONTENTS = st.lists(st.sampled_from(SNIPPETS), max_size=5).map("".join)
ROLES = {"TULU": ("system", "user", "assistant", "tool"), "MISTRAL": ("user", "assistant")}


@st.composite
def conversations(draw, roles):
    messages = [
        {"role": role, "content": draw(CONTENTS)}
        for role in draw(st.lists(st.sampled_from(roles), min_size=1, max_size=6))
    ]
    if len(messages) > 2 and draw(st.booleans()):  # somebody quotes somebody else word for word
        i, j = draw(st.integers(0, len(messages) - 1)), draw(st.integers(0, len(messages) - 1))
        messages[i]["content"] = messages[j]["content"]
    return messages


@pytest.mark.parametrize(
    ("name", "closing", "end_tokens"),
    [
        ("TULU", "<eos>", ["<eos>"]),
        ("CHATML", "<|im_end|>", ["<eos>", "<|im_end|>"]),
        ("LLAMA3", "<|eot_id|>", None),
        ("QWEN3", "<|im_end|>", None),
        ("MISTRAL", "<eos>", None),
        ("PHI3", "<|end|>", ["<eos>"]),
    ],
)
def test_what_closes_an_answer_ends_generation_where_it_is_one_token(templates, name, closing, end_tokens):
    assert templates[name].closing == closing
    expected = TOKENIZER.convert_tokens_to_ids(end_tokens or ["<eos>", closing])
    assert templates[name].end_ids() == sorted(set(expected))


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_trained_text_is_every_assistant_content_and_what_closes_it(templates, name, data):
    messages = data.draw(conversations(ROLES.get(name, ("system", "user", "assistant"))))
    if name == "MISTRAL":
        for i, message in enumerate(messages):
            message["role"] = "assistant" if i % 2 else "user"
    text, spans, _ = rendered(templates[name], messages)
    assert (text, spans) == reference(name, messages)
    assert text == TOKENIZER.apply_chat_template(messages, chat_template=templates[name].jinja, tokenize=False)
    if any(message["role"] == "assistant" for message in messages):
        assert rendered(templates[name], messages, only_last=True)[:2] == (text, spans[-1:])


def test_what_a_template_adds_to_a_turn_after_its_content_is_trained(tmp_path_factory):
    """Tool calls: the model has to write them too."""
    calling = template_of(
        tmp_path_factory,
        """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if message.tool_calls %}{{- '\\n<call>' + message.tool_calls[0].name + '</call>' }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}""",
    )
    call = {"role": "assistant", "content": "let me see", "tool_calls": [{"name": "look"}]}
    called = "let me see\n<call>look</call><|im_end|>"
    messages = [USER, call, {"role": "tool", "content": "let me see"}, ANSWER, USER, call]
    assert trained(calling, messages) == [called, "so.<|im_end|>", called]
    seldom = template_of(
        tmp_path_factory,
        calling.jinja.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1].role == 'user'"),
    )
    assert trained(seldom, [USER, ANSWER, call]) == ["so.<|im_end|>", called]


def test_a_row_whose_text_changes_with_any_mark_is_dropped(tmp_path_factory):
    refusal = "{% if messages|length == 4 and messages[1].content != 'so.' %}{{ raise_exception('so!') }}{% endif %}"
    picky = template_of(tmp_path_factory, tiny_tokenizer.CHATML + refusal)
    with pytest.raises(Dropped, match="cannot be told"):
        rendered(picky, [USER, ANSWER, USER, ANSWER])
    assert trained(picky, [USER, ANSWER]) == ["so.<|im_end|>"]


def test_an_exported_tokenizer_renders_what_was_trained(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer.tiny_tokenizer()
    template = resolve_template("tulu", tokenizer)
    tokenizer.chat_template = template.jinja
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    messages = [USER, ANSWER, USER, ANSWER]
    assert exported.apply_chat_template(messages, tokenize=False) == rendered(template, messages).text
    assert resolve_template("tokenizer", exported).digest == template.digest


def test_roles_that_are_not_shown_are_told(templates):
    assert [templates["TULU"].shows_role(role) for role in ("system", "user", "assistant", "tool")] == [1, 1, 1, 0]
    assert templates["CHATML"].shows_role("tool") and templates["MISTRAL"].shows_role("system")


def test_a_templates_own_refusal_is_told_from_its_failure(templates, tmp_path_factory):
    with pytest.raises(Dropped, match=r"refused by the chat template: .*alternate"):
        rendered(templates["MISTRAL"], [USER, USER])
    failing = template_of(
        tmp_path_factory, "{% if messages|length > 2 %}{{ 1 / 0 }}{% endif %}" + tiny_tokenizer.CHATML
    )
    with pytest.raises(Dropped, match="ZeroDivisionError"):
        rendered(failing, [USER, ANSWER, USER])


@pytest.mark.parametrize(
    "jinja, said",
    [
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
        ("{{ messages[0].content }}", "content exactly once"),
        ("hello", "content exactly once"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "exactly once"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[9].content }}", "Undefined"),
        ("{{ 1 / 0 }}", "ZeroDiv"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_by_name(tmp_path, jinja, said):
    (tmp_path / "bad.jinja").write_text(jinja)
    with pytest.raises(UserError, match=said) as error:
        resolve_template(str(tmp_path / "bad.jinja"), TOKENIZER)
    assert "bad.jinja" in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    for name in ("tuluu", str(tmp_path), str(tmp_path / "binary.jinja"), "tokenizer"):
        with pytest.raises(UserError, match="tulu") as error:
            resolve_template(name, TOKENIZER)
        assert name in str(error.value)


def test_a_turn_that_cannot_be_told_from_the_rest_is_refused(tmp_path_factory):
    """Here each turn is rendered differently once another follows, and what it says also appears in the first line."""
    changing = template_of(
        tmp_path_factory,
        """\
{%- if messages|length > 2 %}{{ messages[1].content|length }}{% endif %}
{%- for message in messages %}{{- '<' + message.role + '>' + message.content + eos_token }}
{%- if not loop.last %}{{ messages|length }}{% endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}""",
    )
    with pytest.raises(Dropped, match="cannot be told"):
        rendered(changing, [USER, {"role": "assistant", "content": "a long answer"}, USER, ANSWER])
