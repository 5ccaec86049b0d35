"""How fast conversations become tokens, against the bare fast tokenizer on the same texts; not a test.

    python tests/bench_tokenization.py [TOKENIZER_FOLDER] [SOURCE]

SOURCE: as in --dataset_mixer. Ours parses, checks, renders, tokenizes, finds the targets and returns arrays; the bare
tokenizer gets texts that are already rendered, in the same blocks, by the same encode_batch, and returns nothing.
Rounds alternate between the two; what is shown are medians over rounds.
"""

import statistics
import sys
import time

import launch

sys.path.insert(0, str(launch.REPO))
from transformers import AutoTokenizer

from common.config import SFTConfig
from common.data.cache import BLOCK_ROWS, BlockTokenizer
from common.data.chat_template import resolve_template
from common.data.sources import decode_row, load_source, parse_source

ROUNDS, SHARED = 5, launch.REPO.parent / "shared"


def main(folder: str = f"{SHARED}/tokenizers/llama3", source: str = f"{SHARED}/data/conversations.jsonl=500%") -> None:
    template = resolve_template("tulu", AutoTokenizer.from_pretrained(folder))
    config, rows = SFTConfig(max_seq_length=1_000_000), load_source(parse_source(source))  # nothing is cut off
    tokenize = BlockTokenizer("sft", config, template)  # once a process: it copies the tokenizer, which takes a second
    texts = [template.apply(decode_row(raw)["messages"]) for raw in rows.read(rows.indices)]
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(texts), BLOCK_ROWS)]

    def bare() -> int:
        return sum(len(encoding) for block in blocks for encoding in tokenize.encoder.encode(texts[block]))

    def ours() -> int:
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
