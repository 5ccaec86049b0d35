"""How fast conversations become tokens, against the bare fast tokenizer on the same texts; not a test.

    python tests/bench_tokenization.py [TOKENIZER_FOLDER] [ROWS]

Ours parses, checks, renders, tokenizes, finds the targets and returns arrays; the bare tokenizer gets texts that are
already rendered, in the same blocks, by the same encode_batch, and returns nothing. Rounds alternate between the two;
what is shown are medians over rounds.
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import launch
import models

sys.path.insert(0, str(launch.REPO))
from transformers import AutoTokenizer

from common.config import SFTConfig
from common.data.cache import BLOCK_ROWS, BlockTokenizer
from common.data.chat_template import resolve_template
from common.data.sources import load_source, parse_source

ROUNDS = 5


def generated_rows(num_rows: int) -> list[dict]:
    """Conversations of 1 to 4 exchanges of generated words, about as long as Tulu 3's."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]

    def turn(role):
        return {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(20, 200))) + "."}

    lengths = [rng.randint(1, 4) for _ in range(num_rows)]
    return [{"messages": [turn(role) for _ in range(n) for role in ("user", "assistant")]} for n in lengths]


def main(folder: str = str(launch.REPO.parent / "shared/tokenizers/llama3"), num_rows: str = "2000") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template, config = resolve_template("tulu", tokenizer), SFTConfig(max_seq_length=1_000_000)  # nothing is cut off
    encoder = BlockTokenizer("sft", config, template).encoder
    conversations = generated_rows(int(num_rows))
    texts = [template.apply(row["messages"]) for row in conversations]
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(texts), BLOCK_ROWS)]
    with tempfile.TemporaryDirectory() as temporary:
        rows = load_source(parse_source(str(models.write_jsonl(Path(temporary) / "rows.jsonl", conversations))))

    def bare() -> int:
        return sum(len(encoding) for block in blocks for encoding in encoder.encode(texts[block]))

    def ours() -> int:
        tokenize = BlockTokenizer("sft", config, template)
        return sum(len(ids) for block in blocks for ids, *_ in tokenize(rows, rows.indices[block]))

    seconds: dict = {bare: [], ours: []}
    assert bare() == ours()  # this also warms up
    for work in [bare, ours] * ROUNDS:
        started = time.perf_counter()
        num_tokens = work()
        seconds[work].append(time.perf_counter() - started)
    medians = {work: statistics.median(times) for work, times in seconds.items()}
    speeds = ", ".join(f"{work.__name__} {num_tokens / median:,.0f} tokens/s" for work, median in medians.items())
    print(f"{speeds}: {medians[bare] / medians[ours]:.3f} of the bare tokenizer's")


if __name__ == "__main__":
    main(*sys.argv[1:])
