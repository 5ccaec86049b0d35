"""What ranks tell each other, and that no rank waits forever: pytest tests/test_ranks.py

Real processes, in groups whose time-out is TIMEOUT seconds. No launcher here ends a rank for another.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import deepspeed
import launch
import psutil
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


def leaves_a_thread_in_torch(ranks) -> None:
    def ask() -> None:
        while True:
            ranks.store.check(["name"])

    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.5)


def test_a_rank_that_is_done_ends_well_while_a_thread_of_it_is_in_torchs_own_code():
    """As the watch may be, or one of gloo's: where Python ends, such a thread aborts the process."""
    code = "import test_ranks as test; test.run('', test.leaves_a_thread_in_torch)"
    environment = os.environ | launch.CPU_ENVIRONMENT | {"PYTHONPATH": f"{launch.REPO}:{launch.REPO / 'tests'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


ERRORS = {  # name -> (error, exit code, what its one line says)
    "a mistake": (UserError("--flag is wrong"), 2, "error: --flag is wrong"),
    "a full disk": (OSError(28, "No space left on device", "/disk/file"), 3, "/disk/file: No space left on device"),
    "a bug": (KeyError("name"), 1, "KeyError: 'name'"),
}
TOLD = "(?m)^(?:error: |Traceback)"  # begins a line: in it may stand the line of code where another rank was last seen


def raises(ranks, how: str, culprit: int, error: Exception) -> None:
    """`culprit` alone raises; the others, which must not go on, have no reason of their own to end.

    how: by which of the ranks' common works; "alone": beside them, as of a file that only its host lacks.
    """

    def work() -> None:
        if ranks.rank == culprit:
            raise error

    if how == "alone":
        work()
    getattr(ranks, how)(work) if how != "alone" else ranks.gather(lambda: None)
    time.sleep(60)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("how", "culprit"), [("gather", 1), ("once", 0), ("alone", 1)])
def test_an_error_of_one_rank_ends_all_and_is_told_once(name, how, culprit):
    error, code, said = ERRORS[name]
    done = launch.Run(run, 2, (raises, how, culprit, error)).wait(30)
    assert done.exit_codes == [1 if how == "alone" else code, code]
    assert re.findall(TOLD, done.stderr) == ["error: " if code > 1 else "Traceback"] and said in done.stderr


def fails_before_it_joins(logs: str, culprits: list[int], error: Exception, is_deepspeeds: bool) -> None:
    """In a rank's process; ranks other than the culprits end well. is_deepspeeds: so is the launcher's environment."""
    if is_deepspeeds:
        os.environ["LOCAL_SIZE"] = os.environ.pop("LOCAL_WORLD_SIZE")

    def main() -> None:
        if int(os.environ["RANK"]) in culprits:
            raise error

    main_with_exit_codes(main)()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("culprits", "is_deepspeeds"), [([1], False), ([0, 1, 2], False), ([0, 1, 2], True)])
def test_an_error_before_the_ranks_have_joined_is_told_once_whichever_rank_has_it(name, culprits, is_deepspeeds):
    """As of a rank that has no GPU of its own; or a mistake, which all of them find."""
    error, code, said = ERRORS[name]
    done = launch.Run(fails_before_it_joins, 3, (culprits, error, is_deepspeeds)).wait(30)
    assert done.exit_codes == [code * (rank in culprits) for rank in range(3)]
    assert re.findall(TOLD, done.stderr) == ["error: " if code > 1 else "Traceback"] and said in done.stderr


@pytest.mark.parametrize("mode", [0o755, 0o777, None])
def test_ranks_meet_in_a_folder_that_nobody_else_can_read_or_write(tmp_path, monkeypatch, mode):
    """None: somebody else has put a link there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = (1, True, timedelta(seconds=1))
    ranks_module._find_store(*arguments).set("name", "value")
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    if mode is None:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(mode)
    with pytest.raises(UserError, match=str(folder)):
        ranks_module._find_store(*arguments)


def meets(logs: str, folder: str) -> None:
    """In a rank's process, which lives until it is killed."""
    os.environ["TMPDIR"] = folder
    ranks_module._find_store(1, True, timedelta(seconds=1)).set("name", "value")
    print("met", flush=True)
    time.sleep(60)


def test_what_ranks_that_were_killed_have_met_in_is_removed_and_that_of_living_ones_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    dead, living = others = [launch.Run(meets, 1, (str(tmp_path),)) for _ in range(2)]
    assert all(other.wait_for("met") for other in others)
    dead.kill()
    dead.wait()
    ranks_module._find_store(1, True, timedelta(seconds=1))
    found = {path.name.partition("-")[0] for path in tmp_path.glob("*/*-*")}
    living.kill()
    assert found == {str(os.getpid()), str(living.processes[0].pid)}


