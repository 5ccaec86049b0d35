"""The process group: which rank this is, what ranks learn of each other, and how one that hangs is noticed."""

import itertools
import math
import os
import re
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from common.failures import UserError, as_user_error, explained, log_libraries, one_line, print_line
from common.files import digest, held, locked, remove_dead

LONGEST_PAUSE = 0.5  # seconds between two looks at whether one rank's work is done
LONGEST_SILENCE = 30.0  # seconds between two signs of life of a rank that is well
LONGEST_LOOK = 15.0  # seconds that the store may take to answer
PATIENCE = 0.9  # of the time-out: a rank that has been silent for so long is lost, or a GPU that has waited for one
WAITS = " (its GPU waits)"
OURS = tuple(str(Path(__file__).resolve().parents[1] / name) for name in ("common", "train_"))


@dataclass
class Ranks:
    """This process among the others: rank of world_size, local_rank of local_world_size on its node.

    control: a gloo group of all ranks. A rank that dies closes its connections, which the others notice at once.
    store: where a thread of each rank says again and again what the rank does. A rank that is stopped falls silent, and
    before collective_timeout_minutes are over the others name it and end. One that is busy with something else speaks
    on: those whose GPUs wait for its part in a collective find that out by themselves, for NCCL ends them late.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup
    store: dist.Store
    stream: "torch.cuda.Stream | None" = None  # on which a GPU computes; another thread has to be told
    step: int = 0  # that this rank is in, which the loop sets; 0: before the first
    seen: dict[int, tuple[float, str]] = field(default_factory=dict)  # rank -> (when it said something new, that)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_hosts(self) -> int:
        return self.world_size // self.local_world_size

    def say(self, text: str, is_live: bool = False) -> None:
        """Prints from one rank."""
        if self.is_main:
            print_line(text, is_live=is_live)

    def sum(self, values: list[float]) -> list[float]:
        """The sums of `values` over all ranks, in float64; every rank gets the same bits."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, work: Callable[[], object]) -> list:
        """Runs `work` on every rank; every rank gets all results in rank order, or raises the first rank's error."""
        result, error, told = None, None, None
        try:
            result = work()
        except Exception as e:  # whatever it is, the other ranks must not wait for this one
            error, told = e, explained(e) or RuntimeError(one_line(repr(e)))
        outcomes: list = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, told), group=self.control)
        for rank, (_, told) in enumerate(outcomes):
            if error and rank == self.rank:
                raise error
            if told:
                told.is_told = True  # by that rank
                raise told
        return [result for result, _ in outcomes]

    def once(self, work: Callable[[], object]):
        """Runs `work` on rank 0 alone, for however long; every rank gets its result, or raises its error."""
        return self._while_others_wait(work, self.is_main)[0]

    def once_per_node(self, work: Callable[[], object]):
        """As once, on one rank of each node; every rank gets its own node's result."""
        return self._while_others_wait(work, self.local_rank == 0)[self.rank - self.local_rank]

    def on_all(self, work: Callable[[], object]) -> list:
        """As once, but every rank runs `work`; every rank gets all results in rank order, or raises the first error."""
        return self._while_others_wait(work, True)

    def _while_others_wait(self, work: Callable[[], object], is_worker: bool) -> list:
        """No rank waits longer than the time-out: a thread works, and the ranks meet until it is done."""
        thread = ThreadPoolExecutor(1)
        future = thread.submit(work if is_worker else lambda: None)
        pause, busy = 0.001, torch.ones(1, dtype=torch.int32)
        while busy.item():
            wait([future], pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            busy = torch.tensor([not future.done()], dtype=torch.int32)  # the work may change torch's default type
            dist.all_reduce(busy, group=self.control)
        thread.shutdown(wait=False)
        return self.gather(future.result)

    # ------------------------------------------------------------------ a rank that is lost
    @property
    def when(self) -> str:
        return f"in step {self.step}" if self.step else "before the first step"

    def look(self, tick: int, waits: bool = False) -> None:
        """Says what this rank does, and reads what the others say. tick: another one each time; waits: its GPU does.

        Across hosts rank 0 holds the store: where it is out of reach nothing is known of the others.
        """
        now, host = time.monotonic(), f" on {socket.gethostname()}" if self.num_hosts > 1 else ""

        def look() -> bool:
            self.store.set(f"rank {self.rank}", f"{tick} {self.when}{host}, {_place()}{WAITS * waits}")
            for rank in range(self.world_size):
                text = self.store.get(f"rank {rank}").decode()  # all have said something before they joined
                if self.seen.get(rank, (now, ""))[1] != text:
                    self.seen[rank] = (now, text)
            return True

        if not in_time(look, False):
            now = time.monotonic()
            self.seen |= {rank: (now, text) for rank, (_, text) in self.seen.items() if rank > 0}

    def last_seen(self, ranks: list[int]) -> str:
        """What these ranks last said that they do; at most four of them."""
        return "; ".join(f"rank {rank} was last seen {self.seen[rank][1].partition(' ')[2]}" for rank in ranks[:4])

    def _gpu_waits(self, num_given: int) -> tuple[bool, int]:
        """Whether this rank's GPU has something left to do and was given nothing more since the last look; and what it
        was given until now, which num_given is of that look: whatever gives it work takes memory first, which torch's
        own allocator counts."""
        if not torch.cuda.is_initialized() or torch.cuda.get_allocator_backend() != "native":
            return False, 0
        now_given = torch.cuda.memory_stats(self.device)["allocation.all.allocated"]
        return now_given == num_given and not (self.stream is None or self.stream.query()), now_given

    def watch(self, limit: float) -> None:
        """Ends this process, with a line from one rank, once another is silent, or missed, for `limit` seconds."""
        waits_since, num_given = math.inf, 0  # monotonic seconds; inf: its GPU is not waiting
        for tick in itertools.count(1):
            waits, num_given = self._gpu_waits(num_given)
            waits_since = min(waits_since, time.monotonic()) if waits else math.inf
            self.look(tick, waits)
            now, told = time.monotonic(), ""
            if silent := [rank for rank, (when, _) in self.seen.items() if now - when > limit]:
                told = f"no sign of life for {limit / 60:.2g} minutes: {self.last_seen(silent)}"
                is_teller = self.rank == min({*range(self.world_size)} - {*silent})
            elif now - waits_since > limit:
                busy = [rank for rank, (_, text) in self.seen.items() if rank != self.rank and not text.endswith(WAITS)]
                told = f"no part in a collective for {limit / 60:.2g} minutes: {self.last_seen(busy)}"
                is_teller = is_first_to_tell("a GPU waits")
            if told:
                if is_teller:
                    print_line(f"rank {self.rank}, {self.when}: {told}", sys.stderr)
                os._exit(1)  # the main thread waits for a rank that does not come
            time.sleep(min(LONGEST_SILENCE, limit / 20))


def in_time(work: Callable[[], bool], otherwise: bool) -> bool:
    """What `work`, which asks the store, gives within LONGEST_LOOK seconds: once the way there is cut TCP waits for
    longer than any time-out. `otherwise` where the store has gone, or there is no place for one."""
    result: list[bool] = []

    def ask() -> None:
        with suppress(dist.DistError, UserError, OSError):
            result.append(work())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LONGEST_LOOK)
    return result[0] if result else otherwise


