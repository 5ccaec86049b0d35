"""How fast conversations become tokens, against the bare fast tokenizer on the same texts; not a test.

    python tests/bench_tokenization.py [--tokenizer FOLDER] [--rows 2000] [--rounds 5]

Ours parses, checks, renders, tokenizes, finds the targets and returns arrays; the bare tokenizer gets texts that are
already rendered, in the same blocks, by the same encode_batch, and returns nothing. Rounds alternate between the two;
ratios are of the medians: `ratio` of wall-clock time, `cpu_ratio` of CPU time over all threads, which other users of
the machine disturb less. Prints one JSON line.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoTokenizer

from common.data.cache import BLOCK_ROWS, BlockTokenizer
from common.data.chat_template import resolve_template
from common.data.sources import load_source, parse_source
from common.data.tokens import Encoder


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
    parser.add_argument("--tokenizer", default=str(Path(__file__).parents[2] / "shared/tokenizers/llama3"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    template, encoder = resolve_template("tulu", tokenizer), Encoder(tokenizer, 1_000_000)  # nothing is cut off
    conversations = generated_rows(options.rows)
    texts = [template.apply(row["messages"]) for row in conversations]
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, options.rows, BLOCK_ROWS)]

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations)
        file.flush()
        rows = load_source(parse_source(file.name))

        def bare() -> int:
            return sum(len(encoding) for block in blocks for encoding in encoder.encode(texts[block]))

        def ours() -> int:
            tokenize = BlockTokenizer("sft", template, encoder)
            return sum(len(ids) for block in blocks for ids, *_ in tokenize(rows, rows.indices[block]))

        wall, cpu, num_tokens = {bare: [], ours: []}, {bare: [], ours: []}, {}
        for i in range(options.rounds + 1):  # the first warms up
            for work in (bare, ours):
                started, cpu_started = time.perf_counter(), time.process_time()
                num_tokens[work] = work()
                if i:
                    wall[work].append(time.perf_counter() - started)
                    cpu[work].append(time.process_time() - cpu_started)
    assert num_tokens[bare] == num_tokens[ours]
    wall, cpu = ({work: statistics.median(times) for work, times in both.items()} for both in (wall, cpu))
    result = {
        "rows": options.rows,
        "tokens": num_tokens[ours],
        "rounds": options.rounds,
        "rows_per_second": round(options.rows / wall[ours]),
        "bare_rows_per_second": round(options.rows / wall[bare]),
        "cpu_ms_per_row": round(1000 * cpu[ours] / options.rows, 2),
        "ratio": round(wall[bare] / wall[ours], 3),
        "cpu_ratio": round(cpu[bare] / cpu[ours], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
