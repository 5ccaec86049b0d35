"""What a run would do, and what is wrong with it, by what the scripts themselves call, in one process.

Nothing is estimated here: data, schedule, memory plan and forecast are the run's own, given the figures of a card.
"""

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi

from common.config import DPOConfig, TrainConfig
from common.data.cache import prepare_tokens, too_much_dropped
from common.data.chat_template import ChatTemplate, resolve_template
from common.data.dataset import TokenDataset
from common.data.report import losses_of_sources
from common.failures import UserError, one_line
from common.files import weights_digest
from common.model import load
from common.ranks import Ranks
from common.run import disk, hub
from common.run.agreement import run_identity
from common.run.evaluate import Evaluation, largest, training_and_held_out
from common.run.forecast import forecast
from common.run.metrics import device_peak_flops, peak_flops_of
from common.run.output_dir import require_no_other_run
from common.step.packing import pair_lengths
from common.step.schedule import Schedule
from common.zero.checkpoint import RunState
from common.zero.ds_config import deepspeed_config
from common.zero.memory import choose_residency, measuring, workload_of
from common.zero.plan import Card, Plan, Workload

WIDTH, NAMES = 100, 20  # columns: of the table, and of its names
MOST_ROWS = 2000  # that are tokenized only for a plan
LOSS = 0.05  # of a source's rows, dropped or cut, that is worth a warning
GPUS_PER_HOST = 8
HOST_GB_PER_GPU = 200  # assumed
# Bytes free once CUDA has its part, bytes a second each way over the host's link, FLOP/s of a large bf16 product. The
# link of the H200 was measured once. All else is assumed: the product of H100 and H200 is 77% of the peak, as that of
# A100 and B200; the A100's link has half the speed. A card that is here is measured.
CARDS = {
    "a100-80gb": (84.0e9, 19e9, 240e12),
    "h100": (84.0e9, 37e9, 760e12),
    "h200": (149.0e9, 37e9, 760e12),
    "b200": (190.0e9, 37e9, 1730e12),
}


class Machine(NamedTuple):
    """gpu: of CARDS, None for the one that is here; host_memory_gb: of a host, None if it is not known."""

    num_gpus: int
    gpu: str | None
    host_memory_gb: float | None

    @property
    def per_host(self) -> int:
        return min(self.num_gpus, GPUS_PER_HOST)

    def card(self) -> tuple[Card, float | None, str]:
        """(what a rank has of it, peak FLOP/s, what to call it)."""
        spans_hosts = self.num_gpus > self.per_host
        if self.gpu is None:
            device = torch.device("cuda", 0)
            free, host, link, flops = measuring(device, self.per_host)()
            peak, name, source = device_peak_flops(device), torch.cuda.get_device_name(device), "measured here"
        else:
            (free, link, flops), host = CARDS[self.gpu], HOST_GB_PER_GPU * 1e9
            peak, name, source = peak_flops_of(self.gpu.upper()), self.gpu, "assumed; --host_memory_gb says what it is"
        if self.host_memory_gb is not None:
            host, source = self.host_memory_gb * 1e9 / self.per_host, "as given"
        text = f"{self.num_gpus} x {name}, {free / 1e9:.0f} GB free on each; {host * self.per_host / 1e9:,.0f} GB of "
        return Card(free, host, link, flops, spans_hosts), peak, f"{text}host memory for {self.per_host} ({source})"


class Absent(Ranks):
    """The ranks of a run that does not take place: this process does what one of them does for all, and keeps what they
    would say."""

    def __init__(self, machine: Machine):
        device = torch.device("cuda")
        super().__init__(0, machine.num_gpus, 0, machine.per_host, device, control=None, store=None)
        self.said: list[str] = []

    def gather(self, work) -> list:
        return [work()]

    def _while_others_wait(self, work, is_worker: bool) -> list:
        return [work()]

    def say(self, text: str, is_live: bool = False) -> None:
        self.said.append(text)


class Spread(NamedTuple):
    """95% intervals of what a draw of rows tells of all, as parts of the value; 0 where every row was read.
    num_rows: of all sources."""

    samples: float = 0.0
    tokens: float = 0.0
    num_rows: float = math.inf


EXACT = Spread()


def ranged(value: float, part: float, most: float = math.inf) -> str:
    """A number and, unless part is 0, the interval of that part of it to both sides."""
    if part == 0:
        return f"{value:,.0f}"
    return f"about {value:,.0f} ({value * (1 - part):,.0f} to {min(most, value * (1 + part)):,.0f})"


