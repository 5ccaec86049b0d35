"""bash run.sh compare: pytest tests/test_compare.py"""

import json
import re
import subprocess
import sys

import launch
import pytest
from test_metrics import history

from common.failures import UserError
from common.verbs.compare import labels_of, main, settings_of, table


def run_folder(path, finished: bool = True, num_steps: int = 20, **config):
    path.mkdir(parents=True)
    record = {"config": {"learning_rate": 1e-5, "seed": 42, "output_dir": str(path), **config}, "num_steps": 100}
    record |= {"kernel": "sdpa", "versions": {"torch": "2"}} | ({"result": {}} if finished else {})
    (path / "run_config.json").write_text(json.dumps(record))
    rows = [row | {"total_tokens": 7, "step_seconds": 1800.0} for row in history(num_steps, sources=("a",))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "tra')
    return path


def test_what_differs_and_where_runs_stand_is_told_and_drawn(tmp_path, capsys):
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", False, 9, learning_rate=3e-5, loss_type="ipo")
    assert main(str(one), str(two), "--picture", str(tmp_path / "both.png")) == 0
    text = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines()}
    assert rows["learning_rate"] == ["1e-05", "3e-05"] and rows["loss_type"] == ["-", "ipo"]
    assert not {"seed", "output_dir", "kernel", "versions.torch"} & {*rows}
    assert rows["state"] == ["not", "finished"] and rows["hours of logged steps"] == ["10.00", "4.50"]
    assert rows["eval/loss"] == [f"{1 + 20 / 7:.4f}", f"{1 + 5 / 7:.4f}"]
    assert rows["eval/loss, lowest"] == [f"{1 + 5 / 7:.4f}"] * 2
    assert re.search(rf"\ntrain_loss, last +{1 + 15.5 / 7:.4f} \(mean of 10\) +{1 + 5 / 7:.4f} \(mean of 9\)\n", text)
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_one_run_is_drawn_too_and_equal_ones_differ_in_nothing(tmp_path, capsys):
    one = run_folder(tmp_path / "one")
    assert main(str(one), "--picture", str(tmp_path / "one.png")) == 0
    assert "what differs  one\nnothing\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_is_refused_by_name(tmp_path, name):
    (run_folder(tmp_path / "empty") / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=name):
        main(str(tmp_path / name))


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [tmp_path / "a" / "sft", tmp_path / "b" / "sft", tmp_path / "dpo"]
    assert [*labels_of([*map(str, folders), str(folders[0])])] == [str(folders[0]), str(folders[1]), "dpo"]


def test_columns_stand_under_the_runs_names_and_a_flag_is_told_once():
    lines = table("t", {"x": {"a": "1", "b": "2222"}, "yyyyy": {"a": "1", "c": "3"}}, True).splitlines()
    assert [line.split() for line in lines] == [["t", "x", "yyyyy"], ["b", "2222", "-"], ["c", "-", "3"]]
    assert [lines[0].index("yyyyy"), lines[0].index("x")] == [lines[1].index("-"), lines[2].index("-")]
    record = {"config": {"seed": 1}, "device": {"name": "x"}, "identity": {"seed": 1, "template": "y"}}
    assert {"seed": "1", "device.name": "x", "identity.template": "y"}.items() <= settings_of(record).items()
    assert "identity.seed" not in settings_of(record)


def test_it_answers_without_importing_torch(tmp_path):
    run_folder(tmp_path / "one")
    script = "import sys; from common.verbs.compare import main; main('one'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(launch.REPO)})
    assert done.returncode == 0
