"""The folder of a run: whose it is, where the run stands in it, its record (run_config.json) and its model card."""

import fcntl
import json
import os
import platform
import secrets
import time
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch

from common.config import LENGTHS, TrainConfig
from common.failures import UserError, as_user_error, log_to, one_line, print_line
from common.files import remove_dead, replace_file, weight_files
from common.ranks import Ranks
from common.run import evaluate, forecast, hub
from common.run.agreement import PACKAGES, require_agreement
from common.run.card import model_card
from common.run.curves import draw_curves, read_metrics, read_run_config
from common.run.metrics import MetricsFile
from common.run.trackers import Trackers
from common.zero import checkpoint
from common.zero.checkpoint import RunState

SECONDS_UNTIL_SEEN = 15  # a network file system may show a new file late


# ---------------------------------------------------------------------- where the run stands
def claim(config: TrainConfig, identity: dict, last_step: int, ranks: Ranks) -> tuple[RunState, Path | None] | None:
    """Where the run of `identity` begins in output_dir, which from here on is this process's alone. Collective.

    None: it has ended there, and its upload, if asked for, is done. Else its state and the checkpoint to load, or None.
    Raises UserError if the folder cannot be written, is a model that this run reads, is written by another run now, or
    holds another run that `--resume auto` would continue or overwrite; if a host sees another folder or other
    checkpoints there; or if the hub would not take the model.
    """
    steps, is_finished = ranks.once(lambda: _take(config, identity, last_step))
    _require_one_folder(config.output_dir, ranks)
    log_to(Path(config.output_dir) / "logs" / f"rank_{ranks.rank}.log")
    if is_finished:
        _end(config, f"{config.output_dir} holds this run, finished after {steps} steps; nothing to do", ranks)
        return None
    if config.push_to_hub:
        ranks.once(lambda: hub.require_repository(config, identity))
    path = checkpoint.find(config.output_dir, config.resume, ranks)
    if path is None:
        if steps:
            ranks.say(f"warning: {config.output_dir}: ended after {steps} steps, with no checkpoint: it begins anew")
        return RunState(identity=identity), None
    state = checkpoint.read_state(path)
    _require_same_run(f"checkpoint {path}", config.output_dir, state.identity, identity, state.step, last_step)
    return state, path


def _take(config: TrainConfig, identity: dict, last_step: int) -> tuple[int | None, bool]:
    """Takes the folder; (the steps of the ended run that it holds, whether nothing is left of it to do)."""
    output_dir = Path(config.output_dir)
    _require_no_other_model(config)
    with as_user_error(f"--output_dir {output_dir}: cannot be written", OSError):
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        _lock(output_dir)
    result = require_no_other_run(config, identity, last_step, is_part=False)
    steps = result.get("steps")
    # A run that stopped early is finished for as long as the same patience is asked for.
    has_ended = steps == last_step or result.get("stopped_early") == (config.early_stopping_patience or 0)
    exported_best = read_run_config(output_dir).get("config", {}).get("export_best", False)
    is_what_is_asked = exported_best == config.export_best or not checkpoint.newest_first(config.output_dir)
    is_finished = has_ended and is_what_is_asked and _holds_model(output_dir)
    if is_finished and config.clean_checkpoints_at_end:  # finish() was killed before it came to that
        checkpoint.delete_all(config.output_dir, "the run is done")
    return steps, is_finished


def require_no_other_run(config: TrainConfig, identity: dict, last_step: int, is_part: bool = True) -> dict:
    """The result of the ended run that output_dir holds and `--resume` goes on from, {} without one. Writes nothing.
    Raises UserError where claim would, as far as `identity`, of which is_part says that it lacks something, tells."""
    _require_no_other_model(config)
    record = read_run_config(config.output_dir)
    result, old = record.get("result", {}), record.get("identity", {})
    if config.resume != "auto" or not record or not result and not checkpoint.newest_first(config.output_dir):
        return {}
    if is_part:
        old = {name: old.get(name) for name in identity}
    _require_same_run(config.output_dir, config.output_dir, old, identity, result.get("steps", 0), last_step)
    return result


