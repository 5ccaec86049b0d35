"""Checkpoints: complete or absent, verified before use, readable by any number of ranks.

checkpoints/step_00000500/
    rank_00000_of_00002.master_000.safetensors ...  each rank's shard of every parameter: `master/NAME`,
                                  `exp_avg/NAME`, `exp_avg_sq/NAME`, float32, one-dimensional; a file holds one kind
    state.json                    RunState
    settings/                     what an export needs besides weights (common/model/export.py)
    manifest.json                 size and digest of each file above, shape of each parameter, world size
    COMPLETE                      the manifest's digest
    model/                        with --export_at_checkpoints: its Hugging Face folder
checkpoints/kept.json             {"step": 500, ...}: the one checkpoint that stays beyond keep_last_n

ZeRO-3 gives rank r of n the elements [r k, (r + 1) k) of a flattened parameter, k = ceil(numel / n): a file's name says
which elements it holds, and another number of ranks reads the overlapping parts. The model's own weights are the master
weights rounded to its dtype, so they are not stored: 12 bytes a parameter. DeepSpeed's own formats are not used: they
take a second copy on disk and a conversion for another number of ranks, and nothing says whether one is whole.

A checkpoint is written beside the steps that follow it, from a copy in host memory, to `.step_X.tmp`; once every file
of every rank and the folder are flushed to disk it is renamed. It is deleted by renaming it to `.step_X.old` first.
Whatever a crash leaves behind begins with a dot and is removed by the next run. Else only keep_last_n and
`--resume never` delete checkpoints: one that a run could not read, or did not continue from, it renames to
`damaged_step_X` or `abandoned_step_X`, and never looks at again.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from common.config import TrainConfig
from common.failures import UserError, as_user_error, print_line, progress
from common.files import digest, file_digest, naming, replace_file, sync_folder, write_file
from common.model.export import export_parameters
from common.ranks import Ranks
from common.zero import residency
from common.zero.host_state import HostMemory, Shard, available_host_memory

FOLDER = re.compile(r"step_(\d{8,})")
FILE = re.compile(r"rank_(\d+)_of_\d+\.(\w+)_\d+\.safetensors")
SHARD_FILE_BYTES = 2**29  # of a file, about; a reading thread holds one in memory
BLOCK_BYTES = 2**24  # read at once
COPIED_AT_ONCE = 2**24  # elements: on their way from host memory to a copy they pass through the device
WRITERS, READERS, PINNERS = 2, 4, 4  # threads of a rank
USABLE = 0.8  # of the host memory that is free before training, for copies of checkpoints
KINDS = ("master", "exp_avg", "exp_avg_sq")
Parameters = dict[str, torch.nn.Parameter]  # by name, under ZeRO-3


@dataclass
class RunState:
    """All that resumes besides parameters and moments. Order and learning rate are functions of `step`."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # samples (pairs) taken
    total_tokens: int = 0  # tokens run
    target_tokens: int = 0  # tokens trained on
    num_records: int = 0  # in metrics.jsonl
    micro_batch_budget: int = 0  # tokens that a micro-batch may hold
    opening_budget: int = 0  # and that a step's first one may, if more
    world_size: int = 0
    residency: str = ""  # what stayed whole during a step, which says how gradients are summed
    held_out: str = ""  # digest of the data of evaluations, "" for none
    held_out_since: int = 0  # step from which on it is that
    identity: dict = field(default_factory=dict)  # every value that changes the result, by its flag's name

    def finish_step(self, num_samples: int, num_tokens: int, num_targets: int) -> None:
        """One more step is done, of so many samples (pairs), tokens run and tokens trained on."""
        self.step += 1
        self.samples += num_samples
        self.total_tokens += num_tokens
        self.target_tokens += num_targets


