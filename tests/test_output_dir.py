"""Whose folder it is, where its run stands, and the record of its steps: pytest tests/test_output_dir.py"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launch
import models
import pytest
from models import OneRank, make_model
from transformers import AutoModelForCausalLM

from common import files
from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError, explained
from common.run import disk
from common.run import output_dir as run_record
from common.run.agreement import run_identity
from common.run.metrics import MetricsFile, read_metrics
from common.run.output_dir import claim, open_output_dir, read_run_config, write_run_config
from common.zero import checkpoint
from common.zero.checkpoint import RunState


def config_of(folder, cls=SFTConfig, **changes):
    return dataclasses.replace(parse_config(cls, []), output_dir=str(folder), **changes)


def refused(named: str, config, identity=(), last_step: int = 5) -> None:
    with pytest.raises(UserError, match=named):
        claim(config, dict(identity), last_step, OneRank())


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


def save(folder: Path, step: int, identity: dict) -> Path:
    """A checkpoint that holds no parameter."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    zero, policy = SimpleNamespace(fp16_groups=[]), SimpleNamespace(finish_gathering=lambda: None)
    engine = SimpleNamespace(optimizer=zero, module=policy)
    writer = checkpoint.Writer(engine, {}, SFTConfig(output_dir=str(folder), keep_last_n_checkpoints=9), OneRank())
    writer.save(RunState(step=step, identity=identity))
    writer.wait()
    return writer.path


# ------------------------------------------------------------------ which run

# A field is here or it must be the same in a resume.
FREE = """output_dir cache_dir resume logging_steps checkpointing_steps keep_last_n_checkpoints export_at_checkpoints
clean_checkpoints_at_end max_tokens_per_micro_batch gradient_checkpointing attn_implementation compile_layers
collective_timeout_minutes ds_config stop_after_steps share_prompt gpu_hour_price eval_dataset_mixer eval_steps
early_stopping_patience keep_best export_best report_to allow_dropped push_to_hub hub_model_id hub_private
hub_overwrite""".split()  # noqa: SIM905
# Other words for the same rows, template or weights are the same run.
BY_CONTENTS = ["dataset_mixer", "chat_template", "model_name_or_path", "model_revision", "ref_model_name_or_path"]


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])
def test_each_value_that_changes_the_result_is_refused_with_old_and_new(cls, folder):
    config, contents = config_of(folder, cls), {"dataset_mixer": "d", "chat_template": "t"}
    identity = run_identity(config, contents)

    def begin(digests=(), **changes):
        changed = run_identity(dataclasses.replace(config, **changes), contents | dict(digests))
        return claim(config, changed, 10, OneRank())

    assert begin() == (RunState(identity=identity), None)
    path = save(folder, 1, identity)
    for field in dataclasses.fields(cls):
        old = getattr(config, field.name)
        new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else "other"
        if field.name in FREE + BY_CONTENTS:
            state, found = begin(**{field.name: new})
            assert (state.step, found) == (1, path)
        else:
            with pytest.raises(UserError) as e:
                begin(**{field.name: new})
            assert f"{field.name} was {old!r}, is {new!r}" in str(e.value) and "\n" not in str(e.value)
    for what in contents:
        with pytest.raises(UserError, match=f"{what} .contents. was '.', is 'other'"):
            begin({what: "other"})
    with pytest.raises(UserError, match=r"learning_rate was .*; seed was 42, is 7"):
        begin(seed=7, learning_rate=1.0)


def test_more_epochs_go_on_where_no_step_depends_on_their_number_and_else_the_ways_are_named(folder):
    refused = pytest.raises(UserError, match=f"num_train_epochs was 2, is 9.*--model_name_or_path {folder}")
    for scheduler in ("constant", "linear", "constant_with_warmup"):
        config = config_of(folder, lr_scheduler_type=scheduler)
        path = save(folder, 4, run_identity(config, {}))
        longer = run_identity(dataclasses.replace(config, num_train_epochs=9), {})
        with contextlib.nullcontext() if scheduler == "constant" else refused:
            state, found = claim(config, longer, 10, OneRank())
            assert (state.step, found) == (4, path)
        shutil.rmtree(folder)


