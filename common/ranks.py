"""The process group, what ranks agree on, how they stop, and how a run exits."""

import contextlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from common.failures import TrainingStopped, UserError, full_disk, print_line

LONG = timedelta(days=7)  # of the rendezvous store; Ranks itself watches that the others are alive
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


def started() -> Ranks | None:
    return _started


def start(timeout_minutes: int) -> Ranks:
    """Joins the process group that the launcher's environment names; without a launcher, a group of one."""
    deepspeed_logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated.*", category=FutureWarning)
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    local_rank = int(os.environ["LOCAL_RANK"])
    # Row lengths differ from micro-batch to micro-batch: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {os.environ['RANK']} has no GPU of its own: "
                f"{torch.cuda.device_count()} are visible here; start fewer processes"
            )
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
        alone = UserError(
            f"the {os.environ['WORLD_SIZE']} ranks did not come together at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_minutes} minutes: {str(e).splitlines()[0][:200]}"
        )
        alone.on_this_rank_only = True
        raise alone from e
    store.set_timeout(LONG)
    os.environ["DEEPSPEED_TIMEOUT"] = str(timeout_minutes)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
    )
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    global _started
    _started = Ranks(
        rank, world_size, local_rank, local_world_size, device, dist.PrefixStore("plaintune", store), timeout
    )
    return _started
