"""--report_to: the records of metrics.jsonl also go to TensorBoard, Weights & Biases or trackio, under the same names.

Rank 0 alone reports. A tracker that cannot be opened is a mistake, found before training; one that fails later is
dropped with a warning: it never stops a run. Where and as whom wandb and trackio report, their environment says.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from common.config import TrainConfig
from common.failures import as_user_error, one_line, print_line
from common.ranks import Ranks
from common.stopping import before_exit

PROJECT = "plaintune"


class Trackers:
    """The open trackers of this process: none but on rank 0."""

    def __init__(self, config: TrainConfig, run_id: str, step: int, ranks: Ranks):
        """run_id: of the run, the same in each resume; step: after which it begins. Collective. Raises UserError."""
        self.open: dict[str, tuple[Callable[[dict], object], Callable[[], object]]] = {}  # (log, finish) of each

        def open_all() -> None:
            for name in sorted({*config.report_to} - {"none"}) if ranks.is_main else ():
                with as_user_error(f"--report_to {name}"):
                    self.open[name] = OPENERS[name](config, run_id, step)

        ranks.gather(open_all)
        before_exit.append(lambda: self.log(None))

    def log(self, record: dict | None) -> None:
        """One record of metrics.jsonl; None: this process ends, and what is on its way has to arrive."""
        for name, (log, finish) in [*self.open.items()]:
            try:
                finish() if record is None else log(record)
            except Exception as e:  # whatever a tracker raises, the run goes on
                del self.open[name]
                why = f"{type(e).__name__}: {one_line(e)}"
                print_line(f"warning: --report_to {name} failed and gets nothing more: {why}")


def _run_name(config: TrainConfig, run_id: str) -> str:
    return f"{Path(config.output_dir).resolve().name}-{run_id}"


def _tensorboard(config: TrainConfig, run_id: str, step: int) -> tuple:
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier process wrote of later steps is left out of view.
    writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=step + 1)
    settings = json.dumps(vars(config), indent=2, default=str)
    writer.add_text(_run_name(config, run_id), f"```\n{settings}\n```", step)

    def log(record: dict) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return log, writer.close


def _wandb_or_trackio(name: str, config: TrainConfig, run_id: str, step: int) -> tuple:
    module = import_module(name)
    own: dict = {"project": PROJECT, "embed": False}
    if name == "wandb":
        own = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "id": run_id, "dir": config.output_dir}
        own["settings"] = module.Settings(console="off")
    run = module.init(name=_run_name(config, run_id), config=vars(config), resume="allow", **own)
    return lambda record: run.log(record, step=record["step"]), run.finish


OPENERS = {"tensorboard": _tensorboard} | {name: partial(_wandb_or_trackio, name) for name in ("wandb", "trackio")}
