"""Throughput of a named shape with random weights, measured on the training scripts themselves.

    bash run.sh bench sft|dpo [N] [--shape llama-8b] [--steps 10] [--lengths tulu|full] [flags of the script]

Writes a model with random weights and data of generated lengths to output/bench, trains on them as `bash run.sh` does,
and takes from metrics.jsonl medians over the steps after warm-up. Fails if a layer was compiled again after warm-up.
"""

import json
import multiprocessing
import re
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError, print_line
from common.verbs.launch import on_request_to_stop, split_number, start_run, visible_gpus
from common.verbs.words import parsed

SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
SIZES += ["vocab_size", "tie_word_embeddings"]
SHAPES = {  # name -> SIZES
    "llama-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-8b-half": (4096, 14336, 16, 32, 8, 128256, False),  # fits one GPU: what one of two would hold of llama-8b
    "llama-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "tiny": (128, 256, 2, 4, 2, 1024, False),
    "qwen3-30b-a3b": (2048, 768, 48, 32, 4, 151936, False),
    "moe-4b-a1b": (2048, 768, 6, 32, 4, 32768, False),  # its layers; fits two GPUs
    "moe-tiny": (128, 64, 2, 4, 2, 1024, False),
}
EXPERTS = {"qwen3-30b-a3b": (128, 8), "moe-4b-a1b": (128, 8), "moe-tiny": (8, 2)}  # name -> experts, a token's of them
NUM_WORDS = 1000
WARMUP_STEPS = 4
CPU_SCALE = 8  # a CPU gets lengths divided by this
SAMPLES_PER_RANK = {"tulu": (64, 16), "full": (10, 3)}  # of a step, on a GPU (about 42,000 tokens) and on a CPU
__doc__ += f"\nShapes: {', '.join(SHAPES)}. Lengths: {', '.join(SAMPLES_PER_RANK)}."


def write_model(shape: str, folder: Path, device: str = "cpu") -> None:
    """config.json, random bfloat16 weights and a tokenizer of NUM_WORDS words, whose file comes last."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

    others: dict = dict(max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0)
    others["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    sizes: dict = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = LlamaConfig(**sizes, **others)
    if shape in EXPERTS:
        others |= dict(zip(("num_experts", "num_experts_per_tok"), EXPERTS[shape], strict=True))
        config = Qwen3MoeConfig(**sizes, **others, moe_intermediate_size=sizes["intermediate_size"], head_dim=128)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = ["<eos>", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(NUM_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def generated_lengths(num: int, mean: float | None, cap: int, rng: np.random.Generator) -> np.ndarray:
    """int [num]: log-normal with a long tail, cut at `cap`, of about the given mean; all `cap` if mean is None."""
    if mean is None:
        return np.full(num, cap)
    lengths = rng.lognormal(0, 0.9, num)
    for _ in range(20):  # the cut lowers the mean: scale until it is right
        lengths *= mean / np.clip(lengths, 8, cap).mean()
    return np.clip(lengths, 8, cap).astype(int)


def write_data(method: str, lengths: str, num: int, path: Path, scale: int = CPU_SCALE) -> None:
    """num conversations (mean 660 tokens, cap 4096) or pairs (prompt and answers of mean 330, cap 2000), over scale."""
    rng = np.random.default_rng(0)
    full_mean, full_cap = {"sft": (660, 4096), "dpo": (330, 1000)}[method]
    mean, cap = None if lengths == "full" else full_mean / scale, full_cap // scale

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, NUM_WORDS, n))

    def turns(prompt: str, answer: str) -> list[dict]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    rows = []
    if method == "sft":
        for n in generated_lengths(num, mean, cap, rng):
            num_prompt = max(1, int((n - 3) * rng.uniform(0.2, 0.6)))
            rows.append({"messages": turns(words(num_prompt), words(max(1, n - 3 - num_prompt)))})
    else:
        for p, c, r in zip(*(generated_lengths(num, mean, cap, rng) for _ in range(3)), strict=True):
            prompt = words(p)
            rows.append({"chosen": turns(prompt, words(c)), "rejected": turns(prompt, words(r))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(words: list[str], last_step: int) -> float | None:
    """Runs `bash run.sh WORDS` until it prints the last step; returns the reference pass' speed, if it has one."""
    reference_speed, run = None, start_run(words)

    def stop(number: int) -> None:  # nobody wants a checkpoint, nor the model that would be written
        run.send_signal(signal.SIGQUIT)
        sys.exit(128 + number)

    on_request_to_stop(stop)
    for line in run.stdout or ():
        print_line(line, end="")
        if match := re.search(r"reference pass: ([0-9,]+) tokens/s", line):
            reference_speed = float(match[1].replace(",", ""))
        if line.startswith(f"step {last_step}/"):
            run.send_signal(signal.SIGQUIT)
            run.wait()
            return reference_speed
    sys.exit(run.wait() or 1)


