"""Was it a good run? What people used to look for by eye in the first 100 steps' curves, as checks.

`judge_run` reads what a run left behind (metrics.jsonl, run_config.json, its exit code and output) and gives
a list of checks; a failed one says the likely causes and what to try. `format_table` shows them to a person.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

from common.failures import TrainingStopped

WINDOW = 10  # logged steps at either end of a history that are averaged
WARMUP_STEPS = 5  # logged steps whose duration is not judged: allocators, compilers and caches warm up
REQUIRED = ("step", "train_loss", "grad_norm", "tokens_per_second", "step_seconds", "max_memory_gb")
REQUIRED_DPO = ("rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected")

# Likely causes of a failed check and what to try, by the check's name.
ADVICE = {
    "run finished": "read its output. Exit code 2: a mistake in a flag or the data; 3: it stopped itself and said "
    "what to try; 143, 130: asked to stop; 137: killed, often for the host's memory. The same command resumes from "
    "the last checkpoint",
    "SFT loss falls": "learning rate too low or far too high; targets that are not the answers (see the printed "
    "sample); a model that was trained on this data before",
    "DPO loss falls": "learning rate too low; beta far too small or large; chosen and rejected swapped",
    "loss value": "learning rate too high; a tokenizer that is not the model's; weights that were never trained; an "
    "odd sample at that step. --dtype float32 rules out precision",
    "grad norm": "0: no target tokens, or parameters without a gradient. High: learning rate too high, warm-up too "
    "short, damaged weights. Low: nothing left to learn, or a loss that is divided twice",
    "speed": "another process on the devices; slow disk or network; swapping; attention that recompiles; a GPU that "
    "throttles",
    "memory": "--gradient_checkpointing full, smaller --max_tokens_per_micro_batch, shorter --max_seq_length, more "
    "GPUs; end other processes on the same GPU",
    "DPO starts at ln 2": "before the first update policy and reference differ: another --ref_model_name_or_path, "
    "stale reference log-probabilities, dropout. Or step 1 was not logged: --logging_steps 1",
    "reference cached": "no space in --cache_dir or no permission to write there; a run that ended before its first "
    "step",
    "rewards/accuracy": "stuck at 0.5: learning rate too low, or pairs equal once truncated; below: chosen and "
    "rejected swapped",
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
    """How a model answered held-out prompts: the shares, 0 to 1, of right answers and of chosen-style answers."""

    right: float
    chosen_style: float


# ------------------------------------------------------------------ reading what a run left behind
def judge_run(output_dir: str | Path, exit_code: int, output: str = "", slow_step_floor: float = 0.0) -> list[Check]:
    """The verdict on the run that wrote output_dir; missing or torn files are a failed check, not an error.

    output: what the run printed, searched for its error line. slow_step_floor: seconds, as in `judge`.
    """
    from common.run.metrics import read_metrics  # here: it imports torch, which takes seconds

    try:
        run_config = json.loads((Path(output_dir) / "run_config.json").read_text(encoding="utf-8"))
        history = read_metrics(Path(output_dir) / "metrics.jsonl")
        for name in REQUIRED + (REQUIRED_DPO if "loss_type" in run_config["config"] else ()):
            if not all(type(row.get(name)) in (int, float) for row in history):
                raise ValueError(f"metrics.jsonl: a line has no number `{name}`")
    except OSError as e:
        return [_finished(False, exit_code, error_line(output) or f"{Path(e.filename).name}: {e.strerror}")]
    except (ValueError, KeyError, TypeError) as e:
        return [_finished(False, exit_code, error_line(output) or f"unreadable: {e}")]
    if not history:
        return [_finished(False, exit_code, error_line(output) or "metrics.jsonl: no step was logged")]
    return judge(history, run_config, exit_code, output, slow_step_floor)


def error_line(output: str) -> str:
    """The last `error: ...` line that a run printed, '' if none."""
    return next((line for line in reversed(output.splitlines()) if line.startswith("error: ")), "")


# ------------------------------------------------------------------ the checks on one run
def judge(
    history: list[dict], run_config: dict, exit_code: int, output: str = "", slow_step_floor: float = 0.0
) -> list[Check]:
    """All checks on one run's history, of at least one row.

    slow_step_floor: seconds; a step shorter than this is never called slow. For a model so tiny that a hiccup
    of the machine is worth ten of its steps; 0 for real ones.
    """
    is_dpo = "loss_type" in run_config["config"]
    loss_falls, *of_preferences = _dpo_checks(history, run_config) if is_dpo else [_sft_loss_falls(history)]
    return [
        _every_step_logged(history, run_config, exit_code, output),
        loss_falls,
        _loss_value(history),
        _grad_norm(history),
        _speed(history, slow_step_floor),
        _memory(history, run_config, output),
        *of_preferences,
        _partition(run_config),
        _agreement(run_config),
    ]


def _finished(passed: bool, exit_code: int, seen: str) -> Check:
    return Check("run finished", "exit code 0, every step logged", f"exit code {exit_code}; {seen}", passed)


def _every_step_logged(history: list[dict], run_config: dict, exit_code: int, output: str) -> Check:
    num_steps = run_config.get("result", {}).get("steps")
    logged = [row["step"] for row in history]
    if num_steps is None:
        return _finished(False, exit_code, error_line(output) or f"no result, last step logged {logged[-1]}")
    every = run_config["config"].get("logging_steps", 1)
    wanted = [step for step in range(1, num_steps + 1) if step % every == 0 or step == num_steps]
    seen = f"{num_steps} steps, {len(logged)} of {len(wanted)} lines"
    return _finished(exit_code == 0 and logged == wanted, exit_code, seen)


def _both_ends(history: list[dict]) -> tuple[int, float, float, str]:
    """(How many steps, the mean loss of the first so many, of the last so many, a text that says them)."""
    window = max(1, min(WINDOW, len(history) // 2))
    first, last = (mean(row["train_loss"] for row in rows) for rows in (history[:window], history[-window:]))
    return window, first, last, f"first {window}: {first:.4f}, last {window}: {last:.4f}"


def _sft_loss_falls(history: list[dict]) -> Check:
    window, first, last, seen = _both_ends(history)
    return Check("SFT loss falls", f"last {window} steps 10% below the first", seen, last <= 0.9 * first)


def _dpo_checks(history: list[dict], run_config: dict) -> list[Check]:
    from common.step.losses import LOSSES, check_first_step  # here: it imports torch, which takes seconds

    config = SimpleNamespace(**run_config["config"])
    loss = LOSSES[config.loss_type]
    is_logistic = loss.first_step_tolerance is not None
    window, first, last, seen = _both_ends(history)
    expected = "ln 2 = 0.6931" if is_logistic else "the first"
    is_lower = last < (math.log(2) if is_logistic else first)
    checks = [Check("DPO loss falls", f"last {window} steps below {expected}", seen, is_lower)]
    if is_logistic and not config.ref_model_name_or_path:  # a loss against another model starts elsewhere
        step, first_loss = history[0]["step"], history[0]["train_loss"]
        try:  # the same check that the run itself made, which allows for the rounding of its dtype
            check_first_step(first_loss, history[0], loss, config)
            passed = step == 1
        except TrainingStopped:
            passed = False
        seen = f"{first_loss:.4f} at step {step}"
        checks.append(Check("DPO starts at ln 2", "0.6931 at step 1, but for rounding", seen, passed))
    if loss.needs_reference:
        path = run_config.get("reference_cache")
        passed = bool(path) and (Path(path).is_file() or (Path(path).is_dir() and any(Path(path).iterdir())))
        seen = (path if passed else f"{path} is not there") if path else "none named"
        checks.append(Check("reference cached", "reference log-probabilities on disk", seen, passed))
    accuracy, margin = (mean(row[f"rewards/{name}"] for row in history[-WINDOW:]) for name in ("accuracy", "margin"))
    return [
        *checks,
        Check("rewards/accuracy", f"above 0.55 in the last {WINDOW} steps", f"{accuracy:.3f}", accuracy > 0.55),
        Check("rewards/margin", f"above 0 in the last {WINDOW} steps", f"{margin:.4f}", margin > 0),
    ]


def _worst(history: list[dict], name: str, is_good: Callable[[float], bool]) -> tuple[bool, str]:
    """Whether every row's value is good, and the first bad one, else the highest, as text."""
    bad = [row for row in history if not is_good(row[name])]
    row = bad[0] if bad else max(history, key=lambda row: row[name])
    return not bad, f"{'' if bad else 'highest '}{row[name]:.4g} at step {row['step']}"