def _require_one_folder(output_dir: str, ranks: Ranks) -> None:
    """Raises UserError unless every host sees the folder that rank 0 writes to, and its checkpoints. Collective."""
    if ranks.local_world_size == ranks.world_size:
        return
    lock = Path(output_dir) / ".lock"

    def view() -> dict:
        known_by = _locks[-1][1] if ranks.is_main else lock.is_file() and lock.read_text()
        seen = {".lock": known_by} | checkpoint.seen(output_dir)
        return {f"{name} of --output_dir, a folder that all must share": mark for name, mark in seen.items()}

    ours, until = ranks.once(view), time.monotonic() + SECONDS_UNTIL_SEEN

    def view_in_time() -> dict:
        while view() != ours and time.monotonic() < until:
            time.sleep(1)
        return view()

    require_agreement(view_in_time, ranks)


def _require_no_other_model(config: TrainConfig) -> None:
    """Raises UserError if output_dir is a model that this run reads, or one that no run wrote; or if a model to be read
    lies in the folder of an unfinished run, for it is that of the run before."""
    output_dir = Path(config.output_dir)
    for flag in ("model_name_or_path", "ref_model_name_or_path"):
        read = getattr(config, flag, None) or ""
        if read and Path(read).resolve() == output_dir.resolve():
            raise UserError(f"--output_dir {output_dir} is --{flag}, which would be lost; name another folder")
        record = read_run_config(read) if read else {}
        if "identity" in record and "result" not in record:
            raise UserError(f"--{flag} {read}: that run has not finished; the model there, if any, is an earlier one's")
    foreign = next(output_dir.glob("model*.safetensors*"), None)
    if foreign and not (output_dir / "run_config.json").is_file():
        raise UserError(f"--output_dir {output_dir}: no run of this project wrote {foreign.name}; name another folder")


