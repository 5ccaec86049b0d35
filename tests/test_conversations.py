"""What a row means: its form, what of it is trained, what is dropped.   pytest tests/test_conversations.py"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import ANSWER, OTHER, USER

from common.data.conversations import Conversation, Dropped, preference_example, sft_example
from common.failures import UserError


def sft(row: dict, **variables) -> Conversation:
    (conversation,) = sft_example(row, variables).conversations
    return conversation


def is_trained(message: dict) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


# --- forms
CONTENT = st.text(st.sampled_from('ab c\né漢<|>"{'), min_size=1, max_size=9).filter(lambda text: text == text.strip())
CHATS = st.lists(CONTENT, min_size=2, max_size=8).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
NAMES = {"user": ["user", "human", "User"], "assistant": ["assistant", "gpt", "model", "bot", "ASSISTANT"]}
NAMES = {role: st.sampled_from(names) for role, names in NAMES.items()}


def sharegpt(messages: list[dict]) -> list[dict]:
    return [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in messages]


WHOLE_FORMS = {  # a conversation -> a row that means it
    "messages": lambda chat: {"messages": chat, "score": 3},
    "messages as JSON text": lambda chat: {"messages": json.dumps(chat)},
    "ShareGPT": lambda chat: {"conversations": sharegpt(chat), "messages": None},
    "ShareGPT, role and content": lambda chat: {"conversations": chat, "text": "x"},
    "ShareGPT as JSON text": lambda chat: {"conversations": json.dumps(sharegpt(chat))},
    "parts": lambda chat: {"messages": [{**m, "content": [*m["content"]]} for m in chat]},
    "system column": lambda chat: {"messages": chat[1:], "system": chat[0]["content"]},
    "system twice": lambda chat: {"messages": chat, "system": chat[0]["content"]},
}


@given(chat=CHATS, system=CONTENT, name=st.sampled_from(sorted(WHOLE_FORMS)))
def test_every_form_of_a_whole_conversation_means_the_same(chat, system, name):
    chat = [{"role": "system", "content": system}, *chat]
    expected = Conversation(chat, [is_trained(message) for message in chat])
    assert sft(json.loads(json.dumps(WHOLE_FORMS[name](chat)))) == expected


@given(chat=CHATS, data=st.data())
def test_the_names_that_people_give_a_speaker_mean_the_same(chat, data):
    named = [{**message, "role": data.draw(NAMES[message["role"]])} for message in chat]
    assert sft({"messages": named}) == sft({"messages": chat})


@given(question=CONTENT, more=CONTENT, answer=CONTENT)
def test_alpaca_and_prompt_completion(question, more, answer):
    def asked(text):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return Conversation(messages, [False, True])

    alpaca = {"instruction": question, "output": answer}
    assert sft(alpaca) == sft({**alpaca, "input": ""}) == sft({**alpaca, "input": None}) == asked(question)
    assert sft({**alpaca, "input": more}) == asked(f"{question}\n\n{more}")
    for prompt in (question, [{"role": "user", "content": question}]):
        for completion in (answer, [{"role": "assistant", "content": answer}]):
            assert sft({"prompt": prompt, "completion": completion}) == asked(question)


def test_of_prompt_and_completion_only_the_completion_is_trained():
    assert sft({"prompt": [USER, ANSWER, USER], "completion": [OTHER]}).trained == [False, False, False, True]


@given(chat=CHATS, chosen=CONTENT, rejected=CONTENT)
def test_every_form_of_a_pair_means_the_same(chat, chosen, rejected):
    prompt = chat[: len(chat) - 1 + len(chat) % 2]  # ends with the user's
    sides = [[*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    names = {"user": "Human", "assistant": "Assistant"}
    asked = "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in prompt)
    rows = [
        {"chosen": sides[0], "rejected": sides[1], "score_chosen": 3},
        {"chosen": sides[0], "rejected": sides[1], "prompt": prompt[-1]["content"]},
        {"chosen": sides[0], "rejected": sides[1], "prompt": None},
        {"chosen": sides[0][-1:], "rejected": sides[1][-1:], "prompt": prompt},
        {"chosen": chosen, "rejected": sides[1][-1:], "prompt": prompt},
        {"chosen": chosen, "rejected": rejected, "prompt": prompt},
        *([{"chosen": chosen, "rejected": rejected, "prompt": prompt[0]["content"]}] if len(prompt) == 1 else []),
        {"chosen": f"{asked}\n\nAssistant: {chosen}", "rejected": f"{asked}\n\nAssistant: {rejected}"},
    ]
    for row in rows:
        assert [side.messages for side in preference_example(json.loads(json.dumps(row)), {}).conversations] == sides


# --- what else a row says
SCHEMA = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)], SCHEMA, json.dumps(SCHEMA)])
def test_tools_are_objects_or_their_json_text(tools):
    assert sft({"messages": [USER, ANSWER], "tools": tools}).tools == [SCHEMA]
    pair = preference_example({"prompt": "why?", "chosen": "so.", "rejected": "no.", "tools": tools}, {})
    assert [side.tools for side in pair.conversations] == [[SCHEMA]] * 2


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tools):
    assert sft({"messages": [USER, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "I look."}])
@pytest.mark.parametrize("arguments", [{"a": None}, '{"a": null}'])
def test_a_call_is_kept_as_it_is_with_any_content(content, arguments):
    """A null in a call is the row's own; a content that is null is none."""
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": arguments}}]}
    found = sft({"messages": [USER, {**calls, **content}]})
    text = {name: value for name, value in content.items() if value is not None}
    assert found == Conversation([USER, {**calls, **text}], [False, True])
    assert sft({"messages": [USER, {**calls, "tool_calls": json.dumps(calls["tool_calls"]), **content}]}) == found
    said = {"from": "function_call", "value": json.dumps({"name": "w", "arguments": {"a": 1}})}
    call = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}
    assert sft({"conversations": [said]}).messages == [{"role": "assistant", "tool_calls": [call]}]