# ---------------------------------------------------------------------- writing
class Writer:
    """Writes a run's checkpoints beside its steps. Each rank has one; all but `vote` is collective.

    A checkpoint is written in stages: each rank's thread writes its files; then rank 0's thread publishes them and
    deletes older checkpoints, and exports the model if that is asked for. A stage begins once the ranks have agreed, on
    their main threads, that the one before is done everywhere. The threads take part in no collective.
    """

    def __init__(self, engine, parameters: Parameters, config: TrainConfig, ranks: Ranks, settings: dict | None = None):
        """settings: files, by name, that exports of its checkpoints need besides weights."""
        self.engine, self.parameters, self.config, self.ranks = engine, parameters, config, ranks
        self.folder = Path(config.output_dir) / "checkpoints"
        self.thread = ThreadPoolExecutor(1)
        self.path = self.folder  # of the checkpoint in flight
        self.stage: Future | None = None  # that it is in
        self.later: list[Callable[[list], object]] = []  # its further stages, given what the last one's ranks returned
        self.files = _files(parameters, ranks)
        self.settings: dict[str, bytes] = settings or {}
        self.copies = self._reserve()

    def _reserve(self) -> dict[str, torch.Tensor] | None:
        """A place in host memory for each tensor of this rank, by name; None if a host has too little. Collective."""
        counts = {name: count for counts in self.files.values() for name, count in counts.items()}
        size = sum(counts.values())  # elements
        needed, free = 4 * size * self.ranks.local_world_size, available_host_memory()
        if too_small := [sizes for sizes in self.ranks.gather(lambda: (needed, free)) if sizes[0] > USABLE * sizes[1]]:
            needed, free = too_small[0]
            sizes = f"a host has {free / 1e9:,.1f} GB of memory free, a copy takes {needed / 1e9:,.1f} GB"
            self.ranks.say(f"checkpoints are not written beside the steps: {sizes}. Training stands still meanwhile")
            return None
        self.memory = HostMemory(max(size, 1), self.ranks.device, PINNERS)
        return {name: self.memory.take(count) for name, count in counts.items()}

    def save(self, state: RunState) -> None:
        """Takes a copy of the checkpoint of `state.step`, and begins to write it; none may be in flight.

        Where host memory has no room for a copy, returns when it is written. Raises OSError, on every rank.
        """
        self.path = path_of(self.config.output_dir, state.step)
        temporary, text = self.path.with_name(f".{self.path.name}.tmp"), json.dumps(asdict(state), indent=2)

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # not its parents: a run whose folder was deleted or renamed ends here

        self.ranks.once(prepare)
        files = self._copied(residency.state_shards(self.engine))
        if self.copies is not None:
            self.memory.wait_until_pinned()
            files = iter([*files])  # now, before the next update
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()
        self.later = [lambda shards: self._publish(temporary, text, shards)]
        if self.config.export_at_checkpoints:
            self.later.append(lambda _: export(self.path, self.path / "model"))
        cores = len(os.sched_getaffinity(0)) // self.ranks.local_world_size
        writers = max(1, min(WRITERS, cores - 1))  # one is left to the steps
        self.stage = self.thread.submit(_write_files, temporary, files, writers)
        if self.copies is None:
            self.wait()

    def _copied(self, shards: dict) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each file of this rank with its tensors, copied when their turn comes."""
        for file, counts in self.files.items():
            tensors = {}
            for key, count in counts.items():
                kind, _, name = key.partition("/")
                shard = shards[self.parameters[name]]
                tensors[key] = place = self.copies[key] if self.copies is not None else torch.empty(count)
                for start in range(0, count, COPIED_AT_ONCE):
                    part = place[start : start + COPIED_AT_ONCE]
                    part.copy_(shard.read(kind, start, start + len(part)), non_blocking=self.copies is not None)
            yield file, tensors

    def _publish(self, temporary: Path, state: str, shards: list[dict[str, dict]]) -> None:
        files = {file: entry for shard in shards for file, entry in shard.items()}
        small = {"state.json": state.encode()} | {f"settings/{file}": data for file, data in self.settings.items()}
        for name, data in small.items():
            if name != "state.json":  # which is the first, and fails where output_dir is another folder by now
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = write_file(temporary / name, [data])
        shapes = {name: list(p.ds_shape) for name, p in self.parameters.items()}
        manifest = {"world_size": self.ranks.world_size, "files": files, "parameters": shapes}
        entry = write_file(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        write_file(temporary / "COMPLETE", [entry["digest"].encode()])
        for folder in {(temporary / name).parent for name in small}:
            sync_folder(folder)
        os.rename(temporary, self.path)
        for folder in (self.folder, self.folder.parent):
            sync_folder(folder)
        output_dir = self.config.output_dir
        whole = [path for path in newest_first(output_dir) if (path / "COMPLETE").is_file()]
        for old in whole[self.config.keep_last_n_checkpoints :]:
            if step_of(old) != kept(output_dir).get("step"):
                _delete(old)

    def vote(self) -> float:
        """What this rank adds to the sum that `proceed` gets: 1 if its stage is done, enough for all if it failed."""
        if self.stage is None or not self.stage.done():
            return 0
        return self.ranks.world_size if self.stage.exception() else 1

    def proceed(self, votes: float) -> None:
        """At a step's boundary: goes on to the next stage if all ranks are done. Raises the OSError of any rank's."""
        if self.stage is not None and votes >= self.ranks.world_size:
            stage = self.stage
            self._begin_next(self.ranks.gather(lambda: stage.result() if stage.done() else None))

    def wait(self) -> None:
        """Until no checkpoint is in flight. Raises the OSError of any rank's write."""
        if self.stage is not None and self.copies is not None:
            self.ranks.say(f"waiting for {self.path} to be written")
        while self.stage is not None:
            self._begin_next(self.ranks.on_all(self.stage.result))

    def _begin_next(self, results: list) -> None:
        self.stage = None
        if self.later:
            stage = self.later.pop(0)
            self.stage = self.thread.submit(stage, results) if self.ranks.is_main else self.thread.submit(lambda: None)
        else:
            self.ranks.say(f"checkpoint {self.path}")


