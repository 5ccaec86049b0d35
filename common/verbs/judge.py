"""Was it a good run? What people used to look for by eye in the first 100 steps' curves, as checks.

`judge_run` turns what a run left behind into checks; a failed one says the likely causes and what to try.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from common.config import DPOConfig
from common.failures import TrainingStopped, one_line
from common.run.curves import read_metrics

WINDOW = 10  # logged steps at either end of a history that are averaged
WARMUP_STEPS = 5  # logged steps whose duration is not judged: allocators, compilers and caches warm up
ADVICE = {  # likely causes of a failed check, and what to try
    "run finished": "read its output; 137: often the host's memory",
    "SFT loss falls": "learning rate too low or far too high; targets that are not the answers (see the sample)",
    "DPO loss falls": "learning rate too low; beta far too small or large; chosen and rejected swapped",
    "loss value": "learning rate too high; a tokenizer that is not the model's; an odd sample at that step",
    "grad norm": "0: no target tokens. High: learning rate too high, warm-up too short. Low: nothing left to learn",
    "speed": "another process on the devices; slow disk or network; swapping; attention that recompiles",
    "memory": "--gradient_checkpointing full, smaller --max_tokens_per_micro_batch, more GPUs",
    "DPO starts at ln 2": "stale reference log-probabilities; dropout; or step 1 was not logged: --logging_steps 1",
    "reference cached": "no space in --cache_dir or no permission to write there; a run that ended early",
    "rewards/accuracy": "at 0.5: learning rate too low, or equal pairs; below: chosen and rejected swapped",
    "rewards/margin": "learning rate too low or far too high; chosen and rejected swapped",
    "ZeRO-3 partitions": "a --ds_config of another stage; a model built whole on every rank",
    "ranks agree": "ranks that run different code or read different files; a run that was cut off",
    "exported model loads": "a full disk or a run that ended while it exported",
    "SFT answers right": "SFT did not learn (see its loss), or the export or the template differs from training",
    "SFT style": "the wording does not decide the style yet: SFT was too short",
    "DPO style": "DPO did not learn (see its rewards), or an early state was exported",
    "DPO keeps answers": "DPO went too far: lower its learning rate or take fewer steps",
}


class Check(NamedTuple):
    """One line of the verdict."""

    name: str
    expected: str
    seen: str
    passed: bool


def judge_run(output_dir: Path, exit_code: int, output: str = "", floor: float = 0.0) -> list[Check]:
    """The verdict on the run that wrote output_dir; missing or torn files are a failed check, not an error.
    output: what it printed. floor: seconds; a step shorter than this is never called slow, as of a tiny model."""
    seen = "metrics.jsonl: no step was logged"
    try:
        run_config = json.loads((output_dir / "run_config.json").read_text(encoding="utf-8"))
        if history := read_metrics(output_dir / "metrics.jsonl"):
            return judge(history, run_config, exit_code, output, floor)
    except (OSError, ValueError, KeyError, TypeError) as e:
        seen = f"metrics.jsonl or run_config.json is unreadable: {type(e).__name__}: {one_line(e)}"
    return [_finished(False, exit_code, seen, output)]


def judge(history: list[dict], run_config: dict, exit_code: int, output: str = "", floor: float = 0.0) -> list[Check]:
    """All checks on one run's history, of at least one row; the rest as for judge_run."""
    config, result = run_config["config"], run_config.get("result", {})
    logged, num_steps = [row["step"] for row in history], result.get("steps", 0)
    wanted = [i for i in range(1, num_steps + 1) if i % config["logging_steps"] == 0 or i == num_steps]
    is_logged = [step for step in logged if step in {*wanted}] == wanted  # and others where there was an evaluation
    lines = f"{num_steps} steps in the result; {len(logged)} of {len(wanted)} lines, the last of step {logged[-1]}"
    is_loss_good, losses = _worst(history, "train_loss", lambda loss: abs(loss) <= 10)  # NaN is not
    is_norm_good, norms = _worst(history, "grad_norm", lambda norm: 0 < norm <= 1000)
    norm = median(row["grad_norm"] for row in history)
    is_norm_good, norms = is_norm_good and 0.1 <= norm <= 10, f"median {norm:.3g}, {norms}"
    agreed = "they do" if result.get("rank_agreement") is True else "they do NOT, or it is not known"
    return [
        _finished(exit_code == 0 and is_logged, exit_code, lines, output),
        *(_dpo_checks(history, run_config) if "loss_type" in config else [_falls(history, "SFT")]),
        Check("loss value", "finite, at most 10", losses, is_loss_good),
        Check("grad norm", "median 0.1 to 10, none 0 or above 1000", norms, is_norm_good),
        _speed(history, floor),
        _memory(history, run_config["device"]["total_memory_gb"], output),
        _partition(run_config["zero"], run_config["world_size"]),
        Check("ranks agree", "same loss and step on all ranks", agreed, agreed == "they do"),
    ]


def _finished(passed: bool, exit_code: int, seen: str, output: str) -> Check:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    seen = errors[-1] if errors and not passed else seen
    return Check("run finished", "exit code 0, every step logged", f"exit code {exit_code}; {seen}", passed)