MARKS = st.sampled_from([0, 1, 0.0, 1.0, None, True, False])


@given(chat=CHATS, data=st.data())
def test_a_turn_is_trained_unless_its_row_says_no_or_it_is_empty(chat, data):
    weighed, expected = [], []
    for message in chat:
        marks = data.draw(st.dictionaries(st.sampled_from(["weight", "train"]), MARKS))
        content = data.draw(st.sampled_from([message["content"], "", " \n", None]))
        content = content if message["role"] == "assistant" else message["content"]
        weighed.append({**message, "content": content, **marks})
        said = all(mark is None or mark for mark in marks.values())
        expected.append(is_trained({**message, "content": content or ""}) and said)
    found = sft({"messages": weighed})
    assert found.trained == expected
    assert found.messages == [{"role": m["role"], "content": m["content"] or ""} for m in weighed]
    noted = sft_example({"messages": weighed}, {}).notes
    asked = [m["role"] == "assistant" or bool(m.get("weight") or m.get("train")) for m in weighed]
    assert bool(noted) == (expected != asked)


@pytest.mark.parametrize("name", ["weight", "train", "training"])
@pytest.mark.parametrize("weight", [0.5, 2, -1, "false", [], {}])
def test_another_weight_is_refused_by_name(name, weight):
    with pytest.raises(UserError, match=f"`{name}`"):
        sft({"messages": [USER, {**ANSWER, name: weight}]})
    assert sft({"messages": [{**USER, name: weight}, ANSWER]}).trained == [False, True]


@pytest.mark.parametrize("own", [{"b": 3, "c": None}, '{"b": 3, "c": null}'])
def test_a_rows_chat_template_kwargs_come_before_the_runs(own):
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": own}
    assert sft(row, a=1, b=2).variables == {"a": 1, "b": 3, "c": None}
    assert sft({"messages": [USER, ANSWER]}, a=1).variables == {"a": 1}


# --- what is dropped
def said(content) -> dict:
    return {"messages": [USER, {"role": "assistant", "content": content}]}


LOOK = "\n\nHuman: why?\n\nAssistant: "


@pytest.mark.parametrize(
    "read, row, reason",
    [
        (sft_example, {"completion": "x", "id": 1}, "completion, id"),
        (sft_example, {"chosen": [], "rejected": []}, "chosen"),
        (sft_example, {"messages": None}, "no form"),
        (sft_example, {"messages": "hi"}, "messages.*JSON"),
        (sft_example, {"messages": "[" * 100_000}, "messages.*JSON"),
        (sft_example, {"messages": "3"}, "messages.*int"),
        (sft_example, {"messages": ["hi"]}, "message of `messages`.*str"),
        (sft_example, said(3), "content.*int"),
        (sft_example, said([{"type": "image", "text": "x"}]), "part.*content.*dict"),
        (sft_example, said([{"type": "text", "text": None}]), "part.*content.*null"),
        (sft_example, {"messages": [{"role": "user", "content": None}]}, "content.*null"),
        (sft_example, {"messages": [{"role": 7, "content": "x"}]}, "role.*int"),
        (sft_example, {"messages": [{"speaker": "human", "value": "x"}]}, "role.*null"),
        (sft_example, {"prompt": 1, "completion": "x"}, "`prompt`"),
        (sft_example, {"instruction": "x", "output": {"a": 1}}, "`output`"),
        (sft_example, {"text": 3}, "`text`.*int"),
        (sft_example, {"messages": [{**ANSWER, "tool_calls": "w()"}]}, "tool_calls.*JSON"),
        (sft_example, {"messages": [{**ANSWER, "tool_calls": ["w"]}]}, "tool_calls.*str"),
        (sft_example, {"messages": [USER, ANSWER], "tools": "w()"}, "tools.*JSON"),
        (sft_example, {"messages": [USER, ANSWER], "tools": [3]}, "tools.*int"),
        (sft_example, {"messages": [USER, ANSWER], "chat_template_kwargs": "[]"}, "chat_template_kwargs.*list"),
        (sft_example, {"messages": [USER, ANSWER], "system": 3}, "system.*int"),
        (sft_example, {"messages": [{"role": "system", "content": "x"}, USER], "system": "y"}, "system"),
        (preference_example, {"messages": [USER, ANSWER]}, "messages"),
        (preference_example, {"chosen": "so.", "rejected": "no."}, "prompt"),
        (preference_example, {"chosen": LOOK + "a", "rejected": LOOK.replace("why", "how") + "b"}, "prompt"),
        (preference_example, {"chosen": LOOK + "a" + LOOK + "c", "rejected": LOOK + "b"}, "prompts.*differ"),
        (preference_example, {"chosen": "x" + LOOK + "a", "rejected": "x" + LOOK + "b"}, "prompt"),
        (preference_example, {"chosen": [USER, ANSWER], "rejected": None}, "rejected|no form"),
        (preference_example, {"chosen": [USER, ANSWER], "rejected": [USER]}, "end with the assistant"),
        (preference_example, {"chosen": [], "rejected": []}, "end with the assistant"),
        (preference_example, {"prompt": "a", "chosen": "", "rejected": "y"}, "empty completion"),
        (preference_example, {"prompt": "a", "chosen": "y", "rejected": " \n"}, "empty completion"),
        (preference_example, {"prompt": "a", "chosen": [{**ANSWER, "weight": 0}], "rejected": "y"}, "not trained"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_for_its_reason(read, row, reason):
    with pytest.raises(Dropped, match=reason) as error:
        read(row, {})
    assert "\n" not in str(error.value)