def _place() -> str:
    """`file, line N: code` of the line of this project, outside this file, that the main thread is in."""
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    ours = [frame for frame in frames if frame.filename.startswith(OURS) and frame.filename != __file__]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"


# ---------------------------------------------------------------------- joining and leaving
_joined: Ranks | None = None  # the group that this process is in
_held: list[TextIO] = []  # as long as this process lives


def _local_world_size() -> int:
    """How many ranks this host's launcher has started: torchrun's name for it, or DeepSpeed's."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_first_to_tell(text: str) -> bool:
    """Whether no other rank has told this: what several ranks find out is told once. Before they have joined, once on
    each host."""

    def is_first() -> bool:
        store = _joined.store if _joined else _file_store(_local_world_size(), "told")
        return store.add(f"told {digest(text.encode())}", 1) == 1

    return in_time(is_first, otherwise=os.environ.get("LOCAL_RANK", "0") == "0")


def lost(error: str) -> str:
    """What to say of an error that comes of another rank's end: where this rank is, and where the others were."""
    if _joined is None:
        return error
    _joined.look(-1)
    others = _joined.last_seen([rank for rank in _joined.seen if rank != _joined.rank])
    return f"rank {_joined.rank}, {_joined.when}: another rank has ended or hangs: {error}; {others}"