def some_come(logs: str, absent: int, port: int | None) -> None:
    """In a rank's process. port: each rank is a host of its own."""
    if port:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if int(os.environ["RANK"]) != absent:
        main_with_exit_codes(lambda: ranks_module.start(TIMEOUT / 60))()


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("is_one_host", [True, False])
def test_a_rank_that_never_comes_ends_the_others_within_the_time_out_and_is_named(absent, is_one_host):
    done = launch.Run(some_come, 3, (absent, None if is_one_host else launch.free_port())).wait(60)
    assert done.exit_codes == [int(rank != absent) for rank in range(3)]
    named = f"rank {absent} did not come" if is_one_host or absent else "127.0.0.1"
    assert named in done.stderr and "Traceback" not in done.stderr, done  # torch's sockets say more


def check_that_nothing_listens_beyond_this_host(pid_of_launcher: int) -> None:
    processes = [psutil.Process(pid_of_launcher), *psutil.Process(pid_of_launcher).children(recursive=True)]
    sockets = [socket for process in processes for socket in process.net_connections("inet")]
    listening = [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN]
    assert len(processes) >= 3 and len(listening) >= 2 and {*listening} <= {"127.0.0.1", "::1"}


def test_on_one_host_nothing_listens_beyond_it(tiny_llama, sft_data, tmp_path):
    """Under run.sh; under deepspeed: test_resume's test of the real launcher."""
    flags = launch.flags(tiny_llama, sft_data, tmp_path, max_train_steps=100_000)
    command = [sys.executable, "-m", "common.verbs", "launch", "sft", "2", *launch.argv(flags)]
    environment = os.environ | launch.CPU_ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=launch.REPO, env=environment, **pipes) as started:
        assert any(line.startswith("step 2/") for line in started.stdout)
        try:
            check_that_nothing_listens_beyond_this_host(started.pid)
        finally:
            for process in [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]:
                process.kill()


def loses_a_rank(ranks, how: str, culprit: int, end: str) -> None:
    def work() -> None:
        if ranks.rank == culprit:
            time.sleep(60) if end == "sleeps" else os.kill(os.getpid(), getattr(signal, end))
        time.sleep(60 if how == "once" else 0)

    group = deepspeed.comm.new_group([*range(ranks.world_size)])
    ranks.gather(lambda: None)  # all are there
    ranks.step = 7
    if how in ("deepspeed", "async") or (how == "once" and culprit == 1 and ranks.rank == 1):
        work()
    if how == "deepspeed":  # a group that DeepSpeed made
        torch.distributed.all_reduce(torch.ones(1), group=group)
    if how == "async":
        works = [torch.distributed.all_reduce(torch.ones(n), async_op=True) for n in (1, 1000)]
        [work.wait() for work in reversed(works)]  # the first one's time-out is the end of the second
    if how == "gpu":  # as where NCCL's part of a collective is under way on the others' GPUs
        torch.cuda.is_initialized, torch.cuda.get_allocator_backend = lambda: True, lambda: "native"
        torch.cuda.memory_stats = lambda device: {"allocation.all.allocated": 1}
        ranks.stream = SimpleNamespace(query=lambda: ranks.rank == culprit)
        time.sleep(60)
    ranks.sum([work() or 1]) if how == "sum" else getattr(ranks, how)(work)


LOST = [("gather", 1, "SIGKILL"), ("once", 0, "SIGKILL"), ("sum", 1, "SIGKILL"), ("gather", 0, "SIGSTOP")]
LOST += [("once", 1, "SIGSTOP"), ("once", 0, "SIGSTOP"), ("gather", 1, "sleeps"), ("deepspeed", 1, "sleeps")]
LOST += [("async", 1, "sleeps"), ("gpu", 0, "sleeps"), ("gpu", 2, "sleeps")]


@pytest.mark.parametrize(("how", "culprit", "end"), LOST)
def test_a_rank_that_is_lost_ends_the_others_with_one_line_that_names_it_and_its_step(how, culprit, end):
    """At once where it dies; within the time-out where it is stopped or busy, also while another rank works."""
    run_ = launch.Run(run, 3, (loses_a_rank, how, culprit, end))
    started = time.monotonic()
    others = [process for rank, process in enumerate(run_.processes) if rank != culprit]
    for other in others:
        other.join(60)
    seconds = time.monotonic() - started
    run_.kill()
    done = run_.wait(10)
    assert [code for rank, code in enumerate(done.exit_codes) if rank != culprit] == [1, 1], done
    assert seconds < TIMEOUT + (4 if end == "SIGSTOP" else 10)  # the ranks' start included
    assert done.stderr.count(f"rank {culprit} was last seen ") == 1 == done.stderr.count("\n"), done
    assert ", in step 7: " in done.stderr and "error: " not in done.stderr
