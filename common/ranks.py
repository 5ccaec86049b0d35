"""The process group: which rank this is, and how ranks learn what one of them found out."""

import os
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.failures import UserError, as_user_error, explained, one_line, print_line

LONGEST_PAUSE = 0.5  # seconds between two looks at whether one rank's work is done


@dataclass
class Ranks:
    """This process among the others: rank of world_size, local_rank of local_world_size on its node.

    control: a gloo group of all ranks, in host memory. A rank that dies closes its connections, so the others notice at
    once; one that hangs is noticed when the group's time-out, collective_timeout_minutes, has passed.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup

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

    def gather(self, work: Callable[[], object]) -> list:
        """Runs `work` on every rank; every rank gets all results in rank order, or raises the first rank's error."""
        result = error = failure = None
        try:
            result = work()
        except Exception as e:  # whatever it is, the other ranks must not wait for this one
            error, known = e, explained(e)
            failure = (type(known), str(known)) if known else (RuntimeError, f"rank {self.rank}: {one_line(repr(e))}")
        outcomes: list = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, failure), group=self.control)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                kind, text = failure
                told = error if rank == self.rank else kind(text)
                told.told_here = rank == self.rank
                raise told
        return [result for result, _ in outcomes]

    def once(self, work: Callable[[], object]):
        """Runs `work` on rank 0 alone, for however long; every rank gets its result, or raises its error."""
        return self._while_others_wait(work, self.is_main)[0]

    def once_per_node(self, work: Callable[[], object]):
        """As once, on one rank of each node; every rank gets its own node's result."""
        return self._while_others_wait(work, self.local_rank == 0)[self.rank - self.local_rank]

    def _while_others_wait(self, work: Callable[[], object], is_worker: bool) -> list:
        """Work may take hours, and no rank waits longer than the time-out for another: a thread works, and the ranks
        meet again and again until it is done."""
        thread = ThreadPoolExecutor(1)
        future = thread.submit(work) if is_worker else None
        pause, busy = 0.001, torch.ones(1, dtype=torch.int32)
        while busy.item():
            if future is None:
                time.sleep(pause)
            else:
                wait_for([future], pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            is_busy = future is not None and not future.done()
            busy = torch.tensor([is_busy], dtype=torch.int32)  # the work may change torch's default, as a load does
            dist.all_reduce(busy, group=self.control)
        thread.shutdown(wait=False)
        return self.gather(lambda: future.result() if future else None)


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(timeout_minutes: float) -> Ranks:
    """Joins the process group that the launcher's environment names; without a launcher, a group of one."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    for noise in (".*torch.distributed.*is deprecated.*", r"barrier\(\): using the device under current context.*"):
        warnings.filterwarnings("ignore", message=noise)
    if "RANK" not in os.environ:
        alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        os.environ.update(alone)
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if local_world_size == world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: nothing listens beyond it, no name is looked up
    # Row lengths differ from micro-batch to micro-batch: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"rank {rank} has no GPU of its own: {found} are visible here; start fewer processes")
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, num_cpus() // local_world_size))
        # DeepSpeed's shared-memory collectives are compiled on first use; gloo is as fast here and needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    os.environ["DEEPSPEED_TIMEOUT"] = str(timeout_minutes)
    try:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        with as_user_error(f"the {world_size} ranks did not come together at {address} in {timeout_minutes} minutes"):
            dist.init_process_group(backend, timeout=timeout)
    except UserError as e:
        e.told_here = True
        raise
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, world_size, local_rank, local_world_size, device, control)
