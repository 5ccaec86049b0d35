"""What ranks tell each other, and that no rank waits forever: pytest tests/test_ranks.py

Real processes, in groups whose time-out is TIMEOUT seconds. No launcher here ends a rank for another.
"""

import os
import signal
import time

import launch
import pytest
import torch

from common import ranks as ranks_module
from common.failures import UserError
from common.stopping import main_with_exit_codes

TIMEOUT = 6


def run(logs: str, body, *arguments) -> None:
    """In a rank's process: a script whose main is body(ranks, *arguments)."""
    main_with_exit_codes(lambda: body(ranks_module.start(TIMEOUT / 60), *arguments))()


def in_another_default_dtype() -> None:
    """As transformers loads a model, beside which the ranks meet."""
    torch.set_default_dtype(torch.bfloat16)
    time.sleep(1)
    torch.set_default_dtype(torch.float32)


def everything(ranks) -> None:
    """Each rank's own number is what tells them apart."""
    assert ranks.gather(lambda: 10 * ranks.rank) == [0, 10, 20]
    assert ranks.once(lambda: 10 * ranks.rank) == 0
    assert ranks.sum([0.1, ranks.rank]) == pytest.approx([0.3, 3])
    ranks.local_rank, ranks.local_world_size = ranks.rank % 2, 2  # as on two nodes, of two ranks and of one
    assert ranks.once_per_node(lambda: 10 * ranks.rank) == [0, 0, 20][ranks.rank]
    ranks.once(in_another_default_dtype)
    assert ranks.once(lambda: time.sleep(TIMEOUT + 2) or "longer than the time-out") == "longer than the time-out"


def test_every_rank_gets_the_same_results_and_work_may_last_longer_than_the_time_out():
    launch.Run(run, 3, (everything,)).wait().succeeded()


ERRORS = {  # name -> (error, exit code, what its one line says)
    "a mistake": (UserError("--flag is wrong"), 2, "error: --flag is wrong"),
    "a full disk": (OSError(28, "No space left on device", "/disk/file"), 3, "/disk/file: No space left on device"),
    "a bug": (KeyError("name"), 1, "KeyError: 'name'"),
}


def raises(ranks, how: str, culprit: int, error: Exception) -> None:
    """`culprit` alone raises; the others, which must not go on, have no reason of their own to end."""

    def work() -> None:
        if ranks.rank == culprit:
            raise error

    getattr(ranks, how)(work)
    time.sleep(60)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("how", "culprit"), [("gather", 1), ("once", 0)])
def test_an_error_of_one_rank_ends_all_and_is_told_once(name, how, culprit):
    error, code, said = ERRORS[name]
    done = launch.Run(run, 2, (raises, how, culprit, error)).wait(30)
    assert done.exit_codes == [code, code]
    assert done.stderr.count("error: ") == (code > 1) and done.stderr.count("Traceback") == (code == 1)
    assert said in done.stderr


def loses_a_rank(ranks, how: str, culprit: int, end: str) -> None:
    def work() -> None:
        if ranks.rank == culprit:
            os.kill(os.getpid(), signal.SIGSTOP if end == "hangs" else signal.SIGKILL)
        time.sleep(60 if how == "once" else 0)

    ranks.gather(lambda: None)  # all are there
    if how == "once" and culprit == 1 and ranks.rank == 1:
        work()
    ranks.sum([work() or 1]) if how == "sum" else getattr(ranks, how)(work)


@pytest.mark.parametrize(("end", "least", "most"), [("dies", 0, 5), ("hangs", TIMEOUT - 1, TIMEOUT + 10)])
@pytest.mark.parametrize(("how", "culprit"), [("gather", 1), ("gather", 0), ("once", 1), ("once", 0), ("sum", 1)])
def test_a_rank_that_is_lost_ends_the_others_with_one_line(how, culprit, end, least, most):
    """At once where it dies; within the time-out where it is stopped, also while another rank works."""
    run_ = launch.Run(run, 2, (loses_a_rank, how, culprit, end))
    lost, other = run_.processes[culprit], run_.processes[1 - culprit]
    while lost.is_alive() and open(f"/proc/{lost.pid}/stat").read().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)
    started = time.monotonic()
    other.join(60)
    seconds = time.monotonic() - started
    run_.kill()
    done = run_.wait(10)
    assert done.exit_codes[1 - culprit] == 1, done
    assert least < seconds < most
    assert done.stderr.count(f"rank {1 - culprit}: another has ended or hangs") == 1
    assert "Traceback" not in done.stderr and "error: " not in done.stderr