def _falls(history: list[dict], method: str, is_logistic: bool = False) -> Check:
    """Of the mean loss of the last steps: below what a policy that is its own reference has, or below the first's."""
    window = max(1, min(WINDOW, len(history) // 2))
    first, last = (mean(row["train_loss"] for row in rows) for rows in (history[:window], history[-window:]))
    limits = {"SFT": ("10% below the first", 0.9 * first), "DPO": ("below the first", first)}
    what, limit = ("below ln 2 = 0.6931", math.log(2)) if is_logistic else limits[method]
    seen = f"first {window}: {first:.4f}, last {window}: {last:.4f}"
    return Check(f"{method} loss falls", f"last {window} steps {what}", seen, last < limit)


def _dpo_checks(history: list[dict], run_config: dict) -> list[Check]:
    from common.step.losses import LOSSES, check_first_step  # here: it imports torch, which takes seconds

    config, step_1 = DPOConfig(**run_config["config"]), history[0]
    loss = LOSSES[config.loss_type]
    checks = [_falls(history, "DPO", loss.is_logistic)]
    if loss.is_logistic and not config.ref_model_name_or_path:  # a loss against another model starts elsewhere
        passed, seen = step_1["step"] == 1, f"{step_1['train_loss']:.4f} at step {step_1['step']}"
        try:  # the same check that the run itself made, which allows for the rounding of its dtype
            check_first_step(step_1["train_loss"], step_1, loss, config)
        except TrainingStopped:
            passed = False
        checks.append(Check("DPO starts at ln 2", "0.6931 at step 1, but for rounding", seen, passed))
    if loss.needs_reference:
        path = str(run_config.get("reference_cache"))
        checks.append(Check("reference cached", "reference log-probabilities on disk", path, Path(path).exists()))
    for name, least in (("accuracy", 0.55), ("margin", 0)):
        value, where = mean(row[f"rewards/{name}"] for row in history[-WINDOW:]), f"in the last {WINDOW} steps"
        checks.append(Check(f"rewards/{name}", f"above {least} {where}", f"{value:.4f}", value > least))
    return checks


def _worst(history: list[dict], name: str, is_good: Callable[[float], bool]) -> tuple[bool, str]:
    """Whether every row's value is good, and the first bad one, else the highest, as text."""
    bad = [row for row in history if not is_good(row[name])]
    row = bad[0] if bad else max(history, key=lambda row: row[name])
    return not bad, f"{'' if bad else 'highest '}{row[name]:.4g} at step {row['step']}"


def _speed(history: list[dict], floor: float) -> Check:
    steps = history[WARMUP_STEPS:] or history[-1:]
    speed, middle = (median(row[name] for row in steps) for name in ("tokens_per_second", "step_seconds"))
    slowest, lowest = max(row["step_seconds"] for row in steps), min(row["tokens_per_second"] for row in history)
    expected = "tokens/s above 0, no step over 10x the median" + (f" and {floor:g} s" if floor else "")
    seen = f"{speed:,.0f} tokens/s, lowest {lowest:,.0f}; median step {middle:.3g} s, slowest {slowest:.3g} s"
    return Check("speed", expected, seen, lowest > 0 and slowest <= max(10 * middle, floor))


def _memory(history: list[dict], total: float, output: str) -> Check:
    peak, is_out = max(row["max_memory_gb"] for row in history), "out of memory" in output.lower()
    seen = f"{'OUT OF MEMORY; ' * is_out}peak {peak:.1f} GB, headroom {total - peak:.1f} of {total:.1f} GB"
    return Check("memory", "never out of memory", seen, not is_out)


def _partition(zero: dict, world_size: int) -> Check:
    shards, share = zero["partitioned_parameters_per_rank"], zero["num_parameters"] / world_size
    # Each parameter is padded until it divides, hence the 2%.
    even = len(shards) == world_size and all(abs(shard - share) <= 0.02 * share for shard in shards)
    seen = f"stage {zero['stage']}; {zero['num_parameters']:,} parameters, on each rank {min(shards):,}"
    seen += f" to {max(shards):,}" if max(shards) > min(shards) else ""
    return Check("ZeRO-3 partitions", f"stage 3, 1/{world_size} on each rank", seen, zero["stage"] == 3 and even)


def judge_answers(sft: tuple[float, float], dpo: tuple[float, float]) -> list[Check]:
    """The checks on what two exported models answer to held-out prompts. sft, dpo: the shares, 0 to 1, of their answers
    that are right, and of those in the chosen style."""
    (sft_right, sft_style), (dpo_right, dpo_style) = sft, dpo
    half, kept = 0.35 <= sft_style <= 0.65, dpo_right >= sft_right - 0.05 - 1e-9
    fall = f"{sft_right:.1%} to {dpo_right:.1%}"
    return [
        Check("SFT answers right", "at least 70% of held-out prompts", f"{sft_right:.1%}", sft_right >= 0.70),
        Check("SFT style", "chosen style in about half (35% to 65%)", f"{sft_style:.1%}", half),
        Check("DPO style", "chosen style in at least 90%", f"{dpo_style:.1%}", dpo_style >= 0.90),
        Check("DPO keeps answers", "right answers fall by at most 5 points", fall, kept),
    ]


def format_table(checks: Sequence[Check]) -> str:
    """The verdict as text: PASS or FAIL, check, expected, seen; below it the advice for each failed check."""
    rows = [("    ", "check", "expected", "seen")]
    rows += [("PASS" if check.passed else "FAIL", check.name, check.expected, check.seen) for check in checks]
    widths = [max(len(row[i]) for row in rows) for i in (1, 2)]
    lines = [f"{mark}  {name:{widths[0]}}  {wanted:{widths[1]}}  {seen}" for mark, name, wanted, seen in rows]
    lines += [f"\n{check.name} failed ({check.seen}).\n  {ADVICE[check.name]}" for check in checks if not check.passed]
    return "\n".join(lines)