def summary(records: list[dict]) -> dict:
    """What is shown of a history: medians over the steps after warm-up, and how many graphs they compiled."""
    before, measured = records[WARMUP_STEPS - 1], records[WARMUP_STEPS:]
    samples = np.diff([record["samples"] for record in [before, *measured]])
    speeds = samples / [record["step_seconds"] for record in measured]
    result: dict = {"steps": len(measured), "tokens_per_step": records[-1]["total_tokens"] / len(records)}
    result["samples_per_second"] = float(np.median(speeds))
    for name in ("per_device_tps", "mfu", "step_seconds", "packing_efficiency"):
        values = [record[name] for record in measured if name in record]
        result[name] = float(np.median(values)) if values else None
    result["max_memory_gb"] = max(record["max_memory_gb"] for record in measured)
    result["recompiles"] = measured[-1].get("compiled_graphs", 0) - before.get("compiled_graphs", 0)
    return result


def main(*argv: str) -> int:
    """Measures, shows and writes the result; returns the exit code. Raises UserError."""
    on_gpu = bool(visible_gpus())
    own: dict = {"shape": {"choices": SHAPES, "default": "llama-8b" if on_gpu else "tiny"}}
    own |= {"steps": {"type": int, "default": 10}, "lengths": {"choices": SAMPLES_PER_RANK, "default": "tulu"}}
    method, options, words = parsed("bench", argv, **own)
    num_ranks, passed = split_number(words)
    parse_config(SFTConfig if method == "sft" else DPOConfig, passed)  # before anything is written
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be 1 or more")
    steps, folder = options.steps + WARMUP_STEPS, Path("output/bench")
    model, data, out = folder / options.shape, folder / f"{method}-{options.lengths}.jsonl", folder / f"run-{method}"
    samples = SAMPLES_PER_RANK[options.lengths][not on_gpu] * num_ranks
    if not (model / "tokenizer.json").is_file():  # in a process of its own, which leaves the GPU when it is done
        print_line(f"importing torch and transformers, to write a model of shape {options.shape} to {model}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            writer.submit(write_model, options.shape, model, "cuda" if on_gpu else "cpu").result()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(method, options.lengths, 12 * samples, data, 1 if on_gpu else CPU_SCALE)
    shutil.rmtree(out, ignore_errors=True)
    ours = f"--model_name_or_path {model} --dataset_mixer {data} --output_dir {out} --cache_dir {folder}/cache "
    ours += f"--max_train_steps {steps} --stop_after_steps {steps} --logging_steps 1 --checkpointing_steps {10**9}"
    run = [method, str(num_ranks), "--global_batch_size", str(samples), *passed, *ours.split(), "--resume", "never"]
    print_line(" ".join(["bash run.sh", *run]))
    result = {"method": method, "shape": options.shape, "ranks": num_ranks, "lengths": options.lengths, "flags": passed}
    result["reference_tokens_per_second_per_device"] = train(run, steps)
    result |= summary([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    (folder / f"bench-{method}-{options.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print_line(f"{name:40} {value:,.4g}" if isinstance(value, float) else f"{name:40} {value}")
    return int(result["recompiles"] > 0)
