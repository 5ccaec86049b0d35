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
weights rounded to its dtype, so they are not stored: 12 bytes a parameter.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
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
KEPT = "checkpoints/kept.json"
PLANNED_BY = ("micro_batch_budget", "opening_budget", "residency", "world_size")  # fields of RunState
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

    In two stages: each rank's thread writes its files; then, once the ranks have agreed on their main threads that all
    have, rank 0's publishes them, deletes older checkpoints, and exports the model if that is asked for. The threads
    take part in no collective.
    """

    def __init__(self, engine, parameters: Parameters, config: TrainConfig, ranks: Ranks, settings: dict | None = None):
        """settings: files, by name, that exports of its checkpoints need besides weights."""
        self.engine, self.parameters, self.config, self.ranks = engine, parameters, config, ranks
        self.folder = Path(config.output_dir) / "checkpoints"
        self.thread = ThreadPoolExecutor(1)
        self.path = self.folder  # of the checkpoint in flight
        self.stage: Future | None = None  # that it is in
        self.publish: Callable[[list], None] | None = None  # the stage to come, given what the ranks have written
        self.files = _files(parameters, ranks)
        self.settings: dict[str, bytes] = settings or {}
        self.copies = self._reserve()

    def _reserve(self) -> dict[str, torch.Tensor] | None:
        """A place in host memory for each tensor of this rank, by name; None if a host has too little. Collective."""
        counts = {name: count for of_file in self.files.values() for name, count in of_file.items()}
        size = sum(counts.values())  # elements
        needs = 4 * size * self.ranks.local_world_size
        for needed, free in self.ranks.gather(lambda: (needs, available_host_memory())):
            if needed > USABLE * free:
                sizes = f"a host has {free / 1e9:,.1f} GB of memory free, a copy takes {needed / 1e9:,.1f} GB"
                self.ranks.say(f"checkpoints are not written beside the steps: {sizes}. Training stands still for them")
                return None
        self.memory = HostMemory(max(size, 1), self.ranks.device, PINNERS)
        return {name: self.memory.take(count) for name, count in counts.items()}

    def save(self, state: RunState) -> None:
        """Takes a copy of the checkpoint of `state.step`, and begins to write it; none may be in flight.

        Where host memory has no room for a copy, returns when it is written. Raises OSError, on every rank.
        """
        self.path = path_of(self.config.output_dir, state.step)
        temporary, text = self.path.with_name(f".{self.path.name}.tmp"), json.dumps(asdict(state), indent=2)
        tensors_of: Callable[[str], dict] = partial(self._copied, residency.state_shards(self.engine))
        if self.copies is not None:
            self.memory.wait_until_pinned()
            tensors_of = {file: tensors_of(file) for file in self.files}.__getitem__  # now, before the next update
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()
        self.publish = partial(self._publish, temporary, text)
        cores = len(os.sched_getaffinity(0)) // self.ranks.local_world_size
        writers = max(1, min(WRITERS, cores - 1))  # one is left to the steps
        self.stage = self.thread.submit(_write_files, temporary, [*self.files], tensors_of, writers)
        if self.copies is None:
            self.wait()

    def _copied(self, shards: dict, file: str) -> dict[str, torch.Tensor]:
        """The tensors of one of this rank's files, in host memory."""
        tensors = {}
        for key, count in self.files[file].items():
            kind, _, name = key.partition("/")
            tensors[key] = place = self.copies[key] if self.copies is not None else torch.empty(count)
            for start in range(0, count, COPIED_AT_ONCE):
                part, shard = place[start : start + COPIED_AT_ONCE], shards[self.parameters[name]]
                part.copy_(shard.read(kind, start, start + len(part)), non_blocking=self.copies is not None)
        return tensors

    def _publish(self, temporary: Path, state: str, shards: list[dict[str, dict]]) -> None:
        files = {file: entry for shard in shards for file, entry in shard.items()}
        files["state.json"] = write_file(temporary / "state.json", [state.encode()])
        (temporary / "settings").mkdir(exist_ok=True)
        for name, data in self.settings.items():
            files[f"settings/{name}"] = write_file(temporary / "settings" / name, [data])
        shapes = {name: list(p.ds_shape) for name, p in self.parameters.items()}
        manifest = {"world_size": self.ranks.world_size, "files": files, "parameters": shapes}
        entry = write_file(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        write_file(temporary / "COMPLETE", [entry["digest"].encode()])
        sync_folder(temporary / "settings")
        sync_folder(temporary)
        os.rename(temporary, self.path)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        output_dir = self.config.output_dir
        whole = [path for path in newest_first(output_dir) if (path / "COMPLETE").is_file()]
        for old in whole[self.config.keep_last_n_checkpoints :]:
            if step_of(old) != kept(output_dir).get("step"):
                _delete(old)
        if self.config.export_at_checkpoints:
            export(self.path, self.path / "model")

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

    def _begin_next(self, written: list) -> None:
        publish, self.publish, self.stage = self.publish, None, None
        if publish is not None:
            self.stage = self.thread.submit(publish if self.ranks.is_main else lambda _: None, written)
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


def _write_files(folder: Path, files: list[str], tensors_of: Callable[[str], dict], writers: int) -> dict[str, dict]:
    """Writes files of tensors_of(file), `writers` at a time; their manifest entries by file name."""
    folder.mkdir(exist_ok=True)  # not its parents: a run whose folder was deleted or renamed ends here
    with ThreadPoolExecutor(writers) as pool:
        entries = pool.map(lambda file: _write_tensors(folder / file, tensors_of(file)), files)
        return dict(zip(files, entries, strict=True))


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
    On one rank."""
    replace_file(Path(output_dir) / KEPT, json.dumps(entry))


def kept(output_dir: str) -> dict:
    """What `keep` was last called with; {} if it was not. Raises UserError if that cannot be read."""
    path = Path(output_dir) / KEPT
    with as_user_error(f"{path} is not what a run wrote; delete it"):
        return {**json.loads(path.read_text())} if path.is_file() else {}


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
    """But for those that were set aside."""
    for path in newest_first(output_dir):
        print_line(f"deleting {path}: {why}")
        _delete(path)


def clear_after(output_dir: str, step: int, resume: str) -> None:
    """Makes way for a run that continues from `step`. Later checkpoints are deleted for `--resume never`, else set
    aside: they were passed over as damaged, or the user named an earlier one. What a crash left is removed."""
    if resume == "never":
        delete_all(output_dir, "--resume never starts over")
    for path in [path for path in newest_first(output_dir) if step_of(path) > step]:
        _set_aside(path, "damaged" if resume == "auto" else "abandoned", f"this run continues after step {step}")
    for path in (Path(output_dir) / "checkpoints").glob(".step_*"):
        _remove(path)
    for path in Path(output_dir).glob("checkpoints/.kept.json.*"):
        path.unlink()
    if not (path_of(output_dir, kept(output_dir).get("step", 0)) / "COMPLETE").is_file():
        (Path(output_dir) / KEPT).unlink(missing_ok=True)


def _set_aside(path: Path, how: str, why: str) -> None:
    numbered = (path.with_name(f"{how}_{path.name}" + f"_{i}" * (i > 1)) for i in itertools.count(1))
    aside = next(free for free in numbered if not free.exists())
    print_line(f"{path} is now {aside.name}: {why}")
    os.rename(path, aside)


def find(output_dir: str, resume: str, ranks: Ranks, damaged: dict[Path, list] | None = None) -> Path | None:
    """The newest checkpoint that looks whole, or the one that `resume` names; None to start from the beginning.
    Collective. Only the sizes of shards are compared here: `load` compares the digests of what it reads.

    damaged: those that `load` has found not to be whole, and what each rank said of them.
    A torn or edited checkpoint is named and passed over. Raises UserError if there are checkpoints and none is
    whole for all ranks, and for one that was asked for by path and is not whole, or not of this folder.
    """
    if resume == "never":
        return None
    paths, damaged, found = ranks.once(lambda: newest_first(output_dir)), damaged or {}, ""
    if resume != "auto":
        paths = [path for path in paths if path.resolve() == Path(resume).resolve()]
        if not paths:
            raise UserError(f"--resume {resume}: neither auto, never nor a checkpoint of --output_dir {output_dir}")
    for path in paths:
        faults = damaged.get(path) or ranks.gather(lambda: fault(path))
        found = next((f"{path.name}: {text} (as rank {rank} sees it)" for rank, text in enumerate(faults) if text), "")
        if not found:
            return path
        if resume != "auto":
            raise UserError(f"--resume {resume}: {found}")
        ranks.say(f"checkpoint {path} is not whole, passing it over: {found}")
        if None in faults and path not in damaged:
            raise UserError(f"--output_dir {output_dir}: {found}; as rank {faults.index(None)} sees it, it is whole")
    if not paths:
        return None
    advice = f"{found}; mend them, or use --resume never to start over"
    raise UserError(f"--output_dir {output_dir}: none of its checkpoints is whole; {advice}")


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

    Verifying and loading are one pass. A checkpoint with a file that is not as it was written is passed over by
    `--resume auto`: everything is set again from the one before, and so is `state`, but for what the run is planned by.
    """
    damaged: dict[Path, list] = {}
    while True:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["parameters"] != {name: list(p.ds_shape) for name, p in parameters.items()}:
            raise UserError(f"checkpoint {path} holds another model's parameters")
        residency.set_step(engine, step_of(path))
        shards = residency.state_shards(engine)
        damaged[path] = ranks.on_all(lambda: _read(path, manifest, parameters, shards, ranks))
        if not any(damaged[path]):
            break
        older = find(str(path.parents[1]), resume, ranks, damaged)
        assert older is not None  # for there are checkpoints
        path, found = older, read_state(older)
        if found.identity != state.identity:
            raise UserError(f"checkpoint {path}, the one before a damaged one, is another run's; move it away")
        planned = {name: getattr(state, name) for name in PLANNED_BY}
        vars(state).update(vars(found) | planned)
    residency.round_master_weights(engine)
    ranks.say(f"{what} after step {state.step} from {path}")


def _read(path: Path, manifest: dict, parameters: Parameters, shards: dict[Any, Shard], ranks: Ranks) -> str | None:
    """Reads what this rank takes of a checkpoint, each file as a whole, into its shards (of residency.state_shards).
    What is wrong with the files, None if nothing is. Raises OSError if one cannot be read."""
    files, writers = manifest["files"], manifest["world_size"]
    needed = {f"rank_{writer:05d}" for writer in _writers_read_by(ranks, writers, parameters)}
    mine = [file for file in sorted(files) if file[:10] in needed]

    def read(file: str) -> bool:
        """Puts a file's elements in their places, block by block; whether the file is as it was written."""
        places, state = files[file]["tensors"], xxhash.xxh3_128()
        buffer: np.ndarray = np.zeros(BLOCK_BYTES, np.uint8)
        with naming(path / file), open(path / file, "rb") as source:
            header = min((start for start, _ in places.values()), default=files[file]["size"])
            state.update(source.read(header))
            for key, (start, end) in places.items():
                kind, _, name = key.partition("/")
                param = parameters[name]
                ours, our_end = shard_range(param.ds_numel, ranks.rank, ranks.world_size)
                theirs, _ = shard_range(param.ds_numel, int(file[5:10]), writers)
                for at in range(start, end, BLOCK_BYTES):
                    block = buffer[: min(BLOCK_BYTES, end - at)]
                    if source.readinto(block.data) != len(block):
                        return False
                    state.update(block.data)
                    values = torch.from_numpy(block.view(np.float32))
                    first = theirs + (at - start) // 4  # the block's first element, counted in the whole parameter
                    low, high = max(first, ours), min(first + len(values), our_end)
                    if low < high:
                        shards[param].write(kind, low - ours, values[low - first : high - first])
        return state.hexdigest() == files[file]["digest"]

    size = sum(files[file]["size"] for file in mine)
    shown = progress(f"reading {path.name}", size // 10**6, "MB", ranks.say, ranks.is_main)
    try:
        with shown as advance, ThreadPoolExecutor(READERS) as pool:
            for kind in reversed(KINDS):  # master weights last (see Shard.write)
                of_kind = [file for file in mine if file.split(".")[1].rpartition("_")[0] == kind]
                for file, is_whole in zip(of_kind, pool.map(read, of_kind), strict=True):
                    if not is_whole:
                        return f"{file} has been changed"
                    advance(files[file]["size"] // 10**6)
    except FileNotFoundError as e:
        return f"{Path(e.filename).name}: {e.strerror}"
    return None


def _writers_read_by(ranks: Ranks, writers: int, parameters: Parameters) -> set[int]:
    """The writers that held elements of this rank's. One that no rank needs is read by one rank all the same."""
    found = {writer for writer in range(writers) if writer * ranks.world_size // writers == ranks.rank}
    for p in parameters.values():
        start, end = shard_range(p.ds_numel, ranks.rank, ranks.world_size)
        size = -(-p.ds_numel // writers)
        found |= {*range(start // size, -(-end // size))} if start < end else set()
    return found


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

    def fill(name: str, out: torch.Tensor) -> None:
        for file, entry in sorted(manifest["files"].items()):  # by rank
            start, end = entry.get("tensors", {}).get(f"master/{name}", (0, 0))
            for at in range(start, end, BLOCK_BYTES):
                values = np.fromfile(path / file, np.float32, min(BLOCK_BYTES, end - at) // 4, offset=at)
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