def _loss_value(history: list[dict]) -> Check:
    passed, seen = _worst(history, "train_loss", lambda loss: math.isfinite(loss) and loss <= 10)
    return Check("loss value", "finite, at most 10", seen, passed)


def _grad_norm(history: list[dict]) -> Check:
    passed, seen = _worst(history, "grad_norm", lambda norm: 0 < norm <= 1000)  # NaN is not above 0 either
    middle = median(row["grad_norm"] for row in history)
    passed = passed and 0.1 <= middle <= 10
    return Check("grad norm", "median 0.1 to 10, none 0 or above 1000", f"median {middle:.3g}, {seen}", passed)


def _speed(history: list[dict], slow_step_floor: float) -> Check:
    steps = history[WARMUP_STEPS:] or history[-1:]
    middle, slowest = (f(row["step_seconds"] for row in steps) for f in (median, max))
    expected = "tokens/s above 0, no step over 10x the median"
    expected += f" and {slow_step_floor:g} s" if slow_step_floor else ""
    if stopped := [row for row in history if not row["tokens_per_second"] > 0]:
        seen = f"{stopped[0]['tokens_per_second']:g} tokens/s at step {stopped[0]['step']}"
    else:
        speed = median(row["tokens_per_second"] for row in steps)
        seen = f"{speed:,.0f} tokens/s; median step {middle:.3g} s, slowest {slowest:.3g} s"
    return Check("speed", expected, seen, not stopped and slowest <= max(10 * middle, slow_step_floor))