def _files(parameters: Parameters, ranks: Ranks) -> dict[str, dict[str, int]]:
    """The files of a rank's shard, of about SHARD_FILE_BYTES: {file: {tensor: elements}}."""
    files: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        number, size = 0, 0
        for name, param in parameters.items():
            start, end = shard_range(param.ds_numel, ranks.rank, ranks.world_size)
            file = f"rank_{ranks.rank:05d}_of_{ranks.world_size:05d}.{kind}_{number:03d}.safetensors"
            files.setdefault(file, {})[f"{kind}/{name}"] = end - start
            size += 4 * (end - start)
            if size >= SHARD_FILE_BYTES:
                number, size = number + 1, 0
    return files


def _write_files(folder: Path, files: Iterable[tuple[str, dict[str, torch.Tensor]]], writers: int) -> dict[str, dict]:
    """Writes files from their tensors, `writers` at a time; their manifest entries by file name."""
    written: dict[str, Future] = {}
    with ThreadPoolExecutor(writers) as pool:
        for file, tensors in files:
            for future in [*written.values()][: len(written) + 1 - writers]:
                future.result()
            written[file] = pool.submit(_write_tensors, folder / file, tensors)
        return {file: future.result() for file, future in written.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """A safetensors file of float32 tensors. safetensors' own writer would copy them twice and hold up all threads."""
    ends = [0, *itertools.accumulate(tensor.nbytes for tensor in tensors.values())]
    places = {name: [*place] for name, place in zip(tensors, itertools.pairwise(ends), strict=True)}
    header = {n: {"dtype": "F32", "shape": [*t.shape], "data_offsets": places[n]} for n, t in tensors.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    entry = write_file(path, [head, *(tensor.numpy() for tensor in tensors.values())])
    return entry | {"tensors": {name: [len(head) + byte for byte in place] for name, place in places.items()}}


def shard_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, end) of a flattened parameter that ZeRO-3 gives to a rank (without its padding)."""
    k = -(-numel // world_size)
    return min(rank * k, numel), min((rank + 1) * k, numel)


# ---------------------------------------------------------------------- keeping one
def keep(output_dir: str, entry: dict) -> None:
    """The checkpoint of entry["step"], written or about to be, stays beyond keep_last_n, in place of the one that did.

    Call it on one rank.
    """
    replace_file(_kept_file(output_dir), json.dumps(entry))


def kept(output_dir: str) -> dict:
    """What `keep` was last called with; {} if it was not. Raises UserError if that cannot be read."""
    path = _kept_file(output_dir)
    with as_user_error(f"{path} is not what a run wrote; delete it"):
        return {**json.loads(path.read_text())} if path.is_file() else {}


def _kept_file(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints" / "kept.json"


# ---------------------------------------------------------------------- finding
def newest_first(output_dir: str) -> list[Path]:
    """Checkpoint folders, whole or not, newest first, by step as a number."""
    folders = [path for path in (Path(output_dir) / "checkpoints").glob("step_*") if FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def seen(output_dir: str) -> dict[str, bytes]:
    """What this host sees of the checkpoints: by name what COMPLETE says, which tells of all that is in one."""
    files = {path.name: path / "COMPLETE" for path in newest_first(output_dir)}
    return {name: file.read_bytes() if file.is_file() else b"not complete" for name, file in files.items()}


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def path_of(output_dir: str, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"step_{step:08d}"


def _delete(path: Path) -> None:
    """No checkpoint ever looks whole while it is being deleted."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    os.rename(path, old)
    sync_folder(path.parent)
    _remove(old)  # what is left, the next run removes


def _remove(path: Path) -> None:
    """A folder, or a link to one, which stays; what cannot be removed is left."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def delete_all(output_dir: str, why: str) -> None:
    """Deletes the checkpoints of a folder, but for those that were set aside."""
    for path in newest_first(output_dir):
        print_line(f"deleting {path}: {why}")
        _delete(path)


def clear_after(output_dir: str, step: int, resume: str) -> None:
    """Makes way for a run that continues from `step` and writes its own later checkpoints.

    Later ones are deleted for `--resume never`; else they are set aside: they were passed over as damaged, or the user
    named an earlier one to continue from. What a crash left of half-written and half-deleted ones is removed.
    """
    if resume == "never":
        delete_all(output_dir, "--resume never starts over")
    for path in [path for path in newest_first(output_dir) if step_of(path) > step]:
        _set_aside(path, "damaged" if resume == "auto" else "abandoned", f"this run continues after step {step}")
    for path in (Path(output_dir) / "checkpoints").glob(".step_*"):
        _remove(path)
    for path in (Path(output_dir) / "checkpoints").glob(".kept.json.*"):
        path.unlink()
    if not (path_of(output_dir, kept(output_dir).get("step", 0)) / "COMPLETE").is_file():
        _kept_file(output_dir).unlink(missing_ok=True)


def _set_aside(path: Path, how: str, why: str) -> None:
    numbered = (path.with_name(f"{how}_{path.name}" + f"_{i}" * (i > 1)) for i in itertools.count(1))
    aside = next(free for free in numbered if not free.exists())
    print_line(f"{path} is now {aside.name}: {why}")
    os.rename(path, aside)


def find(output_dir: str, resume: str, ranks: Ranks) -> Path | None:
    """The newest checkpoint that looks whole, or the one that `resume` names; None to start from the beginning.
    Collective. Only the sizes of shards are compared here: `load` compares the digests of what it reads.

    A torn or edited checkpoint is named and passed over. Raises UserError if there are checkpoints and none is
    whole for all ranks, and for one that was asked for by path and is not whole, or not of this folder.
    """
    if resume == "never":
        return None
    paths = ranks.once(lambda: newest_first(output_dir))
    if resume != "auto":
        paths = [path for path in paths if path.resolve() == Path(resume).resolve()]
        if not paths:
            raise UserError(f"--resume {resume}: neither auto, never nor a checkpoint of --output_dir {output_dir}")
    return _first_whole(output_dir, paths, "", resume, ranks) if paths else None


def _first_whole(output_dir: str, paths: list[Path], found: str, resume: str, ranks: Ranks) -> Path:
    """The first of some checkpoints that looks whole. found: what was wrong with the one before these."""
    for path in paths:
        faults = ranks.gather(lambda: fault(path))
        found = _passed_over(path, faults, resume, ranks)
        if not found:
            return path
        if None in faults:
            raise UserError(f"--output_dir {output_dir}: {found}; as rank {faults.index(None)} sees it, it is whole")
    advice = f"{found}; mend them, or use --resume never to start over"
    raise UserError(f"--output_dir {output_dir}: none of its checkpoints is whole; {advice}")


def _passed_over(path: Path, faults: list[str | None], resume: str, ranks: Ranks) -> str:
    """Says that a checkpoint is not whole, by what each rank found, and returns that; `` if it is whole.

    Raises UserError if `resume` names it.
    """
    found = next((f"{fault} (as rank {rank} sees it)" for rank, fault in enumerate(faults) if fault), "")
    if found and resume != "auto":
        raise UserError(f"--resume {resume}: {found}")
    if found:
        ranks.say(f"checkpoint {path} is not whole, passing it over: {found}")
    return found and f"{path.name}: {found}"


def fault(path: Path, read: str = "state.json", advance: Callable[[int], None] = lambda size: None) -> str | None:
    """What is wrong with a checkpoint's files: their names, their sizes, and the digests of those in whose name `read`,
    a regular expression, is found; None if nothing is. advance: called with the bytes of each file that was read.

    Raises OSError if it cannot be read: then it may be whole, and must not be passed over, nor set aside later.
    """
    try:
        if not all((path / name).is_file() for name in ("manifest.json", "COMPLETE")):
            return "manifest.json or COMPLETE is no file"  # a device or a FIFO may never end
        with naming(path), ThreadPoolExecutor(READERS) as pool:
            manifest = (path / "manifest.json").read_bytes()
            if (path / "COMPLETE").read_bytes() != digest(manifest).encode():
                return "manifest.json is not the one that COMPLETE names"
            files = json.loads(manifest)["files"]
            for file, entry in files.items():
                if (path / file).stat().st_size != entry["size"]:
                    return f"{file} has been changed"
            names = [file for file in files if re.search(read, file)]
            for file, found in zip(names, pool.map(lambda file: file_digest(path / file), names), strict=True):
                advance(files[file]["size"])
                if found != files[file]["digest"]:
                    return f"{file} has been changed"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name}: {e.strerror}"
    return None


# ---------------------------------------------------------------------- reading
def read_state(path: Path) -> RunState:
    """Raises UserError for a checkpoint of another version of this project, or under the name of another step."""
    with as_user_error(f"checkpoint {path} is of another version of this project, use that", TypeError):
        state = RunState(**json.loads((path / "state.json").read_text()))
    if state.step != step_of(path):
        raise UserError(f"checkpoint {path} is that of step {state.step} by its state.json; give it its name back")
    return state


def load(
    engine, parameters: Parameters, path: Path, state: RunState, resume: str, ranks: Ranks, what: str = "resuming"
) -> None:
    """Puts a checkpoint's master weights, moments and step into an engine of any world size. what: is said of it.
    Collective.

    Verifying and loading are one pass. If a file turns out to be not as it was written, `--resume auto` passes this
    checkpoint over and sets everything again from the one before, whose counters `state` then gets.
    """
    first = path
    while True:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["parameters"] != {name: list(p.ds_shape) for name, p in parameters.items()}:
            raise UserError(f"checkpoint {path} holds another model's parameters")
        residency.set_step(engine, step_of(path))
        reader = _Reader(path, manifest, parameters, residency.state_shards(engine), ranks)
        found = _passed_over(path, ranks.on_all(reader.read), resume, ranks)
        if not found:
            break
        output_dir = str(path.parents[1])
        older = [other for other in ranks.once(lambda: newest_first(output_dir)) if step_of(other) < step_of(path)]
        path = _first_whole(output_dir, older, found, resume, ranks)
        _take_counters(state, path, first, ranks)
    residency.round_master_weights(engine)
    ranks.say(f"{what} after step {state.step} from {path}")


def _take_counters(state: RunState, path: Path, damaged: Path, ranks: Ranks) -> None:
    """Gives state the counters of a checkpoint in place of those of a damaged one. Raises UserError if what the run has
    been planned from, micro-batches and residency, was not the same in both: the next run plans from this one."""
    planned, found = read_state(damaged), read_state(path)
    for name in ("identity", "world_size", "micro_batch_budget", "residency"):
        if getattr(planned, name) != getattr(found, name):
            ranks.once(lambda: _set_aside(damaged, "damaged", "it is not whole"))
            raise UserError(f"checkpoint {damaged} is damaged, and {path.name} is of another {name}: run this again")
    for name in ("step", "samples", "total_tokens", "target_tokens", "num_records"):
        setattr(state, name, getattr(found, name))


class _Reader:
    """Reads what a rank takes of a checkpoint, each file as a whole, into its shards (of residency.state_shards)."""

    def __init__(self, path: Path, manifest: dict, parameters: Parameters, shards: dict[Any, Shard], ranks: Ranks):
        self.path, self.files, self.parameters = path, manifest["files"], parameters
        self.shards, self.ranks, writers = shards, ranks, manifest["world_size"]
        # writer -> parameter -> _overlap of this rank's shard and the writer's
        self.overlaps: dict[int, dict[str, tuple[int, int, int] | None]] = {}
        for writer in range(writers):
            pair = (ranks.rank, ranks.world_size), (writer, writers)
            overlaps = {name: _overlap(p.ds_numel, *pair) for name, p in parameters.items()}
            # Files of which no rank needs anything are read all the same, by one rank.
            if any(overlaps.values()) or writer * ranks.world_size // writers == ranks.rank:
                self.overlaps[writer] = overlaps

    def read(self) -> str | None:
        """What is wrong with the files, None if nothing is. Raises OSError if one cannot be read."""
        names = {file: name.groups() for file in sorted(self.files) if (name := FILE.fullmatch(file))}
        mine = {file: (int(rank), kind) for file, (rank, kind) in names.items() if int(rank) in self.overlaps}
        size = sum(self.files[file]["size"] for file in mine)
        shown = progress(f"reading {self.path.name}", size // 10**6, "MB", self.ranks.say, self.ranks.is_main)
        try:
            with shown as advance, ThreadPoolExecutor(READERS) as pool:
                for kind in reversed(KINDS):  # master weights last (see Shard.write)
                    of_kind = {file: writer for file, (writer, of) in mine.items() if of == kind}
                    is_whole = pool.map(self._read, of_kind, of_kind.values())
                    for file, found in zip(of_kind, is_whole, strict=True):
                        if not found:
                            return f"{file} has been changed"
                        advance(self.files[file]["size"] // 10**6)
        except FileNotFoundError as e:
            return f"{Path(e.filename).name}: {e.strerror}"
        return None

    def _read(self, file: str, writer: int) -> bool:
        """Puts a file's elements in their places, block by block; whether the file is as it was written."""
        entry, state = self.files[file], xxhash.xxh3_128()
        buffer: np.ndarray = np.zeros(BLOCK_BYTES, np.uint8)
        header = min((start for start, _ in entry["tensors"].values()), default=entry["size"])
        with naming(self.path / file), open(self.path / file, "rb") as source:
            state.update(source.read(header))
            for key, (start, end) in entry["tensors"].items():
                kind, _, name = key.partition("/")
                for first in range(start, end, BLOCK_BYTES):
                    block = buffer[: min(BLOCK_BYTES, end - first)]
                    if source.readinto(block.data) != len(block):
                        return False
                    state.update(block.data)
                    if place := self.overlaps[writer][name]:
                        shard, at = self.shards[self.parameters[name]], (first - start) // 4
                        _put(block.view(np.float32), at, *place, shard, kind)
        return state.hexdigest() == entry["digest"]


def _overlap(numel: int, us: tuple[int, int], them: tuple[int, int]) -> tuple[int, int, int] | None:
    """The stretch of a flattened parameter that two ranks, each (rank, world size), hold: where it begins in our shard
    and in theirs, and its elements; None if there is none."""
    (our_start, our_end), (their_start, their_end) = shard_range(numel, *us), shard_range(numel, *them)
    start, end = max(our_start, their_start), min(our_end, their_end)
    return (start - our_start, start - their_start, end - start) if start < end else None


def _put(block: np.ndarray, at: int, ours: int, theirs: int, count: int, shard: Shard, kind: str) -> None:
    """Copies what a block, elements from `at` on of a writer's shard, holds of an _overlap to our shard."""
    first, last = max(at, theirs), min(at + len(block), theirs + count)
    if first < last:
        shard.write(kind, ours + first - theirs, torch.from_numpy(block[first - at : last - at]))


def export_shown(path: Path, output_dir: Path) -> None:
    """As export, with its progress."""
    size = sum(file.stat().st_size for file in path.glob("*.master_*"))  # read once for digests, once to be written
    with progress(f"exporting {path.name}", 2 * size, "bytes read") as advance:
        export(path, output_dir, advance)


def export(path: Path, output_dir: Path, advance: Callable[[int], None] = lambda size: None) -> None:
    """Writes the model of a checkpoint, the very files of export_model after its step: master weights, rounded.

    No more than one of its shards is in memory. advance: called with the bytes of what was read, in two passes. Raises
    UserError for a checkpoint that is not whole, or if output_dir holds anything but the beginning of this.
    """
    if found := fault(path, r"state\.json|settings/|\.master_", advance):
        raise UserError(f"checkpoint {path} is not whole: {found}")
    manifest = json.loads((path / "manifest.json").read_text())
    shards: dict[str, list] = {}  # parameter -> [(file, first byte, elements)] by rank
    for file, entry in sorted(manifest["files"].items()):
        for key, (start, end) in entry.get("tensors", {}).items():
            if key.startswith("master/"):
                shards.setdefault(key.removeprefix("master/"), []).append((path / file, start, (end - start) // 4))

    def fill(name: str, out: torch.Tensor) -> None:
        for file, start, count in shards[name]:
            for first in range(0, count, BLOCK_BYTES):
                values = np.fromfile(file, np.float32, min(BLOCK_BYTES, count - first), offset=start + 4 * first)
                out[: len(values)].copy_(torch.from_numpy(values))
                out = out[len(values) :]
                advance(values.nbytes)

    export_parameters(path / "settings", output_dir, manifest["parameters"], fill)


def export_missing(output_dir: str) -> None:
    """--export_at_checkpoints: the models that checkpoints lack because a crash came first."""
    for path in newest_first(output_dir):
        if not (path / "model" / "config.json").is_file() or (path / "model" / ".export").exists():
            print_line(f"writing {path}/model")
            try:
                export_shown(path, path / "model")
            except UserError as e:  # it is damaged, and is none to continue from
                print_line(f"warning: {e}")