@pytest.mark.parametrize("changed", ["config.json", "model-1.safetensors", "part/model-2.safetensors"])
def test_a_model_is_its_bytes_wherever_it_lies_and_however_its_path_is_written(tmp_path, monkeypatch, changed):
    """As an SFT folder that a new run has overwritten, or another reference under the same name."""
    monkeypatch.chdir(tmp_path)
    folder, names = Path("model"), ("config.json", "model-1.safetensors", "part/model-2.safetensors")
    (folder / "part").mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[1], "b": names[2]}}))
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "README.md").write_text("decides nothing")

    one = files.weights_digest("model")
    assert one == files.weights_digest("./model") == files.weights_digest(str(moved))
    (moved / changed).write_text(changed[:-1] + "x")  # the same size
    assert files.weights_digest(str(moved)) != one


@pytest.mark.parametrize("link", ["gone", "/dev/zero"])
def test_weights_that_are_not_there_or_never_end_are_named(tmp_path, link):
    """As in a hub's cache that was cleaned: a link to nothing."""
    models.make_config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(link)
    with pytest.raises(UserError, match=r"model\.safetensors: (No such file|neither)"):
        files.weights_digest(str(tmp_path))


# ------------------------------------------------------------------ where it stands


def finished(folder: Path, identity: dict, steps: int = 4) -> list[Path]:
    """A finished run's record and the files by which a model is known to be there: the index, and what it names."""
    folder.mkdir(exist_ok=True)
    write_run_config(str(folder), {"identity": identity, "result": {"steps": steps}})
    paths = [folder / f"model-{i}.safetensors" for i in (1, 2)]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": paths[0].name, "b": paths[1].name}}))
    for path in paths:
        path.touch()
    return [index, *paths]


def test_a_finished_run_has_nothing_to_do_unless_more_is_asked_for(folder):
    config, identity = config_of(folder), {"seed": 42}
    finished(folder, identity)
    assert claim(config, identity, 4, OneRank()) is None
    anew = OneRank()
    assert claim(config, identity, 5, anew) is not None  # --stop_after_steps was raised, and no checkpoint is left
    assert "ended after 4 steps" in anew.said[-1]
    assert claim(dataclasses.replace(config, resume="never"), identity, 4, OneRank()) is not None
    cases = [(3, identity, "after step 4"), (4, {"seed": 43}, "seed was 42, is 43"), (4, {}, "seed was 42, is None")]
    for last_step, asked, named in cases:
        refused(named, config, asked, last_step)


@pytest.mark.parametrize("lost", [0, 1, 2, "[]", "null", '{"weight_map": 3}', "{"])
def test_a_finished_run_whose_model_is_gone_or_has_no_index_is_not_finished(folder, lost):
    paths = finished(folder, {})
    paths[lost].unlink() if isinstance(lost, int) else paths[0].write_text(lost)
    assert claim(config_of(folder), {}, 4, OneRank()) is not None


def test_a_checkpoint_past_the_last_step_is_refused(folder):
    save(folder, 9, {})
    refused(r"step_00000009 .* past this run's last step, 5", config_of(folder))


def test_checkpoints_are_cleaned_only_once_the_result_is_written(folder, monkeypatch):
    """Killed between the two, the rerun finds a finished run and cleans up; the other order would train again."""
    config = config_of(folder, clean_checkpoints_at_end=True)
    path = save(folder, 9, {})
    finished(folder, {})
    metrics = MetricsFile(str(folder), RunState(step=9), OneRank())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(run_record, "model_card", lambda *_: "")
        patch.setattr(checkpoint, "delete_all", lambda *_: 1 / 0)
        run_record.finish(config, {"method": "SFT", "identity": {}}, RunState(step=9), metrics, "", OneRank())
    assert path.is_dir() and read_run_config(str(folder))["result"]["steps"] == 9
    assert claim(config, {}, 9, OneRank()) is None
    assert not path.exists()