def _require_same_run(what: str, output_dir: str, old: dict, new: dict, steps: int, last_step: int) -> None:
    """Raises UserError if `what` is of another identity, with each value that differs, or of a later step."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    differing = [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names]
    if steps > last_step and not differing:
        differing = [f"it is after step {steps}, past this run's last step, {last_step}"]
    if differing:
        advice = "Use the old values, another --output_dir, or --resume never to start over"
        if names and {*names} <= {*LENGTHS}:  # each step's learning rate follows from the number of steps
            advice += f"; to train its model further: --model_name_or_path {output_dir} and another --output_dir"
        raise UserError(f"{what} belongs to another run: {'; '.join(differing)}. {advice}")


def _holds_model(output_dir: Path) -> bool:
    """Whether every file of an export is there."""
    try:
        return all((output_dir / name).is_file() for name in weight_files(output_dir))
    except Exception:  # whatever is there is no export
        return False


# What was locked, and written there. A lock ends with this process, or when it closes any other open file of that name.
_locks: list[tuple[TextIO, str]] = []


def _lock(output_dir: Path) -> None:
    """Raises UserError if another process writes in this folder now."""
    # Opened for writing, for network file systems lock no folder; not emptied, for it may be another run's.
    file = open(output_dir / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {output_dir}: another run writes there now; name another folder") from None
    except OSError as e:
        print_line(f"warning: --output_dir {output_dir}: no lock keeps a second run out ({e.strerror})")
    _locks.append((file, secrets.token_hex(8)))  # by which the other hosts know it
    file.truncate(0)
    file.write(_locks[-1][1])
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------------- the run's record
def record_of(method: str, config: TrainConfig, identity: dict, state: RunState, policy, ranks: Ranks, **more) -> dict:
    """What run_config.json says of a run: every resolved value, what it ran on, and `more`. Collective."""
    parameters, device = list(policy.parameters()), "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        device, memory = properties.name, properties.total_memory
    held = ranks.gather(lambda: sum(p.ds_tensor.numel() for p in parameters))  # the padding included
    numel = sum(p.ds_numel for p in parameters)
    record = {"method": method, "config": vars(config), "identity": identity, "layers": policy.layers_report()}
    record |= {name: getattr(state, name) for name in ("micro_batch_budget", "opening_budget", "residency")}
    record |= {"device": {"name": device, "total_memory_gb": memory / 1e9}, "world_size": ranks.world_size}
    record["zero"] = {"stage": 3, "num_parameters": numel, "partitioned_parameters_per_rank": held}
    record["versions"] = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return record | more


def open_output_dir(config: TrainConfig, record: dict, state: RunState, ranks: Ranks) -> MetricsFile:
    """Makes way for a run that begins after `state.step`, and writes its record, without a result. Collective."""

    def begin() -> None:
        checkpoint.clear_after(config.output_dir, state.step, config.resume)
        remove_dead(Path(config.output_dir).glob(".verify_*"))  # of verify that was killed
        for path in Path(config.output_dir).glob(".*.tmp"):  # of a run that was
            path.unlink()
        if config.export_at_checkpoints:
            checkpoint.export_missing(config.output_dir)
        before = read_run_config(config.output_dir) if state.step else {}
        resumes = [step for step in before.get("resumed_after", []) if step < state.step] + [state.step]
        record["resumed_after"] = resumes if state.step else []
        record["run_id"] = before.get("run_id") or secrets.token_hex(4)
        write_run_config(config.output_dir, record)

    ranks.once(begin)
    trackers = Trackers(config, record.get("run_id", ""), state.step, ranks)
    held_out = (record.get("evaluation") or {}).get("held_out", "")
    if state.held_out != held_out:  # early stopping compares losses of the same data
        state.held_out, state.held_out_since = held_out, state.step
    return MetricsFile(config.output_dir, state, ranks, trackers)


def finish(config: TrainConfig, record: dict, state: RunState, metrics: MetricsFile, table: str, ranks: Ranks) -> None:
    """Curves, model card (with the data's table), then the result: from here on the folder holds a finished run; then
    its upload, if asked for. Collective."""
    metrics.flush_to_disk()  # it is still the run's own folder that the model was written to
    is_early = evaluate.has_stalled(metrics.eval_losses, config.early_stopping_patience)
    agreement = ranks.gather(lambda: [state.step, state.samples, state.target_tokens, record["identity"]])
    result: dict = {"steps": state.step, "total_tokens": state.total_tokens, "target_tokens": state.target_tokens}
    result["train_loss"] = metrics.last and metrics.last["train_loss"]
    result["stopped_early"] = config.early_stopping_patience if is_early else None
    result["rank_agreement"] = all(a == agreement[0] for a in agreement)

    def write() -> None:
        try:
            draw_curves(Path(config.output_dir), record.get("resumed_after"))
        except Exception as e:  # a picture is not worth a run that is done
            print_line(f"warning: {config.output_dir}/curves.png was not drawn: {type(e).__name__}: {one_line(e)}")
        finished = {**record, "result": result}
        replace_file(Path(config.output_dir) / "README.md", model_card(config, finished, metrics.last, table))
        write_run_config(config.output_dir, finished)
        if config.clean_checkpoints_at_end:
            checkpoint.delete_all(config.output_dir, "the run is done")

    ranks.once(write)
    if metrics.last and "planned" in record:
        path = Path(config.output_dir) / "metrics.jsonl"
        ranks.say(ranks.once(lambda: forecast.beside(record["planned"], read_metrics(path))))
    exported = record.get("exported_step", state.step)  # --export_best may have another
    of = "the model" if exported == state.step else f"the model of step {exported},"
    _end(config, f"done: {config.output_dir} holds {of} after {state.step} steps", ranks)


def _end(config: TrainConfig, line: str, ranks: Ranks) -> None:
    """Says how the run stands, and uploads its model, if asked for. Collective."""
    ranks.say(line)
    if config.push_to_hub:
        ranks.say(ranks.once(lambda: hub.push(config)))


def write_run_config(output_dir: str, record: dict) -> None:
    replace_file(Path(output_dir) / "run_config.json", json.dumps(record, indent=2, default=str) + "\n")
