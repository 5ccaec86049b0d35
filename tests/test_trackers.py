"""--report_to, against the real packages where they are installed: pytest tests/test_trackers.py"""

import importlib.metadata
import json
import os
import signal
from pathlib import Path

import launch
import models
import pytest
from models import OneRank

from common.config import TRACKERS, SFTConfig, parse_config
from common.failures import UserError
from common.run import trackers
from common.run.output_dir import read_run_config

INSTALLED = {"none", *(d.metadata["Name"] for d in importlib.metadata.distributions())} & {*TRACKERS}
needs = {name: pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed") for name in TRACKERS[1:]}


@pytest.fixture(scope="module")
def reported(tiny_llama, tmp_path_factory):
    """A run with every tracker that is here, evaluated, stopped after 3 steps and continued to 6."""
    root = tmp_path_factory.mktemp("reported")
    data, held_out = (models.write_jsonl(root / f"{n}.jsonl", models.conversations(8, i)) for i, n in enumerate("ab"))
    changes = {"report_to": sorted(INSTALLED), "global_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 3}
    changes |= {"eval_dataset_mixer": held_out, "eval_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(root / "trackio"), "HOME": str(root)}.items():
            patch.setenv(name, value)
        for stop in ({"stop_after_steps": 3}, {}):
            flags = launch.flags(tiny_llama, data, root, **changes | stop)
            run = launch.launch("train_sft", flags, 2).succeeded()
            assert "warning: --report_to" not in run.stdout
    return run


def values(run: launch.Finished, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in run.metrics if name in record}


NAMES = ("train_loss", "grad_norm", "eval/b/loss", "tokens_per_second")


@needs["tensorboard"]
def test_tensorboard_holds_every_metric_of_every_step(reported):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reported.output_dir / "tensorboard"))
    events.Reload()
    assert {*events.Tags()["scalars"]} == {name for record in reported.metrics for name in record}
    for name in NAMES:
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(values(reported, name), rel=1e-6)
    (config, *_) = events.Tags()["tensors"]
    assert read_run_config(str(reported.output_dir))["run_id"] in config


def wandb_records(path: Path) -> list[bytes]:
    """Of an offline run's file: a header of 7 bytes, then blocks of 32 KiB as in LevelDB's log."""
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        size, kind, left = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6], 2**15 - at % 2**15
        if left < 7 or kind == 0:
            at += left
            continue
        parts = (b"" if kind in (1, 2) else parts) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            records.append(parts)
    return records


@needs["wandb"]
def test_wandb_holds_every_metric_and_a_resume_is_the_same_run(reported):
    from wandb.proto.wandb_internal_pb2 import Record

    seen: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    run_id = read_run_config(str(reported.output_dir))["run_id"]
    files = [*(reported.output_dir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")]
    assert len(files) == 2
    for record in map(Record.FromString, [data for file in files for data in wandb_records(file)]):
        items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in {*items} & {*NAMES}:
            seen[name][items["_step"]] = items[name]
    assert seen == {name: values(reported, name) for name in NAMES}


@needs["trackio"]
def test_trackio_holds_every_metric_and_a_resume_is_the_same_run(reported, monkeypatch):
    root = reported.output_dir.parent
    script = "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S; p = 'plaintune'; "
    script += "print(json.dumps({run: S.get_logs(p, run) for run in S.get_runs(p)}, default=str))"
    environment = os.environ | {"TRACKIO_DIR": str(root / "trackio")}
    done = launch.subprocess.run([launch.sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    ((name, logs),) = json.loads(done.stdout.splitlines()[-1]).items()
    assert name == f"output-{read_run_config(str(reported.output_dir))['run_id']}"
    for metric in NAMES:
        assert {log["step"]: log[metric] for log in logs if metric in log} == values(reported, metric)


# ------------------------------------------------------------------ with a tracker of the tests' own


def written(config, run_id: str, step: int) -> tuple:
    """A tracker that writes what it is given when it is finished."""
    records: list[dict] = []
    path = Path(config.output_dir) / f"tracked_{step}.json"
    return records.append, lambda: path.write_text(json.dumps([run_id, records]))


def broken(config, run_id: str, step: int) -> tuple:
    def log(record: dict) -> None:
        if record["step"] == 2:
            raise ConnectionError("the line\nis cut")

    return log, lambda: None


def test_a_stopped_run_and_the_one_that_continues_finish_their_trackers(tiny_llama, sft_data, tmp_path):
    """One that fails in mid-run is named once, and stops nothing."""
    patches = {"common.run.trackers.OPENERS": {"tensorboard": written, "wandb": broken}}
    patches["importlib.metadata.version"] = of_every_package
    changes = {"report_to": ["tensorboard", "wandb"], "max_train_steps": 200, "global_batch_size": 2}
    flags = launch.flags(tiny_llama, sft_data, tmp_path, **changes)
    run = launch.start("train_sft", flags, 1, patches)
    metrics = tmp_path / "output" / "metrics.jsonl"
    assert run.wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 4)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    stopped = run.wait()
    assert stopped.exit_codes == [143]
    first_id, first = json.loads((stopped.output_dir / "tracked_0.json").read_text())
    assert first == stopped.metrics and stopped.stdout.count("warning: --report_to wandb") == 1
    assert "ConnectionError: the line is cut" in stopped.stdout
    last = len(first)
    done = launch.launch("train_sft", flags | {"stop_after_steps": last + 2}, 1, patches).succeeded()
    second_id, second = json.loads((done.output_dir / f"tracked_{last}.json").read_text())
    assert second_id == first_id and [record["step"] for record in first + second] == [*range(1, last + 3)]
    again = launch.launch("train_sft", flags | {"resume": "never", "max_train_steps": 1}, 1, patches).succeeded()
    assert json.loads((again.output_dir / "tracked_0.json").read_text())[0] != first_id


def of_every_package(name: str, real=importlib.metadata.version) -> str:
    """importlib.metadata.version, where every tracker is installed."""
    return "1" if name in TRACKERS else real(name)


def test_a_tracker_that_cannot_be_opened_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.OPENERS, "wandb", lambda *_: 1 / 0)
    config = SFTConfig(report_to=["wandb"], output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"--report_to wandb.*ZeroDivisionError"):
        trackers.Trackers(config, "id", 0, OneRank())


@pytest.mark.parametrize("name", TRACKERS[1:])
def test_a_package_that_is_missing_is_named_with_its_command_before_training(name, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution(f"no-{name}"))
    with pytest.raises(UserError, match=f"--report_to {name} needs .* -m pip install {name}"):
        parse_config(SFTConfig, ["--report_to", name])
