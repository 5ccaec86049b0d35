"""How master weights and moments are kept, and their way from host memory to the device and back. Knows nothing of
DeepSpeed.

Of the master weight M of a bfloat16 model only what its rounding W has lost is kept, for W is on the device: with the
bits of both read as integers, M = 2^16 W + lost, where -2^15 <= lost <= 2^15, as bfloat16 rounds to the nearest. One
number more than 16 bits hold: 2^15, where M was midway and rounded down, is kept as -2^15 and the sign of exp_avg_sq,
which is never negative itself. So the state takes 10 bytes a parameter, of a float32 model 12. A link between host and
device moves some 50 GB/s each way at once, and an update of what lies in host memory takes the time of its bytes.
On a GPU, copies run on two streams of their own, from and to memory that is pinned: a chunk arrives while the one
before it is updated and the one before that is written back. On a CPU the same chunks are copied, one after another.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.dlpack import to_dlpack

from common.failures import as_user_error

CHUNK_ELEMENTS = 2**24  # parameters whose state is brought at once: 0.2 GB
ALIGNED = 64  # elements
RING_BUFFERS = 8  # on the device, of one chunk each
FREE_MEMORY_USES = 4  # chunks that memory which activations have given up takes: the next forward pass needs it
TOUCHED_AT_ONCE = 2**27  # elements
MIDWAY = 2**15


def words(numel: int, itemsize: int) -> int:
    """float32 elements that hold the state of numel parameters, of a model whose parameters have itemsize bytes."""
    return 2 * numel + (-(-numel // 2) if itemsize == 2 else numel)


def in_chunks(room: int, chunk: int) -> int:
    """What of `room` whole chunks take."""
    return room // chunk * chunk if chunk else 0


def places_in(memory: torch.Tensor, numel: int, itemsize: int, stride: int) -> tuple[torch.Tensor, ...]:
    """A state's three parts [numel] in memory float32 [words]: what is kept of master weights, of itemsize bytes each,
    exp_avg and exp_avg_sq. stride: elements from the beginning of one to that of the next."""
    exp_avg, exp_avg_sq, rest = memory[:numel], memory[stride : stride + numel], memory[2 * stride :]
    return rest.view(torch.int16 if itemsize == 2 else torch.float32)[:numel], exp_avg, exp_avg_sq


def take_apart(master: torch.Tensor, weight: torch.Tensor, lost: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
    """Writes to lost int16 [n] what weight bfloat16 [n], the rounded master float32 [n], has lost, and to exp_avg_sq
    float32 [n] its sign."""
    exact = master.view(torch.int32) - (weight.view(torch.int16).int() << 16)
    lost.copy_(exact)
    torch.copysign(exp_avg_sq, torch.where(exact == MIDWAY, -1.0, 1.0), out=exp_avg_sq)


def put_together(weight: torch.Tensor, lost: torch.Tensor, exp_avg_sq: torch.Tensor) -> torch.Tensor:
    """The master weights that take_apart got, float32 [n]; exp_avg_sq is as it was before."""
    bits = (weight.view(torch.int16).int() << 16) + lost + (exp_avg_sq.signbit().int() << 16)
    exp_avg_sq.abs_()
    return bits.view(torch.float32)


@cache
def compiled(function: Callable) -> Callable:
    """One kernel in place of ten: else the host, which may be 1,024 of them ahead, waits until the update is done."""
    in_one = torch.compile(function, dynamic=True)
    # Each as a memory of its own: where in which one a view lies would make it a case of its own, compiled in mid-run.
    return lambda *tensors: in_one(*(torch.from_dlpack(to_dlpack(x)) for x in tensors))


@dataclass
class Shard:
    """A rank's shard of a parameter and of its state, each [elements, padding included], wherever it lies."""

    weight: torch.Tensor  # of the model
    master: torch.Tensor  # float32, or int16: what `weight` lost
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor  # never negative but by take_apart

    def read(self, kind: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of `master`, `exp_avg` or `exp_avg_sq`, float32, on the device if any of it is."""
        device = self.master.device if self.master.is_cuda else self.weight.device  # to a CPU it comes too late
        part = getattr(self, kind)[start:end].to(device, non_blocking=True)
        if self.master.dtype == torch.float32 or kind == "exp_avg":
            return part
        if kind == "exp_avg_sq":
            return part.abs()
        exp_avg_sq = self.exp_avg_sq[start:end].to(device, non_blocking=True, copy=True)
        return put_together(self.weight[start:end].to(device), part, exp_avg_sq)

    def write(self, kind: str, start: int, values: torch.Tensor) -> None:
        """values: float32 [n], in host memory. Of a parameter, exp_avg_sq before master."""
        end = start + len(values)
        if self.master.dtype == torch.float32 or kind != "master":
            getattr(self, kind)[start:end].copy_(values)
            return
        values = values.to(self.master.device)
        weight = values.to(self.weight.dtype)
        self.weight[start:end].copy_(weight)
        take_apart(values, weight, self.master[start:end], self.exp_avg_sq[start:end])


def num_on_device(group_sizes: list[int], share: float) -> int:
    """How many of the first groups keep their state on the device: as many as fit in that share of all elements."""
    most = share * sum(group_sizes) + 0.5
    return sum(kept <= most for kept in accumulate(group_sizes))


def available_host_memory(root: Path = Path("/")) -> float:
    """Bytes that this host, or the container in which this process runs, has left."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (root / "sys/fs/cgroup/memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        available = min(available, int(limit.read_text()) - used + cached)
    return available


class HostMemory:
    """A stretch of zeros, float32, in host memory; for a GPU, a thread pins it beside whatever runs meanwhile.

    Other threads touch its pages first, which is what takes the time (0.77 s a GB on one thread). It is pinned as one:
    CUDA copies nothing from memory that was pinned in two pieces.
    """

    def __init__(self, num_elements: int, device: torch.device, num_threads: int = 1):
        self.device = device
        memory = mmap.mmap(-1, max(1, 4 * num_elements), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.unused = torch.frombuffer(memory, dtype=torch.float32, count=num_elements) if num_elements else None
        self.pinning: Future | None = None
        if self.unused is not None:
            self.pinning = ThreadPoolExecutor(1).submit(self._pin, self.unused, num_threads)

    def _pin(self, memory: torch.Tensor, num_threads: int) -> None:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda piece: piece[:: mmap.PAGESIZE // 4].zero_(), memory.split(TOUCHED_AT_ONCE)))
        if self.device.type != "cuda":
            return
        with torch.cuda.device(self.device), as_user_error("host memory for the optimizer's state cannot be pinned"):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), 4 * memory.numel(), 0))

    def wait_until_pinned(self) -> None:
        if self.pinning is not None:
            self.pinning.result()

    def take(self, num_elements: int) -> torch.Tensor:
        """The next num_elements of it, float32 zeros."""
        assert self.unused is not None
        taken, self.unused = self.unused[:num_elements], self.unused[num_elements:]
        assert len(taken) == num_elements
        return taken