def listed(every: int, last: int, has_end: bool) -> str:
    """`after step 2, 4, 6, 8, ... 12 (6 in all)`, or `none`: every so many steps and, if asked for, the last one."""
    number = last // every + (has_end and last % every > 0)
    end = last if has_end else number * every
    shown = [f"{step:,}" for step in [*range(every, last + 1, every)[: min(4, number - 1)], end]]
    if number > 5:
        shown[-1] = f"... {shown[-1]} ({number:,} in all)"
    return f"after step {', '.join(shown)}" if number else "none"


def plan_rows(
    config: TrainConfig,
    plan: Plan,
    workload: Workload,
    schedule: Schedule,
    evaluation,
    planned: dict,
    ranks,
    spread=EXACT,
) -> dict[str, str]:
    """What a run will do, before anything is loaded: values by their names. planned: its forecast. spread: of the data,
    where a part of it was read."""
    budget = plan.budget if ranks.device.type == "cuda" else workload.budget  # without a GPU nothing is chosen
    memory, layers, row, last = plan.memory, plan.shape.layers, max(budget, workload.longest), schedule.last_step
    unit = "pairs" if isinstance(config, DPOConfig) else "samples"
    parts = plan.parts(row)
    warm_up = 0 if config.lr_scheduler_type == "constant" else int(schedule.num_steps * config.warmup_ratio)
    steps = ranged(last, 0.0 if config.max_train_steps else spread.samples)
    of_steps = f"{schedule.batch} {unit} a step, {schedule.steps_per_epoch:,} an epoch"
    first = f" and a step's first of {plan.opening:,}" if plan.opening > plan.budget == budget else ""
    rows = {"loss": f"{config.loss_type}, beta {config.beta:g}"} if isinstance(config, DPOConfig) else {}
    rows |= {
        unit: ranged(schedule.num_samples, spread.samples, spread.num_rows),
        "tokens": f"{ranged(planned['tokens'], spread.tokens)} in all; longest {workload.longest:,}",
        "steps": f"{steps} of {schedule.num_steps:,}, {of_steps}",
        "warm-up": f"{warm_up:,} steps",
        "checkpoints": listed(schedule.save_every, last, schedule.keeps_end)
        + ", and after each evaluation that is the best so far" * (config.keep_best is not None),
        "evaluations": listed(evaluation.every, last, True) if evaluation.held_out is not None else "none",
        "disk": disk.need(config, plan.shape.numel, schedule),
        "memory of a rank": " + ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items())
        + f" = {sum(parts.values()) / 1e9:.1f} of {plan.card.free / 1e9:.1f} GB; optimizer state in host memory "
        f"{memory.host / 1e9:,.1f} GB, {memory.host * ranks.local_world_size / 1e9:,.1f} GB in each host",
        "the planner's choice": f"residency {memory.residency}, {memory.share:.0%} of the optimizer's state on the "
        f"device, micro-batches of {budget:,} tokens{first}; {plan.recomputing} of {layers} layers recomputed at "
        f"{row:,}",
    }
    if "hours" in planned:
        hours, speed = planned["hours"], planned["tokens"] / planned["hours"] / 3600
        rows["hours"] = f"{hours:,.3g} of training steps, at {planned['mfu']:.1%} MFU, {speed:,.0f} tokens/s"
        if "reference_hours" in planned:
            hours += planned["reference_hours"]
            rows["hours"] += f"; with the reference pass {hours:,.3g}"
        if "cost" in planned:
            gpu_hours = f"{hours * ranks.world_size:,.3g} GPU-hours at {config.gpu_hour_price:g}"
            rows["cost"] = f"{planned['cost']:,.2f}, for {gpu_hours}"
    return rows


def tell_plan(
    config: TrainConfig, plan: Plan, workload: Workload, schedule: Schedule, evaluation, planned: dict, ranks: Ranks
) -> None:
    """Says what plan_rows has of the run. Raises UserError where its disk is too small. Collective."""
    rows = plan_rows(config, plan, workload, schedule, evaluation, planned, ranks)
    ranks.say(as_text(rows))
    ranks.once(lambda: disk.require(rows["disk"]))


def as_text(rows: dict[str, str]) -> str:
    """A table of WIDTH columns."""
    options: dict = dict(width=WIDTH, subsequent_indent=" " * (NAMES + 2), break_on_hyphens=False)
    return "\n".join(textwrap.fill(text, initial_indent=f"{name:<{NAMES}}  ", **options) for name, text in rows.items())


