"""What a run shows of itself: curves, the line of a step, its log: pytest tests/test_metrics.py"""

import math
import os
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import launch
import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from models import OneRank

from common import failures
from common.run import metrics
from common.run.curves import LINES, PANELS, draw, draw_curves, smoothed

SHARED = ("train_loss", "grad_norm", "learning_rate", "tokens_per_second", "max_memory_gb")
PREFERENCES = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen")


def history(num_steps: int, names=SHARED, sources=(), start: float = 1.0) -> list[dict]:
    rows = [{"step": step, **dict.fromkeys(names, start + step / 7)} for step in range(1, num_steps + 1)]
    for row in rows[4::5]:
        row |= {f"eval/{source}loss": row["train_loss"] for source in ("", *(f"{name}/" for name in sources))}
    return rows


@pytest.fixture
def pictures(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *path, **more: (saved.append(self), real(self, *path, **more)))
    return saved


def panels(figure: Figure) -> dict[str, list[str]]:
    """The labels of the bold lines in each panel, by its title."""
    labels = [[line.get_label() for line in axis.lines if line.get_linewidth() == 2] for axis in figure.axes]
    return dict(zip([axis.get_title("left") for axis in figure.axes], labels, strict=True))


# ------------------------------------------------------------------ curves


def test_every_panel_that_has_values_is_drawn_and_no_other(tmp_path, pictures):
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists(), "of a run without a step"
    models.write_jsonl(tmp_path / "metrics.jsonl", history(100, sources=("a", "b")))
    draw_curves(tmp_path, [30, 60])
    draw({"": history(9, SHARED + PREFERENCES)}, tmp_path / "dpo.png", [])
    sft, dpo = map(panels, pictures)
    assert {*sft} == {*PANELS} - {"rewards", "margin", "accuracy"} and {*dpo} == {*PANELS}
    assert sft["loss"] == ["train_loss", "eval/loss", "eval/a/loss", "eval/b/loss"]
    assert dpo["rewards"] == ["rewards/chosen", "rewards/rejected"] and dpo["loss"] == ["train_loss", "eval/loss"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    marks = [[line.get_xdata()[0] for line in axis.lines if line.get_linewidth() == 1] for axis in pictures[0].axes]
    assert marks == [[30.5, 60.5]] * 5  # where a resume began, between two steps
    raw = [line for line in pictures[0].axes[0].lines if line.get_alpha() == 0.25]
    assert [len(line.get_xdata()) for line in raw] == [100]


def test_of_several_runs_each_panel_holds_one_metric_and_tells_them_apart_without_colour(tmp_path, pictures):
    runs = {"one": history(50), "two": history(20, start=2.0), "dpo": history(9, SHARED + PREFERENCES)}
    draw(runs, tmp_path / "compare.png", [])
    (figure,) = pictures
    assert panels(figure)["train_loss"] == ["one", "two", "dpo"] and panels(figure)["rewards/margin"] == ["dpo"]
    bold = [line for line in figure.axes[0].lines if line.get_linewidth() == 2]
    assert len({line.get_linestyle() for line in bold}) == len(bold)
    assert len({str(form) for _, form in LINES}) == len(LINES)
    label, names = figure._supxlabel or figure.axes[-1].xaxis.label, figure.axes[-1].get_legend()
    assert label.get_window_extent().y1 < names.get_window_extent().y0, "the label stands below the names of the runs"


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), min_size=1, max_size=30), st.integers(1, 9))
def test_a_smoothed_value_is_the_mean_of_the_finite_ones_around_it(values, width):
    seen, half = smoothed(np.array(values, float), width), width // 2
    for i in range(len(values)):
        around = [value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)]
        expected = sum(around) / len(around) if around else math.nan
        assert seen[i] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert len(seen) == len(values)


# ------------------------------------------------------------------ lines


def test_the_time_left_is_that_of_the_steps_to_come_at_the_pace_after_the_first(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now.seconds)
    lm = MagicMock(named_parameters=list)
    meter, lines = metrics.StepMeter(lm, 1, 1, 1, OneRank()), []
    record = {"epoch": 0.5, "train_loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-5, "tokens_per_second": 10.0}
    record["max_memory_gb"] = 71.5
    for step, seconds in ((11, 400.0), (12, 410.0), (14, 430.0)):  # it was resumed after step 10
        now.seconds = seconds
        lines.append(meter.line({"step": step, **record}, 1000))
    assert re.findall(r"elapsed (\S+)", " ".join(lines)) == ["0:06:40", "0:06:50", "0:07:10"]
    assert re.findall(r"left (\S+)", " ".join(lines)) == ["2:44:40", "2:44:20"]
    assert all("epoch 0.50" in line and "71.5 GB" in line for line in lines)
    assert all("loss 1.0000" in line[:80] and "10 tokens/s" in line[:80] for line in lines), "in a narrow terminal too"


def test_on_a_terminal_what_comes_next_takes_the_place_of_a_live_step_and_other_lines_stand(monkeypatch, tmp_path):
    ours, theirs = os.openpty()
    monkeypatch.setattr(failures, "_log_path", tmp_path / "log")
    monkeypatch.setattr(failures.shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    with open(theirs, "w") as terminal:
        for text in ("step 1", "step 2 " + "x" * 20, "step 3"):
            failures.print_line(text, terminal, is_live=True)
        failures.print_line("a checkpoint", terminal)
        failures.print_line("step 4", terminal, is_live=True)
        seen = ""
        while not seen.endswith("step 4"):
            seen += os.read(ours, 1000).decode()
    shown = [line.rpartition("\r\x1b[K")[2].rstrip() for line in seen.split("\n")]
    assert shown == ["a checkpoint", "step 4"] and "step 2 " + "x" * 12 + "\r" in seen and "step 3" in seen
    assert "step 2 " + "x" * 20 in [line[21:] for line in (tmp_path / "log").read_text().splitlines()]


def test_what_a_run_says_is_in_its_log_with_times_from_the_first_line_on(tiny_llama, sft_data, tmp_path):
    flags = launch.flags(tiny_llama, sft_data, tmp_path, max_train_steps=1)
    run = launch.launch("train_sft", flags, 2).succeeded()
    folder = run.output_dir / "logs"
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert {*run.stdout.splitlines()} <= {"", *(line[21:] for line in lines)}


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(failures, "_log_path", tmp_path / "gone" / "rank_0.log")
    failures.print_line("it goes on")
    assert capsys.readouterr().out == "it goes on\n"