def _memory(history: list[dict], run_config: dict, output: str) -> Check:
    peak = max(row["max_memory_gb"] for row in history)
    total = run_config.get("device", {}).get("total_memory_gb")
    out_of_memory = "out of memory" in output.lower()
    seen = "OUT OF MEMORY; " * out_of_memory + f"peak {peak:.1f} GB"
    seen += f", headroom {total - peak:.1f} of {total:.1f} GB" if total else ""
    return Check("memory", "never out of memory", seen, not out_of_memory)


def _partition(run_config: dict) -> Check:
    zero, world_size = run_config.get("zero", {}), run_config.get("world_size", 0)
    shards, num_parameters = zero.get("partitioned_parameters_per_rank", []), zero.get("num_parameters", 0)
    share = num_parameters / max(1, world_size)
    # Each parameter is padded until it divides, hence the 2%.
    even = len(shards) == world_size and all(abs(shard - share) <= 0.02 * share for shard in shards)
    low, high = min(shards, default=0), max(shards, default=0)
    seen = f"stage {zero.get('stage')}; {num_parameters:,} parameters, on each rank {low:,}"
    seen += f" to {high:,}" if high > low else ""
    passed = zero.get("stage") == 3 and num_parameters > 0 and even
    return Check("ZeRO-3 partitions", f"stage 3, 1/{world_size} on each rank", seen, passed)


def _agreement(run_config: dict) -> Check:
    agreement = run_config.get("result", {}).get("rank_agreement")
    seen = "not known" if agreement is None else "they do" if agreement else "they do NOT"
    return Check("ranks agree", "same loss and step on all ranks", seen, agreement is True)


# ------------------------------------------------------------------ the checks on the embedded default
def judge_answers(sft: Score, dpo: Score) -> list[Check]:
    """The checks on what the two exported models of `run.sh sanity` answer to held-out prompts."""
    style, kept = f"{sft.chosen_style:.1%}", f"{sft.right:.1%} to {dpo.right:.1%}"
    half, keeps = 0.35 <= sft.chosen_style <= 0.65, dpo.right >= sft.right - 0.05 - 1e-9
    return [
        Check("SFT answers right", "at least 70% of held-out prompts", f"{sft.right:.1%}", sft.right >= 0.70),
        Check("SFT style", "chosen style in about half (35% to 65%)", style, half),
        Check("DPO style", "chosen style in at least 90%", f"{dpo.chosen_style:.1%}", dpo.chosen_style >= 0.90),
        Check("DPO keeps answers", "right answers fall by at most 5 points", kept, keeps),
    ]


# ------------------------------------------------------------------ showing them
def format_table(checks: Sequence[Check], colour: bool = False) -> str:
    """The verdict as text: PASS or FAIL, check, expected, seen; below it the advice for each failed check."""
    rows = [("    ", "check", "expected", "seen")]
    for check in checks:
        mark, code = ("PASS", 32) if check.passed else ("FAIL", 31)
        mark = f"\033[{code}m{mark}\033[0m" if colour else mark
        rows.append((mark, check.name, check.expected, check.seen))
    widths = [max(len(row[i]) for row in rows) for i in (1, 2)]
    lines = [f"{mark}  {name:{widths[0]}}  {wanted:{widths[1]}}  {seen}" for mark, name, wanted, seen in rows]
    lines += [f"\n{check.name} failed ({check.seen}).\n  {check.advice}" for check in checks if not check.passed]
    return "\n".join(lines)
