"""What is said when training stops itself: pytest tests/test_errors.py"""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common.errors import not_finite, progress


def test_samples_are_named_by_file_and_row_and_each_file_once():
    """A micro-batch of 64 samples of two files, of which the first eight are named."""
    rows = [("a/chats.jsonl", 71), ("b/chats.jsonl", 5), ("a/chats.jsonl", 930)] + [("a/chats.jsonl", n) for n in range(61)]
    data = SimpleNamespace(where=lambda i: "{}:{}".format(*rows[i]))
    ranks = SimpleNamespace(rank=0, gather=lambda work: [work()])
    error = not_finite(3, "loss", math.nan, [list(range(64))], [math.nan], [10] * 64, data, ranks)
    assert "of 640 tokens: a/chats.jsonl:71, 930, 0, 1, 2, 3, 4, b/chats.jsonl:5 and 56 more)" in str(error)


def test_a_checkpoint_that_may_not_be_there_is_not_promised():
    ranks = SimpleNamespace(rank=0, gather=lambda work: [work()])
    error = str(not_finite(1, "loss", math.nan, [], None, [], None, ranks))
    assert error.startswith("step 1: the loss is nan") and error.endswith("if a checkpoint was written, it stands")
    assert "in bfloat16, --dtype float32" in error


def test_lines_that_nobody_reads_end_nothing():
    """As in `run.sh sanity | head -n 1`."""
    code = "import sys; from common.errors import print_line\nfor i in range(3): sys.stdin.readline(); print_line('.' * 9)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent.parent) as process:  # fmt: skip
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "." * 9 + "\n"
        process.stdout.close()
        process.stdin.write("\n\n")
        process.stdin.close()
        assert process.wait(60) == 0


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr("common.errors.time.monotonic", lambda: now[0])
    with progress("counting", 5000, "sheep", lines.append) as advance:
        for seconds in (10, 31, 40, 62):
            now[0] = seconds
            advance(1000)
    assert lines == ["counting: 2,000 of 5,000 sheep", "counting: 4,000 of 5,000 sheep"]
