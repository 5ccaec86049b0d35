"""How a run stops, in one process, and where nobody reads what it says: pytest tests/test_stopping.py

Stops of whole runs are in test_resume.py.
"""

import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import launch
import pytest

from common import stopping
from common.failures import UserError, print_line
from common.stopping import Stopped, StopRequest, main_with_exit_codes, not_finite

ALONE = SimpleNamespace(rank=0, gather=lambda work: [work()], say=lambda text: print(text, flush=True))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """`os._exit` raises SystemExit, no launcher is seen, and the handlers are put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.2)
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "PLAINTUNE_RUN_SH"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_repeated_signal_is_one_request_and_a_later_one_leaves_at_once():
    request = StopRequest(ALONE)
    assert request.votes() == (0, 0) and request.agreed(0, 0, ALONE) == 0
    ask(signal.SIGINT)
    ask(signal.SIGTERM)  # the launcher passes a terminal's Ctrl-C on, as SIGTERM
    assert request.votes() == (0, 1)
    assert request.agreed(0, 1, ALONE) == signal.SIGINT
    ask(signal.SIGTERM)  # and may do so late
    time.sleep(0.25)
    with pytest.raises(SystemExit, match="143"):
        ask(signal.SIGTERM)
        time.sleep(1)


def test_a_rank_that_others_told_of_the_stop_does_not_take_its_own_late_signal_for_a_second():
    assert StopRequest(ALONE).agreed(1, 0, ALONE) == signal.SIGTERM
    ask(signal.SIGTERM)
    time.sleep(0.05)


@pytest.mark.parametrize("is_early", [False, True], ids=["during the export", "between the last vote and the export"])
def test_during_the_export_the_first_request_waits_and_the_second_leaves(capfd, is_early):
    request = StopRequest(ALONE)
    steps = [lambda: ask(signal.SIGINT), request.finish_export_first]
    for step in steps if is_early else reversed(steps):
        step()
    assert "writing the model first" in capfd.readouterr().out
    time.sleep(0.25)
    with pytest.raises(SystemExit, match="130"):
        ask(signal.SIGINT)
        time.sleep(1)


def test_the_answer_to_a_stop_during_the_export_is_not_missed(monkeypatch):
    """The handler's own line, on a pipe that nobody reads."""
    request = StopRequest(ALONE)
    request.finish_export_first()
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError))
    ask(signal.SIGTERM)
    assert request.signal_number == signal.SIGTERM


def test_a_micro_batch_that_is_not_finite_is_named_by_its_samples():
    """One of 64 samples, of which the first eight are named; the finite one beside it is not."""
    data = SimpleNamespace(source_of=lambda i: f"chats.jsonl:{i}")
    batches = [list(range(64)), [70]]
    error = str(not_finite(3, "loss", math.nan, batches, [math.nan, 1.0], [10] * 71, data, ALONE))
    assert "step 3: the loss is nan" in error and "micro-batch 1 of 640 tokens: chats.jsonl:0, " in error
    assert "chats.jsonl:7, and 56 more" in error and "chats.jsonl:8" not in error and "chats.jsonl:70" not in error
    assert "--learning_rate" in error and "--dtype float32" in error


# ------------------------------------------------------------------ output that nobody reads


def lose_the_reader(*streams: int) -> None:
    """From here on these are pipes that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    for number in streams:
        os.dup2(write, number)


def script(logs: str, unread: tuple, text: str, kind: type | None, *arguments) -> None:
    """In a process of its own: a script that prints a text and ends with an error, on a terminal of ASCII alone."""

    def main() -> None:
        print_line(text)
        if kind is not None:
            raise kind(*arguments)

    lose_the_reader(*unread)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="ascii") for number in (1, 2))
    main_with_exit_codes(main)()


ENDS = [(0, None), (2, UserError, "\u6f22"), (1, KeyError, "\u6f22"), (130, Stopped, signal.SIGINT)]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("unread", [(), (1,), (1, 2)])  # stdout: as once a Ctrl-C has ended its `tee`
def test_the_exit_code_is_the_same_if_nobody_reads_why_and_what_a_terminal_cannot_show_is_escaped(unread, end):
    code, *error = end
    done = launch.Run(script, 1, (unread, "\u6f22", *error)).wait()
    assert done.exit_codes == [code], done
    if not unread:
        assert "\\u6f22" in done.stdout and ("Traceback" in done.stderr) == (code == 1)
        assert ("\\u6f22" in done.stderr) == (code in (1, 2))
    elif unread == (1,):
        assert ("--resume auto continues" in done.stderr) == (code == 130)


def stop_request_of_a_lost_reader(ranks):
    lose_the_reader(1, 2)
    return StopRequest(ranks)


def test_a_run_that_nobody_reads_any_more_is_stopped_with_a_checkpoint(tiny_llama, sft_data, tmp_path):
    flags = launch.flags(tiny_llama, sft_data, tmp_path, max_train_steps=100000)
    run = launch.start("train_sft", flags, 2, {"train_sft.StopRequest": stop_request_of_a_lost_reader})
    metrics = tmp_path / "output" / "metrics.jsonl"
    assert run.wait_until(lambda: metrics.is_file() and metrics.stat().st_size)
    for process in run.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert run.wait().exit_codes == [143, 143]
    assert len(list((tmp_path / "output" / "checkpoints").glob("step_*/COMPLETE"))) == 1
