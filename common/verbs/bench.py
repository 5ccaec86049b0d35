"""Throughput of a named shape with random weights, measured on the training scripts themselves.

    bash run.sh bench sft|dpo [N] [--shape llama-8b] [--steps 10] [--lengths tulu|full] [--profile] [flags of the script]

Writes a model folder with random weights and a data set with generated lengths, trains on them with
train_sft.py or train_dpo.py under the launcher, and reads metrics.jsonl: medians over the steps after
warm-up, of tokens/s/GPU, MFU (FLOPs as in common/run/metrics.py, recomputation not counted) and peak memory.
Fails if a layer was compiled again after warm-up. --profile adds torch's profiler over two of the steps, which slows
them. Model, data and results go to output/bench.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from common.failures import UserError, print_line
from common.run.metrics import PROFILE_VARIABLE

LLAMA_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
SHAPES = {
    "llama-8b": LLAMA_8B,
    "llama-8b-half": LLAMA_8B | dict(num_hidden_layers=16),  # what one of two GPUs would hold of llama-8b fits one
    "llama-3b": LLAMA_8B
    | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True
    ),
    "llama-1b": LLAMA_8B
    | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True),
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=False,
    ),
}
REPO = Path(__file__).resolve().parents[2]
NUM_WORDS = 1000
WARMUP_STEPS = 4
ON_GPU = torch.cuda.is_available()
SCALE = 1 if ON_GPU else 8  # a CPU gets lengths divided by this
# A rank's samples of a step: at a mean of 660 tokens two GPUs take about 84,500 tokens a step, and at the cap as many.
SAMPLES_PER_RANK = {"tulu": 64 if ON_GPU else 16, "full": 10 if ON_GPU else 3}


def write_model(shape: str, folder: Path) -> None:
    """config.json, random bfloat16 weights and a tokenizer of NUM_WORDS words, whose file comes last."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = {"<eos>": 0, "<|user|>": 1, "<|assistant|>": 2, **{f"w{i}": i + 3 for i in range(NUM_WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def generated_lengths(num: int, mean: float, cap: int, rng: np.random.Generator) -> np.ndarray:
    """int [num]: log-normal with a long tail, cut at `cap`, of about the given mean; all `cap` if mean is None."""
    if mean is None:
        return np.full(num, cap)
    lengths = rng.lognormal(0, 0.9, num)
    for _ in range(20):  # the cut lowers the mean: scale until it is right
        lengths *= mean / np.clip(lengths, 8, cap).mean()
    return np.clip(lengths, 8, cap).astype(int)


