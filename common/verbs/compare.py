"""What differs between runs, and their curves in one picture, also while they train.

    bash run.sh compare OUT1 [OUT2 ...] [--picture compare.png]

OUT1, OUT2 ...: their output_dirs. A value that all runs share is left out. Nothing is written but the picture.
"""

from pathlib import Path
from statistics import mean, median

from common.failures import UserError, as_user_error, print_line, shown
from common.run.curves import draw, read_metrics, read_run_config
from common.verbs.words import folders

WINDOW = 10  # logged steps, or fewer, that a last value is the mean of
# What a run is besides its flags, by its name in run_config.json.
RESOLVED = ["kernel", "world_size", "micro_batch_budget", "opening_budget", "residency"]
RESOLVED += ["device", "versions", "layers", "identity"]
PLACES = ("output_dir", "cache_dir", "resume")  # flags that differ and tell nothing


def main(*argv: str) -> int:
    """Returns the exit code. Raises UserError for a folder in which no run has taken a step."""
    given, runs = folders("compare OUT1 [OUT2 ...] [--picture FILE]", argv, None, picture={"default": "compare.png"})
    configs, histories = {}, {}
    for label, folder in labels_of(runs).items():
        configs[label], histories[label] = read_run_config(folder), read_metrics(folder / "metrics.jsonl")
        if not configs[label] or not histories[label]:
            raise UserError(f"{folder}: no run has logged a step there")
    print_line(table("what differs", {label: settings_of(configs[label]) for label in configs}, only_differing=True))
    results = {label: results_of(histories[label], configs[label]) for label in configs}
    print_line("\n" + table("where they stand", results, only_differing=False))
    with as_user_error(f"--picture {given.picture}", OSError, ValueError):
        draw(histories, Path(given.picture), [])
    print_line(f"\ncurves: {given.picture}")
    return 0


def labels_of(folders: list[str]) -> dict[str, Path]:
    """A label for each folder: its name, or its path where two have one name."""
    paths = [Path(folder).resolve() for folder in dict.fromkeys(folders)]
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}


def settings_of(run_config: dict) -> dict[str, str]:
    """Flags, and what else decides a run, by name; parts of a part as `part.name`."""
    values = {name: value for name, value in run_config["config"].items() if name not in PLACES}
    for part in RESOLVED:
        value = run_config.get(part)
        inner = {f"{part}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {part: value}
        values |= {name: v for name, v in inner.items() if name.partition(".")[2] not in values}
    return {name: shown(str(value), 60) for name, value in values.items()}


def results_of(history: list[dict], run_config: dict) -> dict[str, str]:
    """How far a run is, its last values, time, speed and memory."""
    results = {"steps": f"{history[-1]['step']:,} of {run_config['num_steps']:,}"}
    results["state"] = "finished" if "result" in run_config else "not finished"
    results["tokens"] = f"{history[-1]['total_tokens']:,}"
    for name in ("train_loss", "rewards/margin", "rewards/accuracy", "grad_norm"):
        if values := [row[name] for row in history[-WINDOW:] if name in row]:
            results[f"{name}, last"] = f"{mean(values):.4f} (mean of {len(values)})"
    if evaluated := [row for row in history if "eval/loss" in row]:
        results["eval/loss, lowest"] = f"{min(row['eval/loss'] for row in evaluated):.4f}"
        results |= {name: f"{value:.4f}" for name, value in evaluated[-1].items() if name.startswith("eval/")}
    results["hours of logged steps"] = f"{sum(row['step_seconds'] for row in history) / 3600:.2f}"
    results["tokens/s, median"] = f"{median(row['tokens_per_second'] for row in history):,.0f}"
    results["GB at most"] = f"{max(row['max_memory_gb'] for row in history):.1f}"
    return results


def table(title: str, columns: dict[str, dict[str, str]], only_differing: bool) -> str:
    """A line for each name in any column, `-` where one has none."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    rows = [row for row in rows if not only_differing or len({*row[1:]}) > 1]
    rows = [[title, *columns], *rows] if rows else [[title, *columns], ["nothing"]]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows)