def _find_store(world_size: int, is_one_host: bool, timeout: timedelta) -> dist.Store:
    """Where the ranks of a launcher find each other's addresses: on one host in a file, so that nothing listens; across
    hosts torch's TCPStore, which listens at MASTER_ADDR. Raises DistError where rank 0 does not come."""
    if is_one_host:
        return _file_store(world_size, "ranks")
    with as_user_error("the ranks of several hosts meet at MASTER_ADDR and MASTER_PORT of rank 0's", ValueError):
        # Of one rank: a store of more waits for all, and does not say which have not come. torch tries it twice.
        return next(dist.rendezvous("env://", int(os.environ["RANK"]), 1, timeout=timeout / 2))[0]


def _file_store(num_ranks: int, purpose: str) -> dist.Store:
    """A file of this host's ranks that nobody else can read or write. The launcher is the parent of all of them: its
    pid and the time of its start name the file's folder, which goes once they have ended and another run begins. Raises
    UserError for a folder of somebody else's."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"plaintune-{os.getuid()}")
    with as_user_error(f"{folder}: must be a folder that is yours alone (mode 700)"):
        folder.mkdir(mode=0o700, exist_ok=True)
        if (found := folder.lstat()).st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise PermissionError("it is not")
    launcher = os.getppid() if num_ranks > 1 else os.getpid()
    started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = folder / f"{launcher}-{started}-{restarts}"
    with locked(folder / ".lock", lambda: None):
        remove_dead(other for other in folder.glob("*-*") if other != own)
        _held.append(held(own))
    return dist.FileStore(str(own / purpose), num_ranks)


def _of_srun() -> dict[str, str]:
    """What torchrun's environment would say of a task that Slurm's srun has started; {} elsewhere."""
    given = os.environ
    if "SLURM_STEP_ID" not in given or given.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    on_nodes: list[str] = []  # of `4(x2),3`: 4, 4, 3
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given["SLURM_STEP_TASKS_PER_NODE"]):
        on_nodes += [number] * int(times or 1)
    names = {"RANK": given["SLURM_PROCID"], "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"]}
    return names | {"LOCAL_RANK": given["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": on_nodes[int(given["SLURM_NODEID"])]}


def way_to_other_hosts() -> str:
    """The interface that the environment names, or this host's address on the way to MASTER_ADDR."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in os.environ:
            return f"{os.environ[name]} ({name})"
    family, kind, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # sends nothing
        probe.connect(address)
        return f"{probe.getsockname()[0]} (the way to MASTER_ADDR)"


def start(timeout_minutes: float) -> Ranks:
    """Joins the group that the launcher's environment names, else one of one. No wait in it exceeds the time-out."""
    global _joined
    import deepspeed
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    log_libraries()
    if "RANK" not in os.environ:
        os.environ |= _of_srun() or dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world_size = _local_world_size()
    is_one_host = local_world_size == world_size
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if is_one_host else ():
        os.environ.setdefault(name, "lo")  # nothing listens beyond the host, no name is looked up
    # Row lengths differ from micro-batch to micro-batch: segments that grow leave no holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, backend, stream = torch.device("cpu"), "gloo", None
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        with as_user_error(f"rank {rank} has no GPU of its own: start no more ranks than there are GPUs"):
            torch.cuda.set_device(device)
        # Not CUDA's default stream, which was seen to wait until the update's had caught up.
        stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(stream)
        deepspeed.accelerator.get_accelerator().default_stream = lambda device_index=None: stream  # DeepSpeed's too
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        # DeepSpeed's shared-memory collectives are compiled on first use; gloo is as fast here and needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    os.environ["DEEPSPEED_TIMEOUT"] = str(timeout_minutes)
    store = _find_store(world_size, is_one_host, timeout)
    store.set_timeout(timeout)
    host = "" if is_one_host else f" on {socket.gethostname()}"
    store.set(f"rank {rank}", f"0 before the first step{host}, joining the others")
    names = [f"rank {other}" for other in range(world_size)]
    try:
        store.wait(names)
    except RuntimeError as e:  # a DistError, but of a file's store
        missing = ", ".join(name for name in names if not store.check([name]))
        raise dist.DistError(f"{missing} did not come in {timeout_minutes:.2g} minutes") from e
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    TorchBackend.new_group = lambda _, ranks: dist.new_group(ranks, timeout)  # DeepSpeed's has the backend's default
    control = dist.new_group(backend="gloo", timeout=timeout)
    own_store = store.clone()  # a thread of its own waits in it, for seconds at most
    own_store.set_timeout(timedelta(seconds=10))
    _joined = Ranks(rank, world_size, local_rank, local_world_size, device, control, own_store, stream)
    if world_size > 1:
        threading.Thread(target=_joined.watch, args=[PATIENCE * 60 * timeout_minutes], daemon=True).start()
    return _joined