def write_data(method: str, lengths: str, num: int, path: Path) -> None:
    """num conversations (mean 660 tokens, cap 4096) or pairs (prompt and answers of mean 330, cap 2000), over SCALE."""
    rng = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, NUM_WORDS, n))

    def turns(prompt: str, answer: str) -> list[dict]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    with open(path, "w") as file:
        if method == "sft":
            for n in generated_lengths(num, None if lengths == "full" else 660 / SCALE, 4096 // SCALE, rng):
                prompt = max(1, int((n - 3) * rng.uniform(0.2, 0.6)))
                file.write(json.dumps({"messages": turns(words(prompt), words(max(1, n - 3 - prompt)))}) + "\n")
        else:
            mean = None if lengths == "full" else 330 / SCALE
            for p, c, r in zip(*(generated_lengths(num, mean, 1000 // SCALE, rng) for _ in range(3)), strict=True):
                prompt = words(p)
                file.write(json.dumps({"chosen": turns(prompt, words(c)), "rejected": turns(prompt, words(r))}) + "\n")


class Options(argparse.ArgumentParser):
    """The benchmark's own flags, beside those of the script. Raises UserError where argparse prints its usage."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--shape", choices=SHAPES, default="llama-8b" if ON_GPU else "tiny")
        self.add_argument("--steps", type=int, default=10)
        self.add_argument("--lengths", choices=SAMPLES_PER_RANK, default="tulu")
        self.add_argument("--profile", action="store_true")

    def error(self, message: str) -> None:
        raise UserError(message)


def num_recompiled(records: list[dict]) -> int | None:
    """Graphs compiled after the last step of warm-up, None where nothing is compiled."""
    before, after = (record.get("compiled_graphs") for record in (records[WARMUP_STEPS - 1], records[-1]))
    return None if after is None else after - (before or 0)


def train_command(method: str, ranks: int, words: list[str]) -> list[str]:
    """`bash run.sh METHOD RANKS WORDS`, which heeds CUDA_VISIBLE_DEVICES, but for its care for signals: a benchmark that
    is stopped does not wait for a checkpoint."""
    script = 'source "$1"; python=$0; launch() { cd "$caller"; exec "$@"; }; train "${@:2}"'
    return ["bash", "-c", script, sys.executable, str(REPO / "run.sh"), method, str(ranks), *words]


def main() -> None:
    method, *flags = sys.argv[1:] or [""]
    if {"-h", "--help"} & {method, *flags}:
        print_line(f"{__doc__}\nShapes: {', '.join(SHAPES)}. Lengths: {', '.join(SAMPLES_PER_RANK)}.")
        return
    if method not in ("sft", "dpo"):
        raise UserError(f"`bench {method}`: it is bench sft|dpo [N] [flags]")
    ranks = int(flags.pop(0)) if flags and flags[0].isdecimal() else torch.cuda.device_count() if ON_GPU else 2
    if ranks == 0:
        raise UserError(f"bench {method} 0: N must be 1 or more")
    options, passed = Options().parse_known_args(flags)
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be 1 or more")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if options.profile:
        environment[PROFILE_VARIABLE] = str(Path("output/bench/profile.txt").absolute())
        options.steps = max(3, options.steps)  # those that are profiled
    steps = options.steps + WARMUP_STEPS
    folder = Path("output/bench")
    model, data, out = folder / options.shape, folder / f"{method}-{options.lengths}.jsonl", folder / f"run-{method}"
    samples = SAMPLES_PER_RANK[options.lengths] * ranks
    own = {
        "model_name_or_path": model,
        "dataset_mixer": data,
        "output_dir": out,
        "cache_dir": folder / "cache",
        "max_train_steps": steps,
        "stop_after_steps": steps,
        "logging_steps": 1,
        "checkpointing_steps": 10**9,
        "resume": "never",
    }
    for word in passed:
        if word.startswith("--") and (name := word[2:].partition("=")[0].replace("-", "_")) in {*own, "config"}:
            why = (
                "name the flags one by one" if name == "config" else "the benchmark sets this flag itself; leave it out"
            )
            raise UserError(f"{word}: {why}")
    if not (model / "tokenizer.json").is_file():  # in a process of its own, which leaves the GPU when it is done
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(write_model, options.shape, model).result()
    write_data(method, options.lengths, 12 * samples, data)
    shutil.rmtree(out, ignore_errors=True)
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    words += ["--global_batch_size", str(samples), *passed]
    command = train_command(method, ranks, words)
    print_line(" ".join(["bash run.sh", method, str(ranks), *words]))
    reference_speed, is_measured = None, False
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            for line in process.stdout:
                print_line(line, end="")
                if match := re.search(r"reference pass: ([0-9,]+) tokens/s", line):
                    reference_speed = float(match[1].replace(",", ""))
                if is_measured := line.startswith(f"step {steps}/"):
                    break
        finally:  # nobody wants the model that it would now write; and a benchmark that is stopped stops its ranks
            if is_measured or sys.exc_info()[0] is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if not is_measured:
        raise SystemExit(process.returncode or 1)
    all_records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    records = all_records[WARMUP_STEPS:]

    def median(name: str) -> float | None:
        values = [record[name] for record in records if name in record]
        return statistics.median(values) if values else None

    tokens = sum(record["total_tokens"] for record in records[-1:]) / steps
    speeds = [
        (r["samples"] - before["samples"]) / r["step_seconds"]
        for before, r in pairwise(all_records[WARMUP_STEPS - 1 :])
    ]
    result = {
        "method": method,
        "shape": options.shape,
        "ranks": ranks,
        "lengths": options.lengths,
        "flags": passed,
        "steps": len(records),
        "tokens_per_step": tokens,
        "tokens_per_second_per_device": median("per_device_tps"),
        "mfu": median("mfu"),
        "reference_tokens_per_second_per_device": reference_speed,
        "samples_per_second": statistics.median(speeds),
        "step_seconds": median("step_seconds"),
        "max_memory_gb": max(r["max_memory_gb"] for r in records),
        "packing_efficiency": median("packing_efficiency"),
        "recompiles": num_recompiled(all_records),
    }
    (folder / f"bench-{method}-{options.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
    if PROFILE_VARIABLE in environment:
        print_line(Path(environment[PROFILE_VARIABLE]).read_text(encoding="utf-8"))
    for name, value in result.items():
        print_line(f"{name:40} {value:,.4g}" if isinstance(value, float) else f"{name:40} {value}")
    if result["recompiles"]:
        raise SystemExit(f"{result['recompiles']} graphs were compiled after warm-up")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print_line(f"error: {e}", sys.stderr)
        raise SystemExit(e.EXIT_CODE) from None
