"""The process group: which rank this is, and how ranks learn what one of them found out."""

import errno
import os
import stat
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common.failures import ElsewhereError, as_user_error, explained, one_line, print_line
from common.files import digest

LONGEST_PAUSE = 0.5  # seconds between two looks at whether one rank's work is done


@dataclass
class Ranks:
    """This process among the others: rank of world_size, local_rank of local_world_size on its node.

    control: a gloo group of all ranks. A rank that dies closes its connections, which the others notice at once; one
    that hangs they notice after collective_timeout_minutes.
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
        result, error, failure = None, None, None
        try:
            result = work()
        except Exception as e:  # whatever it is, the other ranks must not wait for this one
            error, known = e, explained(e)
            failure = (type(known), str(known)) if known else (ElsewhereError, one_line(repr(e)))
        outcomes: list = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, failure), group=self.control)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                kind, text = failure
                raise error if error and rank == self.rank else kind(text)
        return [result for result, _ in outcomes]

    def once(self, work: Callable[[], object]):
        """Runs `work` on rank 0 alone, for however long; every rank gets its result, or raises its error."""
        return self._while_others_wait(work, self.is_main)[0]

    def once_per_node(self, work: Callable[[], object]):
        """As once, on one rank of each node; every rank gets its own node's result."""
        return self._while_others_wait(work, self.local_rank == 0)[self.rank - self.local_rank]

    def _while_others_wait(self, work: Callable[[], object], is_worker: bool) -> list:
        """No rank waits longer than the time-out: a thread works, and the ranks meet until it is done."""
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


_store: dist.Store | None = None  # of the group that this process has joined


def is_first_to_tell(text: str) -> bool:
    """Whether no other rank has told this: what several ranks find out is told once. Before they are a group, the first
    rank of each host tells."""
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store.add(f"told {digest(text.encode())}", 1) == 1
    except dist.DistError:  # the store has gone with rank 0
        return True


def _find_store(world_size: int, is_one_host: bool, timeout: timedelta) -> dist.Store:
    """Where the ranks of a launcher find each other's addresses. Raises UserError for a folder of somebody else's.

    On one host a file that nobody else can read or write, so that nothing listens; across hosts torch's TCPStore, which
    listens at MASTER_ADDR. The launcher is the parent of all ranks: its pid and the time of its start name the file.
    """
    if not is_one_host:
        return next(dist.rendezvous("env://", timeout=timeout))[0]
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"plaintune-{os.getuid()}")
    with as_user_error(f"{folder}: must be a folder that is yours alone (mode 700)"):
        folder.mkdir(mode=0o700, exist_ok=True)
        if (found := folder.lstat()).st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    launcher = os.getppid() if world_size > 1 else os.getpid()
    started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.FileStore(str(folder / f"{launcher}-{started}-{restarts}"), world_size)
    store.set_timeout(timeout)
    return store


def start(timeout_minutes: float) -> Ranks:
    """Joins the process group that the launcher's environment names; without a launcher, a group of one."""
    global _store
    import deepspeed
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    for noise in (".*torch.distributed.*is deprecated.*", r"barrier\(\): using the device under current context.*"):
        warnings.filterwarnings("ignore", message=noise)
    if "RANK" not in os.environ:
        os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    is_one_host = local_world_size == world_size
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if is_one_host else ():
        os.environ.setdefault(name, "lo")  # nothing listens beyond the host, no name is looked up
    # Row lengths differ from micro-batch to micro-batch: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        with as_user_error(f"rank {rank} has no GPU of its own: start no more ranks than there are GPUs"):
            torch.cuda.set_device(device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        # DeepSpeed's shared-memory collectives are compiled on first use; gloo is as fast here and needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    os.environ["DEEPSPEED_TIMEOUT"] = str(timeout_minutes)
    with as_user_error(f"the {world_size} ranks did not come together in {timeout_minutes} minutes"):
        _store = _find_store(world_size, is_one_host, timeout)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    TorchBackend.new_group = lambda _, ranks: dist.new_group(ranks, timeout)  # DeepSpeed's has the backend's default
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank, world_size, local_rank, local_world_size, device, control)
