"""Checkpoints: complete or absent, verified before use, readable by any number of ranks.

checkpoints/step_00000500/
    rank_00000_of_00002.part_000.safetensors ...  each rank's shard of every parameter: `master/NAME`,
                                  `exp_avg/NAME`, `exp_avg_sq/NAME`, float32, one-dimensional
    state.json                    RunState
    manifest.json                 size and digest of each file above, shape of each parameter, world size
    COMPLETE                      the manifest's digest

ZeRO-3 gives rank r of n the elements [r k, (r + 1) k) of a flattened parameter, k = ceil(numel / n): a file's name says
which elements it holds, and another number of ranks reads the overlapping parts. The model's own weights are the master
weights rounded to its dtype, so they are not stored: 12 bytes a parameter. DeepSpeed's own formats are not used: they
take a second copy on disk and a conversion for another number of ranks, and nothing says whether one is whole.

A checkpoint is written to `.step_X.tmp`, every file and folder flushed to disk, and renamed; it is deleted by renaming
it to `.step_X.old` first. Whatever a crash leaves behind begins with a dot and is removed by the next run. Else only
keep_last_n and `--resume never` delete checkpoints: one that a run could not read, or did not continue from, it renames
to `damaged_step_X` or `abandoned_step_X`, and never looks at again.
"""

import functools
import itertools
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open

from common.failures import UserError, as_user_error, print_line
from common.files import digest, file_digest, naming, sync_folder, write_file
from common.ranks import Ranks
from common.zero import residency

FOLDER = re.compile(r"step_(\d{8,})")
SHARD_FILE_BYTES = 2**29  # of a file, about; a rank holds three of them in memory while it saves
KINDS = ("master", "exp_avg", "exp_avg_sq")
Parameters = dict[str, torch.nn.Parameter]  # by name, under ZeRO-3


