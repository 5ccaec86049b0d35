"""The process group, what ranks agree on, how they stop, and how a run exits."""

import contextlib
import functools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from common.errors import TrainingStopped, UserError, full_disk, is_out_of_memory, print_line

LONG = timedelta(days=7)  # of the rendezvous store; Ranks itself watches that the others are alive
SAME_REQUEST = 2.0  # seconds
LINGER = 5.0  # seconds that rank 0 waits for the others to leave first


@dataclass
class Ranks:
    """This process among the others: rank of world_size, local_rank of local_world_size on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store
    timeout: timedelta  # how long a rank that shows no sign of life is waited for
    num_calls: int = 0
    is_leaving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        """Shows the others that this process lives, whatever it does."""
        with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, has gone
            while not self.is_leaving.is_set():
                self.store.add(f"alive/{self.rank}", 1)
                self.is_leaving.wait(min(10.0, self.timeout.total_seconds() / 4))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints from one rank."""
        if self.is_main:
            print_line(text)

    def sum(self, values: list[float]) -> list[float]:
        """The sums of `values` over all ranks, in float64; every rank gets the same bits."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def once_per_node(self, work: Callable[[], object]):
        """Runs `work` on one rank of each node; every rank gets its JSON-able result, or its UserError.

        The others wait on the rendezvous store, not in a collective: work may take hours, if the rank lives.
        """
        return self._once(work, self.rank - self.local_rank)

    def once(self, work: Callable[[], object]):
        """Runs `work` on rank 0 alone; as once_per_node."""
        return self._once(work, 0)

    def gather(self, work: Callable[[], object]) -> list:
        """Runs `work` on every rank; every rank gets all JSON-able results in rank order, or the first error."""
        self.num_calls += 1
        self._offer(f"gather/{self.num_calls}/{self.rank}", work)
        return [self._take(f"gather/{self.num_calls}/{rank}", rank) for rank in range(self.world_size)]

    def _once(self, work: Callable[[], object], worker: int):
        self.num_calls += 1
        key = f"once/{self.num_calls}/{worker}"
        if self.rank == worker:
            self._offer(key, work)
        return self._take(key, worker)

    def _offer(self, key: str, work: Callable[[], object]) -> None:
        try:
            outcome = {"result": work()}
        except Exception as e:
            told = e if isinstance(e, (UserError, TrainingStopped)) else full_disk(e)
            if told is None:
                raise
            outcome = {"error": str(told), "exit_code": told.EXIT_CODE}
        self.store.set(key, json.dumps(outcome))

    def _take(self, key: str, worker: int):
        beats, seen_at, pause = 0, time.monotonic(), 0.001
        while not self.store.check([key]):
            if (now := self.store.add(f"alive/{worker}", 0)) != beats:
                beats, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > self.timeout.total_seconds():
                raise RuntimeError(f"rank {worker} has shown no sign of life for {self.timeout}")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        outcome = json.loads(self.store.get(key))
        if "error" in outcome:
            raise (UserError if outcome["exit_code"] == UserError.EXIT_CODE else TrainingStopped)(outcome["error"])
        return outcome["result"]

    def leave(self) -> None:
        """Call before exiting. Rank 0 serves the store and goes last: others may still be reading from it."""
        self.is_leaving.set()
        with contextlib.suppress(RuntimeError):
            num_left, deadline = self.store.add("left", 1), time.monotonic() + LINGER
            while self.is_main and num_left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.01)
                num_left = self.store.add("left", 0)


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


_started: Ranks | None = None


def start(timeout_minutes: int) -> Ranks:
    """Joins the process group that the launcher's environment names; without a launcher, a group of one."""
    deepspeed_logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    local_rank = int(os.environ["LOCAL_RANK"])
    # Row lengths differ from micro-batch to micro-batch: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {os.environ['RANK']} has no GPU of its own: "
                            f"{torch.cuda.device_count()} are visible here; start fewer processes")
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, num_cpus() // local_world_size))
        # DeepSpeed's shared-memory collectives are compiled on first use; gloo is as fast here and needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    except RuntimeError as e:
        alone = UserError(f"the {os.environ['WORLD_SIZE']} ranks did not come together at {os.environ['MASTER_ADDR']}:"
                          f"{os.environ['MASTER_PORT']} within {timeout_minutes} minutes: {str(e).splitlines()[0][:200]}")
        alone.on_this_rank_only = True
        raise alone from e
    store.set_timeout(LONG)
    os.environ["DEEPSPEED_TIMEOUT"] = str(timeout_minutes)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size,
                            timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    global _started
    _started = Ranks(rank, world_size, local_rank, local_world_size, device, dist.PrefixStore("plaintune", store),
                     timeout)
    return _started


