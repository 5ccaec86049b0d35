"""Was it a good run? What people used to look for by eye in the first 100 steps' curves, as checks.

`judge_run` reads what a run left behind (metrics.jsonl, run_config.json, its exit code and output) and gives
a list of checks; a failed one says the likely causes and what to try. `format_table` shows them to a person.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

from common.failures import TrainingStopped
from common.step.losses import LOSSES, check_first_step

WINDOW = 10  # logged steps at either end of a history that are averaged
WARMUP_STEPS = 5  # logged steps whose duration is not judged: allocators, compilers and caches warm up
REQUIRED = ("step", "train_loss", "grad_norm", "tokens_per_second", "step_seconds", "max_memory_gb")
REQUIRED_DPO = ("rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected")

# Likely causes of a failed check and what to try, by the check's name.
ADVICE = {
    "run finished": "read the run's output. Exit code 2: a mistake in a flag or the data; 3: the run stopped itself and "
    "said at which step and what to try; 130, 143: it was asked to stop; 137, 247: it was killed, often "
    "for the host's memory. The same command resumes from the last checkpoint",
    "SFT loss falls": "learning rate too low or far too high; targets that are not the answers (look at the printed "
    "sample); a model that was trained on this data before",
    "DPO loss falls": "learning rate too low; beta far too small or large; chosen and rejected swapped",
    "loss value": "learning rate too high; a tokenizer that is not the model's; weights that were never trained; an "
    "odd sample at that step. --dtype float32 rules out precision",
    "grad norm": "0: parameters without a gradient, or no target tokens. High: learning rate too high, warm-up too "
    "short, damaged weights. Low: nothing left to learn, or a loss that is divided twice",
    "speed": "another process on the devices; a slow disk or network; swapping; attention that recompiles; a GPU "
    "that throttles",
    "memory": "--gradient_checkpointing full, smaller --max_tokens_per_micro_batch, shorter --max_seq_length, "
    "more GPUs; end other processes on the same GPU",
    "DPO starts at ln 2": "policy and reference differ before the first update: a --ref_model_name_or_path that is another "
    "model, stale reference log-probabilities, dropout. Or step 1 was not logged: --logging_steps 1",
    "reference cached": "no space in --cache_dir or no permission to write there; a run that ended before its first step",
    "rewards/accuracy": "stuck at 0.5: learning rate too low, or pairs equal once truncated; below 0.5: chosen and rejected "
    "swapped",
    "rewards/margin": "learning rate too low or far too high; chosen and rejected swapped",
    "ZeRO-3 partitions": "a --ds_config of another stage; a model built whole on every rank",
    "ranks agree": "ranks that run different code or read different files; a run that was cut off",
    "exported model loads": "a full disk or a run that ended while it exported",
    "SFT answers right": "SFT did not learn (see its loss), or the export or the template differs from training",
    "SFT style": "the wording does not decide the style yet: SFT was too short",
    "DPO style": "DPO did not learn (see its rewards), or an early state was exported",
    "DPO keeps answers": "DPO went too far: lower its learning rate or take fewer steps",
}


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    expected: str
    seen: str
    passed: bool

    @property
    def advice(self) -> str:
        """Likely causes of a failure and what to try."""
        return ADVICE[self.name]


@dataclass(frozen=True)
class Score:
    """How a model answered held-out prompts: counts of prompts, right answers, and chosen-style answers."""

    num_prompts: int
    num_right: int
    num_chosen_style: int

    @property
    def right(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.num_right / self.num_prompts

    @property
    def chosen_style(self) -> float:
        """Share of answers in the chosen style, 0 to 1."""
        return self.num_chosen_style / self.num_prompts


# ------------------------------------------------------------------ reading what a run left behind
def judge_run(output_dir: str | Path, exit_code: int, output: str = "", slow_step_floor: float = 0.0) -> list[Check]:
    """The verdict on the run that wrote output_dir; missing or torn files are a failed check, not an error.

    output: what the run printed, searched for its error line. slow_step_floor: seconds, as in `judge`.
    """
    try:
        run_config = json.loads((Path(output_dir) / "run_config.json").read_text(encoding="utf-8"))
        required = REQUIRED + (REQUIRED_DPO if is_dpo(run_config) else ())
        history = read_history(Path(output_dir) / "metrics.jsonl", required)
    except OSError as e:
        return [_finished(False, exit_code, error_line(output) or f"{Path(e.filename).name}: {e.strerror}")]
    except (ValueError, KeyError, TypeError) as e:
        return [_finished(False, exit_code, error_line(output) or f"unreadable: {e}")]
    return judge(history, run_config, exit_code, output, slow_step_floor)


def read_history(path: Path, required: Sequence[str]) -> list[dict]:
    """The rows of a metrics.jsonl. Raises OSError, and ValueError that names a torn or incomplete line."""
    history = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path.name} line {number} is not JSON (truncated?)") from None
        for name in required:
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{path.name} line {number} has no number `{name}`")
        history.append(row)
    if not history:
        raise ValueError(f"{path.name} is empty: no step was logged")
    return history


def is_dpo(run_config: dict) -> bool:
    """Whether a run_config.json is of train_dpo.py."""
    return "loss_type" in run_config["config"]


def error_line(output: str) -> str:
    """The last `error: ...` line that a run printed, '' if none."""
    return next((line for line in reversed(output.splitlines()) if line.startswith("error: ")), "")


# ------------------------------------------------------------------ the checks on one run
def judge(
    history: list[dict], run_config: dict, exit_code: int, output: str = "", slow_step_floor: float = 0.0
) -> list[Check]:
    """All checks on one run's history, of at least one row, as read_history gives it.

    slow_step_floor: seconds; a step shorter than this is never called slow. For a model so tiny that a hiccup
    of the machine is worth ten of its steps; 0 for real ones.
    """
    checks = [
        _check_finished(history, run_config, exit_code, output),
        _check_loss_falls(history, run_config),
        _check_loss_values(history),
        _check_grad_norm(history),
        _check_speed(history, slow_step_floor),
        _check_memory(history, run_config, output),
    ]
    if is_dpo(run_config):
        config = SimpleNamespace(**run_config["config"])
        loss = LOSSES[config.loss_type]
        if (
            loss.first_step_tolerance is not None and not config.ref_model_name_or_path
        ):  # another model's start elsewhere
            checks.append(_check_first_loss(history, config))
        if loss.needs_reference:
            checks.append(_check_reference_cache(run_config))
        checks += [_check_accuracy(history), _check_margin(history)]
    return [*checks, _check_partition(run_config), _check_agreement(run_config)]


def _finished(passed: bool, exit_code: int, seen: str) -> Check:
    return Check("run finished", "exit code 0, every step logged", f"exit code {exit_code}; {seen}", passed)


def _check_finished(history: list[dict], run_config: dict, exit_code: int, output: str) -> Check:
    num_steps = run_config.get("result", {}).get("steps")
    logged = [row["step"] for row in history]
    if num_steps is None:
        return _finished(False, exit_code, error_line(output) or f"no result, last step logged {logged[-1]}")
    every = run_config["config"].get("logging_steps", 1)
    wanted = [step for step in range(1, num_steps + 1) if step % every == 0 or step == num_steps]
    seen = f"{num_steps} steps, {len(logged)} of {len(wanted)} lines"
    return _finished(exit_code == 0 and logged == wanted, exit_code, seen)


def _check_loss_falls(history: list[dict], run_config: dict) -> Check:
    losses = [row["train_loss"] for row in history]
    window = max(1, min(WINDOW, len(losses) // 2))
    first, last = mean(losses[:window]), mean(losses[-window:])
    seen = f"first {window}: {first:.4f}, last {window}: {last:.4f}"
    if not is_dpo(run_config):
        return Check("SFT loss falls", f"last {window} steps 10% below the first", seen, last <= 0.9 * first)
    if LOSSES[run_config["config"]["loss_type"]].first_step_tolerance is not None:  # a logistic loss
        return Check("DPO loss falls", f"last {window} steps below ln 2 = 0.6931", seen, last < math.log(2))
    return Check("DPO loss falls", f"last {window} steps below the first", seen, last < first)


def _check_loss_values(history: list[dict]) -> Check:
    bad = [row for row in history if not (math.isfinite(row["train_loss"]) and row["train_loss"] <= 10)]
    highest = bad[0] if bad else max(history, key=lambda row: row["train_loss"])
    seen = f"{'' if bad else 'highest '}{highest['train_loss']:.4g} at step {highest['step']}"
    return Check("loss value", "finite, at most 10", seen, not bad)


def _check_grad_norm(history: list[dict]) -> Check:
    bad = [row for row in history if not 0 < row["grad_norm"] <= 1000]  # not above 0 holds for NaN too
    highest = bad[0] if bad else max(history, key=lambda row: row["grad_norm"])
    middle = median(row["grad_norm"] for row in history)
    at_step = f"{'' if bad else 'highest '}{highest['grad_norm']:.4g} at step {highest['step']}"
    return Check(
        "grad norm",
        "median 0.1 to 10, none 0 or above 1000",
        f"median {middle:.3g}, {at_step}",
        not bad and 0.1 <= middle <= 10,
    )


def _check_speed(history: list[dict], slow_step_floor: float) -> Check:
    steps = history[WARMUP_STEPS:] or history[-1:]
    middle = median(row["step_seconds"] for row in steps)
    slowest = max(steps, key=lambda row: row["step_seconds"])
    stopped = [row for row in history if not row["tokens_per_second"] > 0]
    expected = "tokens/s above 0, no step over 10x the median" + (
        f" and {slow_step_floor:g} s" if slow_step_floor else ""
    )
    if stopped:
        seen = f"{stopped[0]['tokens_per_second']:g} tokens/s at step {stopped[0]['step']}"
    else:
        speed = median(row["tokens_per_second"] for row in steps)
        seen = f"{speed:,.0f} tokens/s; median step {middle:.3g} s, slowest {slowest['step_seconds']:.3g} s"
    return Check("speed", expected, seen, not stopped and slowest["step_seconds"] <= max(10 * middle, slow_step_floor))


def _check_memory(history: list[dict], run_config: dict, output: str) -> Check:
    peak = max(row["max_memory_gb"] for row in history)
    total = run_config.get("device", {}).get("total_memory_gb")
    out_of_memory = "out of memory" in output.lower()
    seen = "OUT OF MEMORY; " * out_of_memory + f"peak {peak:.1f} GB"
    if total:
        seen += f", headroom {total - peak:.1f} of {total:.1f} GB"
    return Check("memory", "never out of memory", seen, not out_of_memory)


def _check_first_loss(history: list[dict], config: SimpleNamespace) -> Check:
    """The same check that the run itself made, which allows for the rounding of its dtype."""
    step, loss = history[0]["step"], history[0]["train_loss"]
    passed = step == 1
    try:
        check_first_step(loss, history[0], LOSSES[config.loss_type], config)
    except TrainingStopped:
        passed = False
    return Check("DPO starts at ln 2", "0.6931 at step 1, but for rounding", f"{loss:.4f} at step {step}", passed)


def _check_reference_cache(run_config: dict) -> Check:
    path = run_config.get("reference_cache")
    there = bool(path) and (Path(path).is_file() or (Path(path).is_dir() and any(Path(path).iterdir())))
    seen = (path if there else f"{path} is not there") if path else "none named"
    return Check("reference cached", "reference log-probabilities on disk", seen, there)


def _check_accuracy(history: list[dict]) -> Check:
    accuracy = mean(row["rewards/accuracy"] for row in history[-WINDOW:])
    return Check("rewards/accuracy", f"above 0.55 in the last {WINDOW} steps", f"{accuracy:.3f}", accuracy > 0.55)


def _check_margin(history: list[dict]) -> Check:
    margin = mean(row["rewards/margin"] for row in history[-WINDOW:])
    return Check("rewards/margin", f"above 0 in the last {WINDOW} steps", f"{margin:.4f}", margin > 0)


def _check_partition(run_config: dict) -> Check:
    zero, world_size = run_config.get("zero", {}), run_config.get("world_size", 0)
    parts, num_parameters = zero.get("partitioned_parameters_per_rank", []), zero.get("num_parameters", 0)
    share = num_parameters / max(1, world_size)
    # Each parameter is padded until it divides, hence the 2%.
    even = len(parts) == world_size and all(abs(part - share) <= 0.02 * share for part in parts)
    seen = f"stage {zero.get('stage')}; {num_parameters:,} parameters, on each rank {min(parts, default=0):,}"
    if parts and max(parts) != min(parts):
        seen += f" to {max(parts):,}"
    return Check(
        "ZeRO-3 partitions",
        f"stage 3, 1/{world_size} on each rank",
        seen,
        zero.get("stage") == 3 and num_parameters > 0 and even,
    )


def _check_agreement(run_config: dict) -> Check:
    agreement = run_config.get("result", {}).get("rank_agreement")
    seen = "not known" if agreement is None else "they do" if agreement else "they do NOT"
    return Check("ranks agree", "same loss and step on all ranks", seen, agreement is True)


# ------------------------------------------------------------------ the checks on the embedded default
def judge_answers(sft: Score, dpo: Score) -> list[Check]:
    """The checks on what the two exported models of `run.sh sanity` answer to held-out prompts."""
    return [
        Check("SFT answers right", "at least 70% of held-out prompts", f"{sft.right:.1%}", sft.right >= 0.70),
        Check(
            "SFT style",
            "chosen style in about half (35% to 65%)",
            f"{sft.chosen_style:.1%}",
            0.35 <= sft.chosen_style <= 0.65,
        ),
        Check("DPO style", "chosen style in at least 90%", f"{dpo.chosen_style:.1%}", dpo.chosen_style >= 0.90),
        Check(
            "DPO keeps answers",
            "right answers fall by at most 5 points",
            f"{sft.right:.1%} to {dpo.right:.1%}",
            dpo.right >= sft.right - 0.05 - 1e-9,
        ),
    ]


# ------------------------------------------------------------------ showing them
def format_table(checks: Sequence[Check], colour: bool = False) -> str:
    """The verdict as text: PASS or FAIL, check, expected, seen; below it the advice for each failed check."""

    def verdict(passed: bool) -> str:
        word, code = ("PASS", 32) if passed else ("FAIL", 31)
        return f"\033[{code}m{word}\033[0m" if colour else word

    rows = [("check", "expected", "seen")] + [(c.name, c.expected, c.seen) for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    marks = ["    "] + [verdict(check.passed) for check in checks]
    lines = [
        f"{mark}  {name.ljust(widths[0])}  {expected.ljust(widths[1])}  {seen}"
        for mark, (name, expected, seen) in zip(marks, rows, strict=True)
    ]
    failed = [check for check in checks if not check.passed]
    lines += [f"\n{check.name} failed ({check.seen}).\n  {check.advice}" for check in failed]
    return "\n".join(lines)