@dataclass
class RunState:
    """All that resumes besides parameters and moments. Order and learning rate are functions of `step`."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # samples (pairs) taken
    total_tokens: int = 0  # tokens run
    target_tokens: int = 0  # tokens trained on
    micro_batch_budget: int = 0  # tokens that a micro-batch may hold
    world_size: int = 0
    residency: str = ""  # what stayed whole during a step, which says how gradients are summed
    identity: dict = field(default_factory=dict)  # every value that changes the result, by its flag's name

    def finish_step(self, num_samples: int, num_tokens: int, num_targets: int) -> None:
        """One more step is done, of so many samples (pairs), tokens run and tokens trained on."""
        self.step += 1
        self.samples += num_samples
        self.total_tokens += num_tokens
        self.target_tokens += num_targets


# ---------------------------------------------------------------------- writing
def require_disk_space(parameters: Parameters, output_dir: str, num_checkpoints: int) -> None:
    """Raises UserError if num_checkpoints checkpoints and the exported model do not fit where output_dir is.

    What its checkpoints take already counts as free, for new ones replace them; what was set aside does not.
    """
    # 12 bytes: master weight and two moments in float32
    needed = sum(p.ds_numel * (num_checkpoints * 12 + p.element_size()) for p in parameters.values())
    replaced = [file for folder in _all(output_dir) for file in folder.rglob("*") if file.is_file()]
    free = shutil.disk_usage(output_dir).free + sum(file.stat().st_size for file in replaced)
    if needed > free:
        sizes = f"{needed / 1e9:,.1f} GB for {num_checkpoints} checkpoints and the model, {free / 1e9:,.1f} GB are free"
        raise UserError(f"--output_dir {output_dir} needs {sizes}; free some, or lower --keep_last_n_checkpoints")


def save(parameters: Parameters, state: RunState, output_dir: str, keep_last_n: int, ranks: Ranks) -> Path:
    """Writes the checkpoint of `state.step`, says so, deletes all but the newest keep_last_n, and returns its folder.

    Collective. Where any rank cannot write, every rank raises its OSError, and older checkpoints are intact.
    """
    path = Path(output_dir) / "checkpoints" / f"step_{state.step:08d}"
    temporary = path.with_name(f".{path.name}.tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # not its parents: a run whose folder was deleted or renamed ends here
        sync_folder(Path(output_dir))

    def publish(shards: list[dict]) -> None:
        files = {file: entry for shard in shards for file, entry in shard.items()}
        files["state.json"] = write_file(temporary / "state.json", [json.dumps(asdict(state), indent=2).encode()])
        shapes = {name: list(p.ds_shape) for name, p in parameters.items()}
        manifest = {"world_size": ranks.world_size, "files": files, "parameters": shapes}
        entry = write_file(temporary / "manifest.json", [json.dumps(manifest, indent=1).encode()])
        write_file(temporary / "COMPLETE", [entry["digest"].encode()])
        sync_folder(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
        for old in [path for path in _all(output_dir) if (path / "COMPLETE").is_file()][keep_last_n:]:
            _delete(old)

    ranks.once(prepare)
    shards = ranks.gather(lambda: _write_shard(parameters, temporary, ranks))
    ranks.once(lambda: publish(shards))
    ranks.say(f"checkpoint {path}")
    return path


def _write_shard(parameters: Parameters, folder: Path, ranks: Ranks) -> dict[str, dict]:
    """This rank's shard, in files of about SHARD_FILE_BYTES; their manifest entries by file name.

    Two files are on their way to the disk while the next one is copied from the device.
    """
    tensors: dict[str, torch.Tensor] = {}
    written: dict[str, Future] = {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what the last update still writes to host memory
    with ThreadPoolExecutor(2) as pool:
        for i, (name, param) in enumerate(parameters.items(), start=1):
            start, end = shard_range(param.ds_numel, ranks.rank, ranks.world_size)
            for kind in KINDS:
                is_master = kind == "master"
                local = safe_get_local_fp32_param(param) if is_master else safe_get_local_optimizer_state(param, kind)
                tensors[f"{kind}/{name}"] = local[: end - start].detach().to("cpu", copy=True)
            if i == len(parameters) or sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_FILE_BYTES:
                for future in [*written.values()][:-1]:
                    future.result()
                file = f"rank_{ranks.rank:05d}_of_{ranks.world_size:05d}.part_{len(written):03d}.safetensors"
                written[file] = pool.submit(_write_tensors, folder / file, tensors)
                tensors = {}
        return {file: future.result() for file, future in written.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    return write_file(path, [safetensors.torch.save(tensors)])


def shard_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, end) of a flattened parameter that ZeRO-3 gives to a rank (without its padding)."""
    k = -(-numel // world_size)
    return min(rank * k, numel), min((rank + 1) * k, numel)


# ---------------------------------------------------------------------- finding
def _all(output_dir: str) -> list[Path]:
    """Checkpoint folders, whole or not, newest first, by step as a number."""
    folders = [path for path in (Path(output_dir) / "checkpoints").glob("step_*") if FOLDER.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _delete(path: Path) -> None:
    """No checkpoint ever looks whole while it is being deleted."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # what is left, the next run removes


def delete_all(output_dir: str, why: str) -> None:
    """Deletes the checkpoints of a folder, but for those that were set aside."""
    for path in _all(output_dir):
        print_line(f"deleting {path}: {why}")
        _delete(path)


def clear_after(output_dir: str, step: int, resume: str) -> None:
    """Makes way for a run that continues from `step` and writes its own later checkpoints.

    Later ones are deleted for `--resume never`; else they are set aside: they were passed over as damaged, or the user
    named an earlier one to continue from. What a crash left of half-written and half-deleted ones is removed.
    """
    if resume == "never":
        delete_all(output_dir, "--resume never starts over")
    for path in [path for path in _all(output_dir) if _step(path) > step]:
        name = f"{'damaged' if resume == 'auto' else 'abandoned'}_{path.name}"
        numbered = (path.with_name(f"{name}_{i}" if i > 1 else name) for i in itertools.count(1))
        aside = next(free for free in numbered if not free.exists())
        print_line(f"{path} is now {aside.name}: this run continues after step {step}")
        os.rename(path, aside)
    for path in (Path(output_dir) / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def find(output_dir: str, resume: str, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, or the one that `resume` names; None to start from the beginning. Collective.

    A torn or edited checkpoint is named and passed over. Raises UserError if there are checkpoints and none is
    whole for all ranks, and for one that was asked for by path and is not whole, or not of this folder.
    """
    if resume == "never":
        return None
    paths = ranks.once(lambda: _all(output_dir))
    if resume != "auto":
        paths = [path for path in paths if path.resolve() == Path(resume).resolve()]
        if not paths:
            raise UserError(f"--resume {resume}: neither auto, never nor a checkpoint of --output_dir {output_dir}")
    for path in paths:
        faults = enumerate(ranks.gather(lambda: _fault(path, ranks)))
        fault = next((f"{fault} (as rank {rank} sees it)" for rank, fault in faults if fault), None)
        if not fault:
            return path
        if resume != "auto":
            raise UserError(f"--resume {resume}: {fault}")
        ranks.say(f"checkpoint {path} is not whole, passing it over: {fault}")
    if paths:
        advice = f"{path.name}: {fault}; mend them, or use --resume never to start over"
        raise UserError(f"--output_dir {output_dir}: none of its {len(paths)} checkpoints is whole; {advice}")
    return None


def _fault(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, None if every byte is as written.

    Raises OSError if it cannot be read: then it may be whole, and must not be passed over, nor set aside later.
    """
    try:
        if not all((path / name).is_file() for name in ("manifest.json", "COMPLETE")):
            return "manifest.json or COMPLETE is no file"  # a device or a FIFO may never end
        with naming(path):
            manifest = (path / "manifest.json").read_bytes()
            if (path / "COMPLETE").read_bytes() != digest(manifest).encode():
                return "manifest.json is not the one that COMPLETE names"
            for file, entry in sorted(json.loads(manifest)["files"].items())[ranks.rank :: ranks.world_size]:
                if (path / file).stat().st_size != entry["size"] or file_digest(path / file) != entry["digest"]:
                    return f"{file} has been changed"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name}: {e.strerror}"
    return None


# ---------------------------------------------------------------------- reading
def read_state(path: Path) -> RunState:
    """Raises UserError for a checkpoint of another version of this project, or under the name of another step."""
    with as_user_error(f"checkpoint {path} is of another version of this project, use that", TypeError):
        state = RunState(**json.loads((path / "state.json").read_text()))
    if state.step != _step(path):
        raise UserError(f"checkpoint {path} is that of step {state.step} by its state.json; give it its name back")
    return state


def load(engine, parameters: Parameters, path: Path, step: int, ranks: Ranks) -> None:
    """Puts a verified checkpoint's master weights, moments and step into an engine of any world size. Collective."""
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["parameters"] != {name: list(p.ds_shape) for name, p in parameters.items()}:
        raise UserError(f"checkpoint {path} holds another model's parameters")
    residency.set_step(engine, step)
    writers = manifest["world_size"]

    @functools.cache
    def open_shard(writer: int) -> dict:
        """The open files of a rank's shard, by the names of the tensors in them."""
        names = [file for file in sorted(manifest["files"]) if file.startswith(f"rank_{writer:05d}_")]
        return {name: file for file in (safe_open(path / name, "pt") for name in names) for name in file.keys()}  # noqa: SIM118

    for name, param in parameters.items():
        start, end = shard_range(param.ds_numel, ranks.rank, ranks.world_size)
        for kind in KINDS:
            local = torch.zeros(param.ds_tensor.numel(), dtype=torch.float32)
            for writer in range(writers):
                their_start, their_end = shard_range(param.ds_numel, writer, writers)
                first, last = max(start, their_start), min(end, their_end)
                if first < last:
                    source = open_shard(writer)[f"{kind}/{name}"].get_slice(f"{kind}/{name}")
                    local[first - start : last - start] = source[first - their_start : last - their_start]
            if kind == "master":
                safe_set_local_fp32_param(param, local)
            else:
                safe_set_local_optimizer_state(param, local, kind)
    residency.round_master_weights(engine)
    ranks.say(f"resuming after step {step} from {path}")
