"""How fast conversations become tokens, against the bare fast tokenizer on the same texts; not a test.

    python tests/bench_tokenization.py [--tokenizer FOLDER] [--data FILE.jsonl] [--rows 2000] [--num_proc 2]

Both sides run in num_proc processes of the same pool and get the same rows in the same blocks. Ours parses, checks,
renders, tokenizes, finds the targets and returns arrays; the bare tokenizer gets texts that are already rendered and
returns nothing. Rounds alternate between the two; ratios are of the medians: `ratio` of wall-clock time, `cpu_ratio`
of the processes' CPU time, which other users of the machine disturb less. Prints one JSON line.
"""

import argparse
import json
import multiprocessing
import pickle
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.data import cache as token_cache
from common.data.cache import BLOCK_ROWS, BlockTokenizer
from common.data.chat_template import resolve_template
from common.data.tokens import Encoder

SHARED = Path(__file__).parents[2] / "shared"


def bare(texts: list[str]) -> tuple[int, float]:
    """Number of tokens and CPU seconds, by the backend tokenizer alone, in a worker process."""
    started, backend = time.process_time(), token_cache._tokenize.encoder.backend
    num_tokens = sum(len(backend.encode(text, add_special_tokens=False)) for text in texts)
    return num_tokens, time.process_time() - started


def ours(block) -> tuple[int, float]:
    started = time.process_time()
    arrays, _ = token_cache._tokenize(block)
    return int(arrays["lengths"].sum()), time.process_time() - started


def generated_rows(num_rows: int) -> list[dict]:
    """Conversations of 1 to 4 exchanges of generated words, about as long as Tulu 3's."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]

    def turn(role):
        return {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(20, 200))) + "."}

    return [
        {"messages": [turn(role) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]}
        for _ in range(num_rows)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/llama3"))
    parser.add_argument("--data", default=str(SHARED / "data/conversations.jsonl"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    if Path(options.tokenizer).is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        from tiny_tokenizer import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    if Path(options.data).is_file():
        rows = [json.loads(line) for line in Path(options.data).read_text().splitlines()]
        rows = (rows * (options.rows // len(rows) + 1))[: options.rows]
    else:
        rows = generated_rows(options.rows)
    template = resolve_template("tulu", tokenizer)
    lines = [json.dumps(row).encode() for row in rows]
    texts = [template.render(row["messages"])[0] for row in rows]
    starts = range(0, len(rows), BLOCK_ROWS)
    blocks = [(0, "bench", list(range(len(lines[i : i + BLOCK_ROWS]))), lines[i : i + BLOCK_ROWS]) for i in starts]
    batches = [texts[i : i + BLOCK_ROWS] for i in starts]

    # No truncation: both sides tokenize every character.
    state = pickle.dumps(BlockTokenizer("sft", template, Encoder(tokenizer), 1_000_000))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.num_proc, spawn, token_cache._start_worker, (state,)) as pool:
        wall, cpu, num_tokens = {"bare": [], "ours": []}, {"bare": [], "ours": []}, {}
        for i in range(options.rounds + 1):  # the first warms up
            for name, work, items in (("bare", bare, batches), ("ours", ours, blocks)):
                started = time.perf_counter()
                counts, seconds = zip(*pool.map(work, items), strict=True)
                num_tokens[name] = sum(counts)
                if i:
                    wall[name].append(time.perf_counter() - started)
                    cpu[name].append(sum(seconds))
    assert num_tokens["bare"] == num_tokens["ours"]
    wall, cpu = ({name: statistics.median(times) for name, times in both.items()} for both in (wall, cpu))
    print(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": num_tokens["ours"],
                "num_proc": options.num_proc,
                "rounds": options.rounds,
                "tokens_per_second": round(num_tokens["ours"] / wall["ours"]),
                "bare_tokens_per_second": round(num_tokens["bare"] / wall["bare"]),
                "ratio": round(wall["bare"] / wall["ours"], 3),
                "cpu_ratio": round(cpu["bare"] / cpu["ours"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
