"""The embedded default: a tiny model, its tokenizer and its data, generated from one seed.

The tasks have checkable answers over the letters a to z (`reverse qfza` -> `azfq`), in two styles: `answer: azfq` (the
CHOSEN one) or `azfq.` (the OTHER). Half of the SFT answers are in each. The prompt's wording decides which, seven times
out of ten: `please reverse qfza` is mostly answered in the chosen style, `reverse qfza` in the other. (Of a coin flip,
greedy decoding would always take the style that is a hair more likely.) The other three teach both styles for both
wordings, for DPO to choose from. In every preference pair both answers are right, and the chosen one is in the chosen
style.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters[::-1],
    "sort": lambda letters: "".join(sorted(letters)),
    "count": lambda letters: str(len(letters)),
    "last": lambda letters: letters[-1],
}
CHOSEN_STYLE, OTHER_STYLE = "answer: {}", "{}."
STYLE_FOLLOWS_WORDING = 0.7  # how often an SFT answer is in the style that its wording calls for
EOS_TOKEN = "<|end_of_text|>"
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
HIDDEN, MLP, LAYERS = 128, 384, 2
LAYER: dict[str, tuple[int, ...]] = {  # shapes of a layer's weights
    **{f"self_attn.{name}_proj": (64 if name in "kv" else HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (MLP, HIDDEN) for name in ("gate", "up")},
    **{"mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)},
}


class Question(NamedTuple):
    """A task, its letters, and so a prompt with one right answer in two styles."""

    task: str
    letters: str
    polite: bool

    @property
    def prompt(self) -> str:
        return f"{'please ' * self.polite}{self.task} {self.letters}"

    @property
    def answer(self) -> str:
        return TASKS[self.task](self.letters)

    def chat(self, style: str) -> list[dict[str, str]]:
        """The question and its right answer in `style`, as messages."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": style.format(self.answer)}]


def read_answer(text: str) -> tuple[str | None, bool]:
    """A generated text -> (the bare answer, right or wrong, None if in neither style; whether in the chosen style)."""
    text, prefix = text.strip(), CHOSEN_STYLE.format("")
    if text.startswith(prefix):
        return text.removeprefix(prefix), True
    return text[:-1] if text.endswith(".") and text != "." else None, False


def write_data(folder: Path, seed: int, num_sft: int, num_preferences: int, num_held_out: int) -> None:
    """Writes sft.jsonl, preferences.jsonl and held_out.jsonl; no prompt occurs twice in all three, in any wording."""
    rng, tasks = random.Random(seed), list(TASKS)
    questions: dict[tuple[str, str], Question] = {}
    while len(questions) < num_sft + num_preferences + num_held_out:
        task = tasks[len(questions) % len(tasks)]
        letters = "".join(rng.choices(LETTERS, k=rng.randint(3, 4)))
        questions.setdefault((task, letters), Question(task, letters, polite=rng.random() < 0.5))
    rows: dict[str, list[dict]] = {"sft": [], "preferences": [], "held_out": []}
    for i, question in enumerate(questions.values()):
        chosen, other = question.chat(CHOSEN_STYLE), question.chat(OTHER_STYLE)
        if i < num_sft:
            follows_wording = rng.random() < STYLE_FOLLOWS_WORDING
            rows["sft"].append({"messages": chosen if question.polite == follows_wording else other})
        elif i < num_sft + num_preferences:
            rows["preferences"].append({"chosen": chosen, "rejected": other})
        else:
            rows["held_out"].append(question._asdict())
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_held_out(folder: Path) -> list[Question]:
    """The held-out questions that write_data wrote."""
    return [Question(**json.loads(line)) for line in (folder / "held_out.jsonl").read_text().splitlines()]


def make_tokenizer() -> Tokenizer:
    """Byte-level, so any text round-trips; the words of the tasks and the roles are one token each."""
    byte_tokens = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=byte_tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [*ROLE_TOKENS, "please", *TASKS, CHOSEN_STYLE.split()[0]]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def write_model(folder: Path, seed: int) -> None:
    """Writes a Llama of 0.5M random float32 parameters and its tokenizer, without torch's and transformers' import."""
    tokenizer = make_tokenizer()
    rows = tokenizer.get_vocab_size()
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", dtype="float32", tie_word_embeddings=False)
    config |= dict(hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, max_position_embeddings=128, vocab_size=rows, bos_token_id=None)
    config["eos_token_id"] = tokenizer.token_to_id(EOS_TOKEN)
    shapes = {"model.embed_tokens": (rows, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (rows, HIDDEN)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    rng = np.random.RandomState(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in sorted(shapes.items()):
        weight = rng.normal(0.0, 0.02, shape) if len(shape) == 2 else np.ones(shape)  # of a norm
        weights[f"{name}.weight"] = weight.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