# ------------------------------------------------------------------ whose folder it is


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_folder_in_which_another_run_writes_is_refused_until_that_ends(folder, num_hosts):
    code = """import sys; sys.path.insert(0, 'tests'); from models import OneRank; from common.config import SFTConfig
from common.run.output_dir import claim; OneRank.world_size = int(sys.argv[2])
claim(SFTConfig(output_dir=sys.argv[1]), {}, 5, OneRank()); print('held', flush=True); sys.stdin.read()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": launch.REPO}
    with subprocess.Popen([sys.executable, "-c", code, str(folder), str(num_hosts)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        known_by = (folder / ".lock").read_text()
        refused(f"--output_dir {folder}: another run writes there now", config_of(folder))
        assert (folder / ".lock").read_text() == known_by  # the other run's hosts still find it
        other.kill()
    for _ in range(2):  # a process may look twice
        assert claim(config_of(folder), {}, 5, OneRank())


@pytest.mark.parametrize("flag", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_model_that_is_read_is_not_written_over_and_one_that_an_unfinished_run_found_is_not_read(tmp_path, flag):
    refused(f"--output_dir .* is --{flag}", config_of(tmp_path / "a/..", DPOConfig, **{flag: str(tmp_path)}))
    config = config_of(tmp_path / "other", DPOConfig, **{flag: str(tmp_path)})
    write_run_config(str(tmp_path), {"identity": {}})
    refused(f"--{flag} {tmp_path}: .*not finished", config)
    write_run_config(str(tmp_path), {"identity": {}, "result": {"steps": 5}})
    assert claim(config, {}, 5, OneRank())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_model_that_no_run_of_this_project_wrote_is_not_written_over(folder, resume):
    folder.mkdir()
    (folder / "model-1.safetensors").touch()
    refused(f"--output_dir {folder}: .*model-1.safetensors", config_of(folder, resume=resume))
    assert os.listdir(folder) == ["model-1.safetensors"]


@pytest.mark.parametrize("text", ["null", '"text"', "{"])
def test_a_run_config_that_no_run_wrote_is_refused(folder, text):
    folder.mkdir()
    (folder / "run_config.json").write_text(text)
    refused(f"{folder}/run_config.json", config_of(folder))


def no_disk(path) -> SimpleNamespace:
    return SimpleNamespace(free=0)


def test_too_small_a_disk_is_an_error_before_anything_is_loaded(tiny_llama, dpo_data, tmp_path):
    """The best checkpoint may come at each evaluation: of two old ones, the best and the one that is being written."""
    best = {"keep_best": "eval/loss", "eval_holdout": "1", "keep_last_n_checkpoints": 2, "max_train_steps": 12}
    flags = launch.flags(tiny_llama, dpo_data, tmp_path, **best)
    run = launch.launch("train_dpo", flags, 1, {"shutil.disk_usage": no_disk})
    assert "for 4 checkpoints and 1 exported" in run.refused(2) and "loading" not in run.stdout
    assert not (run.output_dir / "run_config.json").exists()


# What is certain of a run: its flags, and the checkpoints and models that its folder holds at least.
CERTAIN = [({}, 0, 1), ({"max_train_steps": 9, "checkpointing_steps": 2}, 4, 1), ({"keep_best": "eval/loss"}, 0, 1)]
CERTAIN += [({"max_train_steps": steps, "keep_best": "eval/loss"}, n, 1) for steps, n in ((9, 5), (2, 2))]
CERTAIN += [({"max_train_steps": 9, "checkpointing_steps": 4, "export_at_checkpoints": True}, 2, 3)]
CERTAIN += [({"max_train_steps": 9, "checkpointing_steps": 2, "stop_after_steps": 4}, 2, 1)]


@pytest.mark.parametrize("changes, checkpoints, models", [*CERTAIN, ({"checkpointing_steps": "epoch"}, 0, 1)])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_what_is_certain_of_the_disk_is_asked_for_before_any_rank_starts(
    folder, tmp_path, monkeypatch, changes, checkpoints, models, shard
):
    """To the byte, by the headers of the model's files; the head, which may be tied, counts later. A folder that holds
    a run, a model with other parts and what is no model here are left to the run."""
    model = make_model(tmp_path / "model", shard=shard)
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    numel = sum(tensor.numel() for name, tensor in weights.items() if name != "lm_head.weight")
    config = config_of(folder, model_name_or_path=str(model), **changes)
    needed = numel * (12 * checkpoints + 2 * models)
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match="--output_dir") if free < needed else contextlib.nullcontext():
            disk.require_least(config)
    pointer = make_model(tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")  # was not fetched
    for name in ("no/model", pointer, make_model(tmp_path / "images", "gemma3")):
        disk.require_least(dataclasses.replace(config, model_name_or_path=str(name)))
    folder.mkdir()
    (folder / "run_config.json").touch()
    disk.require_least(config)


def test_the_models_that_checkpoints_lack_since_a_crash_are_exported_by_the_next_run(folder, monkeypatch):
    """One has its model, of one the export was cut off, and one is damaged, which stops nothing."""
    whole, torn, damaged = (save(folder, step, {}) / "model" for step in (1, 2, 3))
    for path in (whole, torn, torn / ".export"):
        path.mkdir()
        (path / "config.json").touch()
    (damaged.parent / "COMPLETE").write_text("")
    written, real = [], checkpoint.export
    monkeypatch.setattr(checkpoint, "export", lambda *of: real(*of) if of[1] == damaged else written.append(of[1]))
    open_output_dir(config_of(folder, export_at_checkpoints=True), {}, RunState(step=3), OneRank())
    assert written == [torn]


def test_what_a_killed_verify_has_left_goes_and_what_a_living_one_needs_stays(folder):
    folder.mkdir()
    files.held(folder / ".verify_dead").close()
    with files.held(folder / ".verify_living"):
        open_output_dir(config_of(folder), {}, RunState(), OneRank())
        assert [path.name for path in folder.glob(".verify_*")] == [".verify_living"]


# ------------------------------------------------------------------ metrics.jsonl


def records(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "train_loss": 0.5}) + "\n" for step in steps)


def test_a_resumed_run_leaves_neither_gap_nor_double_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(records(1, 2, 3) + '{"step": 4, "train_l')
    metrics = MetricsFile(str(tmp_path), RunState(step=2), OneRank())
    assert metrics.last["step"] == 2
    metrics.append({"step": 3, "train_loss": 0.5})
    metrics.flush_to_disk()
    assert path.read_text() == records(1, 2, 3)


ODD = ["\0\0\0", "[13]", "{}", '{"step": "3"}', '{"step": 2}', "", '{"step": 3', '{"step": 3, "train_loss": null}']


@pytest.mark.parametrize("line", [*ODD, '{"step": 3, "train_loss": 1, "eval/loss": "1"}'])
def test_any_other_line_that_is_no_next_record_is_refused_by_file_and_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(records(1, 2) + line + "\n" + records(5))
    with pytest.raises(UserError, match=f"{path} line 3 "):
        read_metrics(path)


@pytest.mark.parametrize("left", [(1, 2), (1, 3), (), None])
def test_records_that_are_missing_are_refused_and_a_file_that_is_gone_is_said(tmp_path, left):
    path, state, ranks = tmp_path / "metrics.jsonl", RunState(step=3, num_records=3), OneRank()
    if left is not None:
        path.write_text(records(*left))
        with pytest.raises(UserError, match=f"{path}: {3 - len(left)} of its 3 records"):
            MetricsFile(str(tmp_path), state, ranks)
    else:
        for _ in range(2):
            MetricsFile(str(tmp_path), state, ranks)
        assert f"{path}: 3 of its 3 records" in ranks.said[-1] and len(ranks.said) == 1


@pytest.mark.parametrize("write", [lambda metrics: metrics.append({"step": 2}), MetricsFile.flush_to_disk])
@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_folder_that_is_gone_during_a_run_ends_it_at_the_next_write(folder, write, is_made_again):
    folder.mkdir()
    metrics = MetricsFile(str(folder), RunState(), OneRank())
    metrics.append({"step": 1, "train_loss": 1})
    folder.rename(folder.with_name("other"))
    if is_made_again:
        folder.mkdir()
        MetricsFile(str(folder), RunState(), OneRank())
    with pytest.raises(OSError) as e:
        write(metrics)
    assert explained(e.value).EXIT_CODE == 3 and f"{folder}/metrics.jsonl" in str(explained(e.value))
