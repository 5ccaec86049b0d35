"""What is said when training stops itself: pytest tests/test_errors.py"""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.failures import TrainingStopped, UserError, as_user_error, not_finite, progress
from common.zero.engine import out_of_memory_explained


def test_samples_are_named_by_file_and_row_and_each_file_once():
    """A micro-batch of 64 samples of two files, of which the first eight are named."""
    rows = [("a/chats.jsonl", 71), ("b/chats.jsonl", 5), ("a/chats.jsonl", 930)] + [
        ("a/chats.jsonl", n) for n in range(61)
    ]
    data = SimpleNamespace(source_of=lambda i: "{}:{}".format(*rows[i]))
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
    code = "import sys; from common.failures import print_line\nfor i in range(3): sys.stdin.readline(); print_line('.' * 9)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "." * 9 + "\n"
        process.stdout.close()
        process.stdin.write("\n\n")
        process.stdin.close()
        assert process.wait(60) == 0


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr("common.failures.time.monotonic", lambda: now[0])
    with progress("counting", 5000, "sheep", lines.append) as advance:
        for seconds in (10, 31, 40, 62):
            now[0] = seconds
            advance(1000)
    assert lines == ["counting: 2,000 of 5,000 sheep", "counting: 4,000 of 5,000 sheep"]


@pytest.mark.parametrize(
    ("tokens", "budget", "longest", "advised"),
    [
        (12_500, 30_000, 900, "Try --max_tokens_per_micro_batch 6250, --gradient"),  # 15000 would change nothing
        (16_000, 16_384, 9_000, "Try --max_tokens_per_micro_batch 9000, --gradient"),
        (9_000, 16_384, 9_000, "Try --gradient_checkpointing full"),
        (0, 16_384, 9_000, "Try more devices, or a --ds_config that offloads"),
    ],
)
def test_out_of_memory_advises_what_changes_something(tokens, budget, longest, advised):
    with pytest.raises(TrainingStopped) as error, out_of_memory_explained("step 7", budget, longest) as size:
        size.tokens = tokens
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(error.value).startswith("step 7: out of memory") and advised in str(error.value)
    assert (f"on a micro-batch of {tokens:,} tokens (at most {budget:,})" in str(error.value)) == (tokens > 0)
    assert error.value.on_this_rank_only


@pytest.mark.parametrize(
    ("said", "error", "reason"),
    [
        ("--model /m", OSError(13, "Permission denied", "/m/a.json"), "/m/a.json: Permission denied"),
        ("--file /m/a.json", OSError(13, "Permission denied", "/m/a.json"), "Permission denied"),
        ("template 'a\\nb'", OSError(36, "File name too long", "a\nb"), "File name too long"),
        ("--model /m", OSError(2, "No such file", "a\nb"), "a b: No such file"),
        ("row 3", ValueError("two\nlines"), "two lines"),
        ("row 3", KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_a_mistake_says_what_and_why_in_one_line_and_names_a_file_once(said, error, reason):
    with pytest.raises(UserError) as seen, as_user_error(said, OSError, ValueError, KeyError):
        raise error
    assert str(seen.value) == f"{said}: {reason}"


def test_other_errors_mistakes_already_said_and_what_is_no_mistake_go_through():
    with pytest.raises(KeyError), as_user_error("x", OSError):
        raise KeyError
    with pytest.raises(UserError, match=r"^as it is$"), as_user_error("x"):
        raise UserError("as it is")
    for error in (MemoryError(), torch.OutOfMemoryError(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)), as_user_error("x"):
            raise error
