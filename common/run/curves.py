"""What a run has left, read and drawn. Nothing here imports torch, so that `compare` answers at once."""

import json
import re
from pathlib import Path

import numpy as np

from common.failures import as_user_error

# Titles of panels, and which metrics are in each, by a pattern. Panels without a value are left out.
PANELS = {
    "loss": r"train_loss|eval/(.+/)?loss",
    "rewards": r"rewards/(chosen|rejected)",
    "margin": r"rewards/margin|eval/(.+/)?margin",
    "accuracy": r"rewards/accuracy|eval/(.+/)?accuracy",
    "gradient norm": r"grad_norm",
    "learning rate": r"learning_rate",
    "tokens a second": r"tokens_per_second",
    "memory, GB a device": r"max_memory_gb",
}
# Told apart by the line's form and its brightness where there is no colour.
LINES = [("#08306b", "-"), ("#d94801", "--"), ("#41ab5d", ":"), ("#6a51a3", "-."), ("#a50f15", (0, (5, 1, 1, 1, 1, 1)))]
MARKERS = "osD^v*"
SMOOTHED_ROWS = 40  # of a curve, about: each is the mean of as many logged steps as that takes


def read_run_config(output_dir: str | Path) -> dict:
    """The record of the run that used this folder before, {} if none did. Raises UserError if it cannot be read."""
    path = Path(output_dir) / "run_config.json"
    if not path.is_file():
        return {}
    with as_user_error(f"{path} is not what a run wrote; put it back, or name another folder"):
        return {**json.loads(path.read_text(encoding="utf-8"))}  # a TypeError for what is no object


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, in order; [] if there is none. A last line that a crash tore is left out.

    Raises UserError for any other line that is no record, or whose step does not come after the one before.
    """
    records: list[dict] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, start=1):
        with as_user_error(f"{path} line {number} is not the record of a step; mend it, or move the file", Exception):
            record = json.loads(line)
            if record["step"] <= (records[-1]["step"] if records else 0):
                raise ValueError(f"step {record['step']} does not come after the one before")
            types = {type(value) for value in record.values()}
            if "train_loss" not in record or types - {int, float} or type(record["step"]) is float:
                raise ValueError("it has no train_loss, or a value that is no number")
        records.append(record)
    return records


def draw_curves(output_dir: Path, resumed_after: list[int] | None = None) -> None:
    """curves.png from metrics.jsonl, a panel for each of PANELS. resumed_after: steps after which a resume began."""
    if records := read_metrics(output_dir / "metrics.jsonl"):
        draw({"": records}, output_dir / "curves.png", resumed_after or [])


def draw(runs: dict[str, list[dict]], path: Path, resumed_after: list[int]) -> None:
    """One picture of the records of runs, by their labels; of several, each panel holds one metric."""
    from matplotlib.figure import Figure

    names = sorted({name for records in runs.values() for record in records for name in record})
    names.sort(key=lambda name: (name.startswith("eval/"), name.count("/")))
    if len({name.split("/")[1] for name in names if re.match("eval/.+/", name)}) == 1:  # a single source is all
        names = [name for name in names if name.count("/") < 2]
    panels = {title: [name for name in names if re.fullmatch(pattern, name)] for title, pattern in PANELS.items()}
    panels = {title: metrics for title, metrics in panels.items() if metrics}
    if len(runs) > 1:
        panels = {name: [name] for metrics in panels.values() for name in metrics}
    figure = Figure(figsize=(6, 2.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, metrics) in zip(axes.tolist(), panels.items(), strict=True):
        series = [(label, name) for label in runs for name in metrics]
        for number, (label, name) in enumerate(series):
            _draw_series(axis, runs[label], name, number, label or name)
        for step in resumed_after:
            axis.axvline(step + 0.5, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
        axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 2000 else f"{value:g}")
        if len(series) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 2, "frameon": False}
            axis.legend(fontsize=10, handlelength=3, **below)
    figure.supxlabel("step" + ", dotted: a resume began" * bool(resumed_after), fontsize=11)
    figure.savefig(path, dpi=140)


def _draw_series(axis, records: list[dict], name: str, number: int, label: str) -> None:
    """What is logged often as a smoothed line over a faint one; an evaluation as points, joined."""
    steps = [record["step"] for record in records if name in record]
    values = np.array([record[name] for record in records if name in record], float)
    if not steps:
        return
    colour, form = LINES[number % len(LINES)]
    style = {"color": colour, "linestyle": form, "linewidth": 2, "label": label}
    width = 1 if name == "learning_rate" else max(1, len(values) // SMOOTHED_ROWS)
    if name.startswith("eval/"):
        style, width = style | {"marker": MARKERS[number % len(MARKERS)], "markersize": 5}, 1
    if width > 1:
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    axis.plot(steps, smoothed(values, width), **style)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values around each, `width` of them or one more, fewer at the ends; of the finite ones."""
    kernel, is_finite = np.ones(2 * (width // 2) + 1), np.isfinite(values)
    both = np.convolve(np.where(is_finite, values, 0), kernel), np.convolve(is_finite.astype(float), kernel)
    sums, counts = (part[width // 2 : len(values) + width // 2] for part in both)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