@dataclass
class Chunk:
    """A stretch of a group's state. pieces: (parameter of the group, start, end in its shard), one after another."""

    state: tuple[torch.Tensor, ...]  # [n] each (see places_in)
    pieces: list[tuple[int, int, int]]


def chunks_of(state: tuple[torch.Tensor, ...], sizes: list[int]) -> Iterator[Chunk]:
    """state: a group's; sizes: of the shards in it. In order."""
    start = 0
    for pieces in pieces_of(sizes, CHUNK_ELEMENTS):
        end = start + sum(last - first for _, first, last in pieces)
        yield Chunk(tuple(flat[start:end] for flat in state), pieces)
        start = end


def pieces_of(sizes: list[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """The shards of `sizes` elements, in order, cut into chunks of at most `most` elements.

    A shard is cut at multiples of ALIGNED: on a CPU an update rounds a vector's elements in another way than the last
    ones, of which there are too few for a vector.
    """
    pieces, room = [], most
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            end = size if size - start <= room else start + room // ALIGNED * ALIGNED
            if end > start:
                pieces.append((i, start, end))
                start, room = end, room - (end - start)
            if end < size:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


@dataclass(eq=False)
class Buffer:
    """A chunk's place on the device, float32 [words]. uses: how many more chunks it takes. needed: how soon who lent it
    needs it again, the sooner the higher; 0 if nobody did."""

    memory: torch.Tensor
    uses: float = float("inf")
    needed: int = 0
    usable: "torch.cuda.Event | None" = None  # once what used the memory before is done
    arrived: "torch.cuda.Event | None" = None
    updated: "torch.cuda.Event | None" = None


class Carrier:
    """Brings chunks to the device in the order of the update, and writes them back.

    A step's state passes through buffers: a ring that is always there, memory that gradients lend, and what is free
    while a step's last backward pass gives up activations. All of it takes one chunk after another, so that copies run
    both ways all the time, and the sooner a chunk is brought, the sooner the next forward pass can begin.
    memory_limit: bytes that the process may use on the device; None: not known, so nothing is taken as free.
    """

    def __init__(self, device: torch.device):
        self.device, self.is_cuda = device, device.type == "cuda"
        self.memory_limit: float | None = None
        self.by_group: dict[int, list[Chunk]] = {}
        self.inward, self.outward = (torch.cuda.Stream(device) if self.is_cuda else None for _ in range(2))
        self.width = self.words = 0  # elements of the largest chunk; of the memory that it takes
        self.waiting: deque[Chunk] = deque()  # of this step, not yet on their way
        self.brought: deque[tuple[Buffer, Chunk]] = deque()
        self.idle: deque[Buffer] = deque()
        self.in_use: list[Buffer] = []  # of the ring and what is lent: those that take more chunks of this step
        self.used_up: deque[Buffer] = deque()  # given up in the next forward pass, once written back

    def add(self, group: int, state: tuple[torch.Tensor, ...], sizes: list[int]) -> None:
        """Another group, in order, whose state lies in host memory (see chunks_of)."""
        self.by_group[group] = list(chunks_of(state, sizes))
        longest = max(len(chunk.state[0]) for chunk in self.by_group[group])
        self.width = max(self.width, -(-longest // ALIGNED) * ALIGNED)
        self.words = words(self.width, state[0].itemsize)
        self.waiting.extend(self.by_group[group])

    def make_ring(self) -> None:
        """Once all groups are there."""
        for _ in range(min(RING_BUFFERS, len(self.waiting))):
            self.idle.append(Buffer(torch.empty(self.words, device=self.device)))
        self.in_use = list(self.idle)

    def lend(self, memory: torch.Tensor, needed: int) -> list[Buffer]:
        """Buffers in memory, float32 [n], until the step ends; it may be used again once each of them is usable, which
        those with the highest `needed` are first."""
        pieces = memory[: in_chunks(len(memory), self.words)].split(max(1, self.words))
        lent = [Buffer(piece, needed=needed, usable=self._mark()) for piece in pieces if len(piece)]
        self.idle.extend(lent)
        self.in_use.extend(lent)
        return lent

    def _take_idle(self) -> Buffer | None:
        """The next buffer, if any is idle. One that is lent takes no more chunks once those that are needed later are
        enough for all that wait."""
        while self.idle:
            buffer = self.idle.popleft()
            if not buffer.needed or sum(b.needed < buffer.needed for b in self.in_use) < len(self.waiting):
                return buffer
            self.in_use.remove(buffer)
        return None

    def _mark(self) -> "torch.cuda.Event | None":
        """What the current stream has been given to do until now."""
        return torch.cuda.current_stream(self.device).record_event() if self.is_cuda else None

    def _has_room(self) -> bool:
        needed = 4 * self.words
        return self.memory_limit is not None and torch.cuda.memory_allocated(self.device) + needed <= self.memory_limit

    def _places(self, buffer: Buffer, chunk: Chunk) -> tuple[torch.Tensor, ...]:
        return places_in(buffer.memory, len(chunk.state[0]), chunk.state[0].itemsize, self.width)

    def bring(self, in_free_memory: bool = False) -> None:
        """Starts to bring the step's next chunks: as many as there are idle buffers; in_free_memory: as have room."""
        while self.waiting:
            buffer = self._take_idle()
            if buffer is None and in_free_memory and self._has_room():
                # The current stream has given up this memory, or will have.
                buffer = Buffer(torch.empty(self.words, device=self.device), FREE_MEMORY_USES, usable=self._mark())
            if buffer is None:
                break
            chunk = self.waiting.popleft()
            with torch.cuda.stream(self.inward):
                if buffer.usable is not None:
                    buffer.usable.wait()
                for there, here in zip(self._places(buffer, chunk), chunk.state, strict=True):
                    there.copy_(here, non_blocking=True)
                buffer.arrived = self._mark()
            self.brought.append((buffer, chunk))

    def carry(self, group: int) -> Iterator[tuple[Chunk, tuple[torch.Tensor, ...]]]:
        """Each chunk of a group with its state on the device, which is written back once the caller goes on."""
        for chunk in self.by_group[group]:
            self.bring()
            buffer, _ = self.brought.popleft()
            if buffer.arrived is not None:
                buffer.arrived.wait()
            yield chunk, self._places(buffer, chunk)
            buffer.updated = self._mark()
            with torch.cuda.stream(self.outward):
                if buffer.updated is not None:
                    buffer.updated.wait()
                for here, there in zip(chunk.state, self._places(buffer, chunk), strict=True):
                    here.copy_(there, non_blocking=True)
                buffer.usable = self._mark()
            buffer.uses -= 1
            (self.idle if buffer.uses else self.used_up).append(buffer)

    def end_step(self) -> None:
        """Takes leave of what was lent. The next step's chunks are not brought before this step's are written back."""
        if self.inward is not None and self.outward is not None:
            if self.brought:  # no update was made: they are brought again
                torch.cuda.current_stream(self.device).wait_stream(self.inward)
            self.inward.wait_stream(self.outward)
        self.idle.extend(buffer for buffer, _ in self.brought)
        self.used_up.extend(buffer for buffer in self.idle if buffer.uses < float("inf"))
        self.idle = deque(buffer for buffer in self.idle if buffer.uses == float("inf") and not buffer.needed)
        self.in_use = list(self.idle)
        self.brought.clear()
        self.waiting = deque(chunk for chunks in self.by_group.values() for chunk in chunks)

    def give_up(self) -> None:
        """Before a layer runs: frees what has been written back, and waits for it where memory is short."""
        while self.used_up and (written := self.used_up[0].usable) is not None:
            if not written.query() and self._has_room():
                break
            written.synchronize()
            self.used_up.popleft()

    def wait_until_written(self) -> None:
        """Until host memory holds what the last update made, for who reads it; and frees what it was written from."""
        if self.outward is not None:
            self.outward.synchronize()
        self.used_up.clear()
