"""Tiny models, their tokenizer and their data, all made from a seed; a group of one rank; what is refused."""

import json
import random
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from common.failures import UserError


@contextmanager
def refused(*named: str):
    """What is done here ends as a UserError of one line, in which each of these patterns is found."""
    with pytest.raises(UserError) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and [pattern for pattern in named if not re.search(pattern, text)] == [], text


class OneRank:
    """Ranks, of a group of one, that remembers what it said."""

    rank, world_size, local_world_size, is_main, device = 0, 1, 1, True, torch.device("cpu")

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def once(self, work):
        return work()

    def gather(self, work):
        return [work()]

    on_all, once_per_node = gather, once


VOCAB = 320
WORDS = """the a red green blue small large old new river stone cloud bird tree house walks sings falls turns answers
asks over under near with without always never seven twelve first last""".split()  # noqa: SIM905

ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than most samples
SOFT_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
# Model type -> what its config has of its own.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},  # with biases in its attention
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "gpt_neox": {},  # whose folders call the head by another name than its class
    "apertus": {"rope_parameters": ROPE},  # its folders hold buffers
    "gemma2": WINDOWS | SOFT_CAPS | {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 4.0},
    # Experts, whose folders hold a tensor of each; the second with an expert that every token meets.
    "qwen3_moe": EXPERTS | {"head_dim": 8, "moe_intermediate_size": 24},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # Experts, windows, attention sinks.
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    | {"rope_parameters": ROPE},
    # A layer of linear attention, which carries a state from token to token, and experts.
    "qwen3_next": EXPERTS
    | LINEAR
    | {"head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
}
# Whose matrix products are of other sizes where another sample is.
WITH_EXPERTS = {"qwen3_moe", "mixtral", "qwen2_moe", "gpt_oss", "qwen3_next"}
# Models of images and text, of which the text part is trained: type -> (of the text, of the images).
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
WITH_IMAGES = {
    "gemma3": (WINDOWS | {"head_dim": 8, "tie_word_embeddings": True}, VISION),
    "mistral3": ({"model_type": "mistral", "head_dim": 8}, VISION | {"model_type": "pixtral", "head_dim": 8}),
    "qwen2_5_vl": (MROPE, QWEN_VISION | {"fullatt_block_indexes": [0]}),
    "qwen3_5": (
        LINEAR | {"head_dim": 16, "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
        QWEN_VISION | {"num_position_embeddings": 16},
    ),
    "qwen3_vl_moe": (
        MROPE | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16},
        QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
# Of a model small in all but its rows.
LLAMA3_VOCABULARY = {"vocab_size": 128256, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
LLAMA3_VOCABULARY |= {"num_key_value_heads": 1, "eos_token_id": 128001, "tie_word_embeddings": True}
TINY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
TINY |= {"tie_word_embeddings": False, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about VOCAB tokens; id 0 is <eos>."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # as transformers makes it in a folder of a Qwen2
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<eos>"], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 20, show_progress=False, **options)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3 + [f"<|{role}|>\n" for role in ("user", "assistant")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_config(architecture: str = "llama", **changes):
    if architecture in WITH_IMAGES:
        text, vision = WITH_IMAGES[architecture]
        parts = {"text_config": {**TINY, **text, **changes}, "vision_config": vision}
        return AutoConfig.for_model(architecture, **parts, tie_word_embeddings="tie_word_embeddings" in text)
    return AutoConfig.for_model(architecture, **{**TINY, **ARCHITECTURES.get(architecture, {}), **changes})


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with every weight drawn, biases and norms too, so that none is idle."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "norm" in name else 0.0, 0.15)
    return model


def make_model(folder: Path, architecture="llama", dtype=torch.float32, seed=0, shard="1GB", **changes) -> Path:
    """A model folder with the tokenizer. shard: the most bytes of a file; one file has no index."""
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if architecture in WITH_IMAGES else AutoModelForCausalLM
    model = drawn(auto.from_config(make_config(architecture, **changes), dtype=torch.float32))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)


def sentence(rng: random.Random, shortest: int = 2, longest: int = 14) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))


def conversations(count: int, seed: int = 0) -> list[dict]:
    """SFT rows: one to three exchanges, every third with a system message."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": sentence(rng)}] if i % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]
        rows.append({"messages": messages})
    return rows


def preferences(count: int, seed: int = 0) -> list[dict]:
    """DPO rows of all proportions: short and long prompts, one side much longer than the other, a common beginning."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": sentence(rng, 1, 20)}]
        if i % 3 == 0:
            prompt += [{"role": "assistant", "content": sentence(rng)}, {"role": "user", "content": sentence(rng)}]
        start = sentence(rng) + " " if i % 4 == 0 else ""
        answers = [start + sentence(rng, 1, 3), start + sentence(rng, 4, 16)]
        rng.shuffle(answers)
        chosen, rejected = ([*prompt, {"role": "assistant", "content": answer}] for answer in answers)
        rows.append({"chosen": chosen, "rejected": rejected})
    return json.loads(json.dumps(rows))  # so that no two sides share a message


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)
