"""--report_to: the records of metrics.jsonl also go to TensorBoard, Weights & Biases or trackio, under the same names.

Rank 0 alone reports. A tracker that cannot be opened is a mistake, found before training; one that fails later is
dropped with a warning: it never stops a run. Where and as whom wandb and trackio report, their environment says.
"""

import json
import os
from collections.abc import Callable
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
            for name in sorted({*config.report_to} - {"none"}):
                with as_user_error(f"--report_to {name}"):
                    self.open[name] = OPENERS[name](config, run_id, step)

        ranks.gather(lambda: open_all() if ranks.is_main else None)
        before_exit.append(self.finish)

    def log(self, record: dict) -> None:
        """One record of metrics.jsonl."""
        self._each(0, record)

    def finish(self) -> None:
        """What is on its way arrives. Called before the process ends, whatever ends it."""
        self._each(1)
        self.open = {}

    def _each(self, which: int, *arguments) -> None:
        for name, functions in [*self.open.items()]:
            try:
                functions[which](*arguments)
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


def _wandb(config: TrainConfig, run_id: str, step: int) -> tuple:
    import wandb

    options = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "id": run_id, "name": _run_name(config, run_id)}
    settings = wandb.Settings(console="off")
    run = wandb.init(**options, dir=config.output_dir, config=vars(config), resume="allow", settings=settings)
    return lambda record: run.log(record, step=record["step"]), run.finish


def _trackio(config: TrainConfig, run_id: str, step: int) -> tuple:
    import trackio

    run = trackio.init(PROJECT, _run_name(config, run_id), config=vars(config), resume="allow", embed=False)
    return lambda record: run.log(record, step=record["step"]), run.finish


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
