"""run_config.json and the model card: what was run, with what, and how it ended."""

import fcntl
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from common.config import TrainConfig, identity_values
from common.failures import UserError, as_user_error
from common.files import digest, file_digest, replace_file, weight_digests
from common.ranks import Ranks
from common.zero.checkpoint import RunState, delete_after, require_same_run

FINISHED = "the run is done (--clean_checkpoints_at_end)"
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")


def run_identity(
    config: TrainConfig, data_digest: str, template_digest: str, model_folder: str, reference_folder: str | None = None
) -> dict:
    """Every value that decides what is trained, by the name under which a user knows it.

    The mixer and the template are represented by digests of what they were read as, the model by its config.json and
    its weights: an SFT folder that a new run has overwritten is another model. So is a reference that is a model of its
    own. Reads the weights once (see reference_cache.weight_digests), so call it on one rank.
    """
    identity = identity_values(config)
    identity |= {"dataset_mixer (contents)": data_digest, "chat_template (contents)": template_digest}
    for name, folder in (("model_name_or_path", model_folder), ("ref_model_name_or_path", reference_folder)):
        if folder is not None:
            weights = json.dumps(weight_digests(folder, config.cache_dir), sort_keys=True)
            identity |= {
                f"{name} (config.json)": file_digest(Path(folder) / "config.json"),
                f"{name} (weights)": digest(weights.encode()),
            }
    return identity


def write_run_config(output_dir: str, record: dict) -> None:
    """Replaces run_config.json in one step."""
    replace_file(Path(output_dir) / "run_config.json", json.dumps(record, indent=2, default=str) + "\n")


def check_output_dir(config: TrainConfig, identity: dict, last_step: int) -> bool:
    """Whether output_dir already holds this run, finished. From here on it is this process's alone.

    Raises UserError if it cannot be written, is a model that this run reads, is written by another run now, or holds
    another finished run that `--resume auto` would overwrite.
    """
    for flag in ("model_name_or_path", "ref_model_name_or_path"):
        if (read := getattr(config, flag, None)) and Path(read).resolve() == Path(config.output_dir).resolve():
            raise UserError(f"--output_dir {config.output_dir} is --{flag}, which would be lost; name another folder")
    with as_user_error(f"--output_dir {config.output_dir}: cannot be written", OSError):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        _hold(config.output_dir)
        (Path(config.output_dir) / ".writable").touch()
        (Path(config.output_dir) / ".writable").unlink()
    for name, is_right in (
        ("checkpoints", Path.is_dir),
        ("metrics.jsonl", Path.is_file),
        ("run_config.json", Path.is_file),
    ):
        if (path := Path(config.output_dir) / name).exists() and not is_right(path):
            raise UserError(f"{path} is in the way; move it, or name another --output_dir")
    record = read_run_config(config.output_dir)
    steps = record.get("result", {}).get("steps")
    if config.resume != "auto" or steps is None:
        return False
    require_same_run(record.get("identity", {}), identity, f"the model in {config.output_dir}")
    if steps > last_step:
        raise UserError(
            f"{config.output_dir} holds this run's model after {steps} steps, past the {last_step} asked for; "
            f"use another --output_dir, or --resume never to start over"
        )
    is_finished = steps == last_step and _holds_model(config.output_dir)
    if is_finished and config.clean_checkpoints_at_end:  # finish() was killed before it came to that
        delete_after(config.output_dir, 0, FINISHED)
    return is_finished


def _holds_model(output_dir: str) -> bool:
    """Whether the index of an export is there, and every file that it names."""
    try:
        index = json.loads((Path(output_dir) / "model.safetensors.index.json").read_bytes())
        return all((Path(output_dir) / name).is_file() for name in index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


_held: dict[Path, int] = {}  # folder -> descriptor; the system lets go of them when this process ends


def _hold(output_dir: str) -> None:
    """Locks the folder. Raises UserError if another process has."""
    folder = Path(output_dir).resolve()
    if folder in _held:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"--output_dir {output_dir}: another run writes there now; wait, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _held[folder] = descriptor


def open_output_dir(config: TrainConfig, record: dict, resume_from: Path | None, step: int) -> None:
    """Clears what a run that begins after `step` replaces: later checkpoints, and with a checkpoint from elsewhere also
    another run's; run_config.json has no result until the run has one."""
    output_dir = Path(config.output_dir)
    is_own = resume_from is None or resume_from.resolve().parent == (output_dir / "checkpoints").resolve()
    if not is_own and read_run_config(config.output_dir).get("identity", record["identity"]) != record["identity"]:
        step = 0
        (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    delete_after(config.output_dir, step, f"this run continues from {resume_from or 'the start'}")
    write_run_config(config.output_dir, record)


def finish(
    config: TrainConfig, record: dict, state: RunState, last_metrics: dict | None, agreement: list, data_table: str
) -> None:
    """The model card, then the result in run_config.json: from here on the folder holds a finished run.

    last_metrics: None where metrics.jsonl is of no step yet (a last step's checkpoint of another folder).
    agreement: what each rank says of the step and tokens it stands at.
    """
    result = {
        "steps": state.step,
        "total_tokens": state.total_tokens,
        "target_tokens": state.target_tokens,
        "train_loss": last_metrics and last_metrics["train_loss"],
        "rank_agreement": all(a == agreement[0] for a in agreement),
    }
    card = model_card(record["method"], config, data_table, result)
    (Path(config.output_dir) / "README.md").write_text(card, encoding="utf-8")
    write_run_config(config.output_dir, {**record, "result": result})
    if config.clean_checkpoints_at_end:
        delete_after(config.output_dir, 0, FINISHED)


def read_run_config(output_dir: str) -> dict:
    """The record of the run that used this folder before, {} if none did. Raises UserError if it cannot be read."""
    path = Path(output_dir) / "run_config.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(key, {}), dict) for key in ("identity", "result")):
        raise UserError(f"{path} is not JSON that a run wrote; delete it or use another --output_dir")
    return record


def environment(ranks: Ranks) -> dict:
    """Versions and device of this run."""
    on_gpu = ranks.device.type == "cuda"
    memory = (
        torch.cuda.get_device_properties(ranks.device).total_memory
        if on_gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": {
            "name": torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
            "total_memory_gb": memory / 1e9,
        },
        "world_size": ranks.world_size,
    }


def model_card(method: str, config: TrainConfig, data_table: str, result: dict) -> str:
    """README.md of the exported model."""
    shown = identity_values(config, (True, "contents"))
    rows = "\n".join(
        f"| {name} | {' '.join(value) if isinstance(value, list) else value} |" for name, value in shown.items()
    )
    base = config.model_name_or_path
    is_hub_id = base.count("/") == 1 and not Path(base).exists()
    base_model = f"base_model: {base}\n" if is_hub_id else ""
    loss = "" if result["train_loss"] is None else f" Last loss: {result['train_loss']:.4f}."
    front = f"---\nlibrary_name: transformers\n{base_model}tags: [{method.lower()}]\n---\n"
    return (
        f"{front}\n# {Path(config.output_dir).name}\n\n{method} of `{base}`, full parameters, with Plaintune.\n\n"
        f"Steps: {result['steps']}. Tokens: {result['total_tokens']:,}.{loss}\n\n"
        f"## Data\n\n```\n{data_table}\n```\n\n## Settings\n\n| setting | value |\n|---|---|\n{rows}\n"
    )
