"""The disk that a run needs at once. Nothing here imports torch: `run.sh` asks before any rank starts."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

from common.config import TrainConfig
from common.failures import UserError
from common.files import weight_files

CHECKPOINT_BYTES = 12  # of a parameter: master weight and two moments, in float32
ITEMSIZES = {"bfloat16": 2, "float32": 4}
LARGEST_HEADER = 10**8  # bytes, by the format; a file that is none may name any number
SHORT = "; more is needed"


def need(config: TrainConfig, numel: int, schedule) -> str:
    """What the checkpoints and exported models of numel parameters take at once, and what is free where the run's
    folder is; ends with SHORT where that is less. What the folder's checkpoints take counts as free, for new ones
    replace them; what was set aside does not."""
    num_written = schedule.last_step // schedule.save_every + schedule.keeps_end
    most = config.keep_last_n_checkpoints + 1  # with the one that is being written
    num_checkpoints = min(most + 1, schedule.last_step) if config.keep_best else min(most, num_written)
    num_models = 1 + num_checkpoints * config.export_at_checkpoints
    needed = numel * (num_checkpoints * CHECKPOINT_BYTES + num_models * ITEMSIZES[config.dtype])
    folder = Path(config.output_dir)
    replaced = sum(path.stat().st_size for path in folder.glob("checkpoints/step_*/**/*") if path.is_file())
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free + replaced
    text = f"{needed / 1e9:,.1f} GB for {num_checkpoints} checkpoints and {num_models} exported models at once, "
    return text + f"{free / 1e9:,.1f} GB free here at {folder}" + SHORT * (needed > free)


def require(space: str) -> None:
    """Raises UserError where what `need` said is short."""
    if space.endswith(SHORT):
        raise UserError(f"--output_dir: {space}; free some, or lower --keep_last_n_checkpoints")


def require_least(config: TrainConfig) -> None:
    """As require, of a new run from a model in a folder here, for what is certain before data is read: how many
    checkpoints there will be only by --max_train_steps. A head, which may be tied, does not count."""
    folder = Path(config.model_name_or_path)
    try:
        settings = (folder / "config.json").read_text(encoding="utf-8")
        numel = sum(stored_numel(folder / name) for name in weight_files(folder))
    except Exception:  # it is on the hub, or no model: whatever is wrong with it, the run says
        return
    every, steps = config.checkpointing_steps, min(config.max_train_steps or 0, config.stop_after_steps or math.inf)
    least = SimpleNamespace(last_step=steps, save_every=every if isinstance(every, int) else steps + 1, keeps_end=0)
    if "text_config" not in settings and not (Path(config.output_dir) / "run_config.json").exists():
        require(need(config, numel, least))  # of a model of other parts too only the text is trained


def stored_numel(path: Path) -> int:
    """Elements of all tensors of a safetensors file but a head, by its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(min(LARGEST_HEADER, int.from_bytes(file.read(8), "little"))))
    return sum(math.prod(header[name]["shape"]) for name in header.keys() - {"__metadata__", "lm_head.weight"})