def main_with_exit_codes(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a script's main: INTERFACE's exit codes, one `error:` line from one rank, no traceback for 2 and 3."""
    @functools.wraps(main)
    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training there is nothing to save
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not be able to show every sample
        code = 0
        try:
            main()
        except (UserError, TrainingStopped) as e:
            code = e.EXIT_CODE
            if os.environ.get("RANK", "0") == "0" or getattr(e, "on_this_rank_only", False):
                print_line(f"error: {e}", sys.stderr)
        except Stopped as e:
            code = 128 + e.signal_number
        except Exception as e:
            if (stopped := full_disk(e)) is not None:
                code = stopped.EXIT_CODE
                print_line(f"error: {stopped}", sys.stderr)
            elif is_out_of_memory(e):
                code = TrainingStopped.EXIT_CODE
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                rank = os.environ.get("RANK", "0")
                print_line(f"error: rank {rank}: out of memory before or after a micro-batch ({reason}): the model and its "
                           f"optimizer need more devices, or a --ds_config that offloads", sys.stderr)
            else:
                code = 1
                print_line(traceback.format_exc(), sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            print_line("", stream, end="")
        if _started is not None:
            _started.leave()
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
        if code and dist.is_initialized():
            os._exit(code)  # the other ranks may sit in a collective: no clean-up can wait for them
        raise SystemExit(code)
    return run


class Stopped(Exception):
    """The run was asked to stop, and has written its checkpoint."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """Remembers SIGTERM or SIGINT until the ranks agree on it at a step boundary.

    Before training nothing is lost by stopping at once, so handlers are installed when the loop starts.
    A request that repeats before it was answered, or within SAME_REQUEST seconds of that (a terminal's Ctrl-C
    arrives from the terminal and again from the launcher), is the same request; a later one leaves at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.signal_number = 0
        self.answered_at = math.inf  # time.monotonic()
        self.is_exporting = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        if "PLAINTUNE_RUN_SH" not in os.environ and {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
            ranks.say("note: this launcher, when it is asked to stop, gives the ranks 30 s, which may not do for a "
                      "checkpoint: the last periodic one stands then. `bash run.sh` waits for as long as it takes")

    def _receive(self, number: int, frame) -> None:
        if time.monotonic() > self.answered_at + SAME_REQUEST:
            os._exit(128 + number)
        self.signal_number = self.signal_number or number
        if self.is_exporting:
            self._answer_export_first()

    def _answer_export_first(self) -> None:
        if self.answered_at == math.inf:
            self.answered_at = time.monotonic()
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(1, b"asked to stop: the steps are done; writing the model first; ask again to leave now\n")

    def wait_for_export(self) -> None:
        """From here on there is no step boundary to come: a request waits for the export, a second one does not."""
        self.is_exporting = True
        if self.signal_number:  # it came after the ranks' last vote
            self._answer_export_first()

    def votes(self) -> tuple[int, int]:
        """(1, 0) if this rank was asked by SIGTERM, (0, 1) if by SIGINT: ranks add them up and agree."""
        return int(self.signal_number == signal.SIGTERM), int(self.signal_number == signal.SIGINT)

    def agreed(self, terminate: float, interrupt: float, ranks: Ranks) -> int:
        """The signal to stop for, 0 to go on, from the sums of all ranks' votes; the same on every rank."""
        if not terminate and not interrupt:
            return 0
        self.answered_at = time.monotonic()
        ranks.say("asked to stop: writing a checkpoint first; ask again to leave without it")
        return signal.SIGTERM if terminate else signal.SIGINT