def spread_of(ds: TokenDataset, num_rows: int) -> Spread:
    """By the normal approximation, with the correction for a draw of a finite number of rows (Cochran 1977, section 2).

    ds: with all samples that were kept. A row that was dropped counts 0 tokens; two more rows of each kind are counted
    for the part that is kept (Agresti and Coull 1998), for which none dropped of 2,000 does not mean none.
    """
    num_read = ds.stats["rows_read"]
    if num_read == num_rows:
        return EXACT
    unit = 1.96 * math.sqrt((1 - num_read / num_rows) / num_read)
    kept = (len(ds) + 2) / (num_read + 4)
    tokens = np.concatenate([ds.lengths, np.zeros(num_read - len(ds))])
    of_samples = unit * math.sqrt(kept * (1 - kept)) / kept
    return Spread(of_samples, unit * float(tokens.std() / tokens.mean()), num_rows)


def plan_table(
    method: str, config: TrainConfig, machine: Machine, mfu: float | None
) -> tuple[dict[str, str], list[str]]:
    """(the table, warnings). mfu: to count with, None for the one predicted. Raises UserError where the run would."""
    ranks = Absent(machine)
    ds_config = deepspeed_config(config)

    # ------------------------------------------------------------------ data
    folder = load.find_model(config.model_name_or_path, config.model_revision, load.TOKENIZER_FILES)
    model_config = load.load_config(folder)
    tokenizer = load.load_tokenizer(load.find_tokenizer(config.tokenizer_name_or_path or folder))
    template = resolve_template(config.chat_template, tokenizer)
    reading = dataclasses.replace(config, allow_dropped=True)
    whole = TokenDataset(prepare_tokens(method, reading, template, MOST_ROWS))
    num_rows = sum(source.get("drawn_from", source["rows_used"]) for source in whole.stats["sources"])
    spread = spread_of(whole, num_rows)
    is_drawn, share = num_rows > whole.stats["rows_read"], len(whole) / whole.stats["rows_read"]
    if is_drawn and (reading.eval_holdout or "").isdecimal():  # that part of the draw
        reading.eval_holdout = f"{max(0.1, 100 * int(reading.eval_holdout or 0) / num_rows):.4f}%"
    data, held_out = training_and_held_out(method, reading, template, ranks, MOST_ROWS)
    lost = too_much_dropped(whole)
    if lost and not is_drawn and not config.allow_dropped:
        raise UserError(lost)
    longest, num_token_ids = largest(data, held_out)
    load.check_supported(model_config, longest, num_token_ids)
    lengths = data.lengths
    if data.pair_lengths is not None:
        lengths = pair_lengths(data.pair_lengths, getattr(config, "share_prompt", True))

    # ------------------------------------------------------------------ steps
    num_samples = round(num_rows * len(data) / whole.stats["rows_read"]) if is_drawn else len(data)
    schedule = Schedule(config, num_samples)
    evaluation = Evaluation(data, held_out, config, schedule, ranks)

    # ------------------------------------------------------------------ memory, time, disk
    card, peak, called = machine.card()
    workload = workload_of(config, lengths, data.source_of(int(lengths.argmax())), RunState(), ranks)
    _, plan = choose_residency(ds_config, config, model_config, workload, ranks, card)
    planned = forecast(plan, workload, schedule, lengths, model_config, config, ranks, peak, mfu)
    warnings = load.warnings(template, model_config, longest) + schedule.warnings()
    warnings += [*losses_of_sources(whole, LOSS), *([lost] if lost else [])]
    warnings += [line for line in ranks.said if line.startswith("warning")]
    warnings += trouble(config, folder, None if is_drawn else data.digest, template, schedule.last_step)
    rows = plan_rows(config, plan, workload, schedule, evaluation, planned, ranks, spread) | {"machine": called}
    if held_out is not None:
        number = "some" if is_drawn else f"{len(held_out):,}"
        rows["pairs" if method == "dpo" else "samples"] += f"; {number} are held out"
    if is_drawn:
        of_rows = f"{whole.stats['rows_read']:,} of {num_rows:,} rows were tokenized, {share:.1%} of them kept"
        rows = {"data": f"{of_rows}: numbers with `about` are estimates, with their 95% intervals"} | rows
    return rows, warnings


def trouble(config: TrainConfig, folder: str, data: str | None, template: ChatTemplate, last_step: int) -> list[str]:
    """What the run would find wrong with its output folder and with its token for the hub. data: digest, if known."""
    lines, digests = [], {"chat_template": template.digest} | ({"dataset_mixer": data} if data else {})
    has_record = (Path(config.output_dir) / hub.RECORD).is_file()
    if has_record and next(Path(folder).glob("*.safetensors"), None):
        digests["model_name_or_path"] = weights_digest(folder)
    try:
        require_no_other_run(config, run_identity(config, digests), last_step)
    except UserError as error:
        lines.append(str(error))
    if config.push_to_hub:
        try:
            hub.require_write_token(HfApi())
        except Exception as error:  # whatever it is, the upload would meet it
            lines.append(f"--push_to_hub: {one_line(error)}")
    return lines
