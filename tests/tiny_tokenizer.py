"""Small fast tokenizers built from nothing, and the chat templates that the data tests run on."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
OTHER = {"role": "assistant", "content": "no."}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "<|user|>\nWhat is the answer?\n<|assistant|>\nThe answer is 42.\n",
    "<|assistant|>\n\n\nIt is so.\n\n  ok\n",
    "<|system|>\nyou are kind   and\tbrief\n\n\n",
    "ünïcode 漢字 emoji 🙂 <|im_start|>user\n",
    "1234 5678 90, 'twas",
] * 4
SPECIALS = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<|call|>", "<|stop|>"]


def tiny_tokenizer(words: str = "llama3", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 600 tokens. words: its pre-tokenizer: "llama3" or "gpt2"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token=None))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
    split = [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")] if words == "llama3" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **named)


CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# As the first Llama 3 had it: the generation prompt ends every text.
PROMPTING = LLAMA3.replace("{%- if add_generation_prompt %}", "").removesuffix("{%- endif %}")

# No generation prompt: the answer follows the question's end.
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

# No generation prompt, though answers have a header.
PLAIN = """\
{%- for message in messages %}
{{- '### ' + message['role'] + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{{- '\\n' }}
{%- endfor %}"""

# EOS comes once, at the end of a text that asks for no answer.
PHI3 = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""


# Templates with tools, after four kinds of real ones; {{ call.arguments }} in each as that kind prints it.
# Qwen3: calls inside the turn, reasoning only after the last question, an empty one in the last turn.
CALLS = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set reasoning = message.reasoning_content or '' %}
{%- if '</think>' in content and not reasoning %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > last.user and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
{%- set call = call.function or call %}
{{- '<call>{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}</call>' }}
{%- endfor %}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Mistral: no header, tools before the last question, calls instead of a content.
BRACKETS = """\
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}{{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{- '[RESULT]' + message.content + message.tool_call_id + '[/RESULT]' }}
{%- elif message.tool_calls %}
{{- '[CALLS] [' }}
{%- for call in message.tool_calls %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']' + eos_token }}
{%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}"""

# DeepSeek: arguments as text, no header behind a result, reasoning never shown, a prompt that opens reasoning.
BLOCKS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if not loop.first and messages[loop.index0 - 1].role != 'tool' %}{{- '<|Assistant|>' }}{%- endif %}
{{- message.content.split('</think>')[-1] }}
{%- for call in message.tool_calls or [] %}
{{- '<call>' + call.function.name + '\\n' + call.function.arguments + '</call>' }}
{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'tool' %}{{- '<result>' + message.content + '</result>' }}
{%- else %}{{- '<|User|>' + message.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

# gpt-oss: calls and answers are closed by different tokens, the last answer by another; the call's name comes again.
CHANNELS = """\
{%- set called = namespace(name='') %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- set call = message.tool_calls[0].function %}{%- set called.name = call.name %}
{%- if message.reasoning_content %}
{{- '<|im_start|>assistant thinks<|im_end|>' + message.reasoning_content + '<|stop|>' }}
{%- endif %}
{{- '<|im_start|>assistant to=' + call.name + '<|im_end|>' + call.arguments | tojson + '<|call|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant says<|im_end|>' + message.content + (eos_token if loop.last else '<|stop|>') }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>' + message.tool_call_id + called.name + ' to=assistant<|im_end|>' }}
{{- message.content | tojson + '<|stop|>' }}
{%- else %}{{- '<|im_start|>' + message.role + '<|im_end|>' + message.content + '<|stop|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""

# MiniMax-M3, Gemma 4, Reka: names are written twice, in the order of their letters, and in ASCII.
ELEMENTS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<call ' + call.function.name + ' ' + call.function.name + '>' }}
{%- for key, value in call.function.arguments | dictsort %}
{{- '<' + key + '>' + value | tojson(ensure_ascii=true) + '</' + key + '>' }}
{%- endfor %}
{{- '</call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Apertus: one turn of answers, calls and results, closed only where a question follows.
TURNS = """\
{{- bos_token }}
{%- set turn = namespace(is_open=false, has_results=false) %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- (', ' if turn.has_results else '[') + message.content }}{%- set turn.has_results = true %}
{%- elif message.role == 'assistant' %}
{{- '' if turn.is_open else '<|im_start|>' }}{%- set turn.is_open = true %}
{%- if message.content %}{{- (']' if turn.has_results else '') + message.content }}
{%- set turn.has_results = false %}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<|call|>' + call.function.name + call.function.arguments + '<|im_end|>' }}
{%- endfor %}
{%- else %}
{{- ('<|stop|>' if turn.is_open else '') + '<|user|>' + message.content }}{%- set turn.is_open = false %}
{%- endif %}
{%- endfor %}
{{- ']' if turn.has_results else '' }}
{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"""
