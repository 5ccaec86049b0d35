"""Checkpoints are whole or absent: every file operation of a save, every damage, every refusal, in one process.

    python -m pytest tests/test_checkpoint.py

What needs real ranks and a real engine is in test_resume.py.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from faults import Crash, Disk
from safetensors.numpy import load_file

from common import files, stopping
from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import TrainingStopped, UserError
from common.run import output_dir as run_record
from common.zero import checkpoint
from common.zero.checkpoint import RunState

SHAPES = {"embed.weight": (7, 3), "layer.weight": (5,), "norm.weight": (1,)}


class OneRank:
    """Ranks, of a group of one, that remembers what it said."""

    rank, world_size, is_main = 0, 1, True

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)

    def once(self, work):
        return json.loads(json.dumps(work()))

    def gather(self, work):
        return [self.once(work)]


class Slice:
    """A parameter's partition on the one rank: masters and moments by kind, each with DeepSpeed's padding behind it."""

    def __init__(self, shape, step):
        numel = int(np.prod(shape))
        self.ds_shape, self.ds_numel = torch.Size(shape), numel
        self.local = {
            kind: torch.cat([torch.arange(numel) + 100.0 * step + 0.25 * i, torch.full((2,), torch.nan)])
            for i, kind in enumerate(checkpoint.KINDS)
        }

    def element_size(self):
        return 2


@pytest.fixture
def output_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 150)  # several files a rank
    patch_engine(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of them; faults.Disk knows which were asked for
    return tmp_path / "run"


def patch_engine(monkeypatch):
    monkeypatch.setattr(checkpoint, "safe_get_local_fp32_param", lambda p: p.local["master"])
    monkeypatch.setattr(checkpoint, "safe_get_local_optimizer_state", lambda p, kind: p.local[kind])


def parameters(step: int) -> dict:
    return {name: Slice(shape, step) for name, shape in SHAPES.items()}


def save(output_dir: Path, step: int, keep: int = 3) -> Path:
    output_dir.mkdir(exist_ok=True)
    return checkpoint.save(parameters(step), RunState(step=step, samples=4 * step), str(output_dir), keep, OneRank())


def find(output_dir: Path, resume: str = "auto") -> tuple[Path | None, str]:
    """(what a resume takes, what it says)."""
    ranks = OneRank()
    return checkpoint._find(str(output_dir), resume, ranks), "\n".join(ranks.said)


def names(output_dir: Path) -> list[str]:
    return sorted(os.listdir(output_dir / "checkpoints"))


def assert_holds(folder: Path, step: int):
    """Every number of the checkpoint of `step`, by safetensors' own reader."""
    assert json.loads((folder / "state.json").read_text())["step"] == step
    read = {}
    for file in folder.glob("*.safetensors"):
        read |= load_file(file)
    expected = {
        f"{kind}/{name}": values[:-2].numpy()
        for name, p in parameters(step).items()
        for kind, values in p.local.items()
    }
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values)


# ------------------------------------------------------------------ one save


def test_a_checkpoint_holds_every_number_and_a_manifest_of_every_file(output_dir):
    folder = save(output_dir, 5)
    assert folder.name == "step_00000005"
    assert_holds(folder, 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: path for path in folder.iterdir()}
    assert {*manifest["files"]} == {*files} - {"manifest.json", "COMPLETE"}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    for name, entry in manifest["files"].items():
        assert entry == {"size": files[name].stat().st_size, "digest": files.digest(files[name].read_bytes())}
    assert (folder / "COMPLETE").read_text() == files.digest((folder / "manifest.json").read_bytes())
    assert find(output_dir) == (folder, "")


def test_old_checkpoints_go_only_after_the_new_one_and_steps_are_numbers(output_dir):
    for step in (2, 99999999, 100000000, 100000001):
        save(output_dir, step, keep=2)
        assert find(output_dir)[0].name == f"step_{step:08d}"
    assert names(output_dir) == ["step_100000000", "step_100000001"]


@pytest.mark.parametrize("how", ["crash", "power loss", "full"])
@pytest.mark.parametrize("keep", [1, 2])
def test_whatever_file_operation_fails_a_resume_finds_the_old_or_the_new_whole_checkpoint(output_dir, how, keep):
    """Each change to the disk in turn, until a save passes; then the run goes on from what was found."""
    found_steps = []
    for n in range(1, 1000):
        shutil.rmtree(output_dir, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch_engine(patch)
            save(output_dir, 8, keep)
            save(output_dir, 9, keep)
        patch = pytest.MonkeyPatch()
        ended = None
        with Disk(patch, [checkpoint, files], n, "full" if how == "full" else "crash") as disk:
            patch_engine(patch)
            try:
                save(output_dir, 10, keep)
            except Crash as e:
                ended = e
            except TrainingStopped as e:
                ended = e
                assert how == "full"
                assert "No space left on device" in str(e)
                assert "older checkpoints are intact" in str(e)
        if how == "power loss" and ended:
            disk.lose_power(output_dir)
        with pytest.MonkeyPatch.context() as patch:
            patch_engine(patch)
            found, _ = find(output_dir)
            assert found is not None, f"operation {n}: nothing to resume from"
            step = int(found.name[5:])
            assert step in (9, 10)
            assert_holds(found, step)
            found_steps.append(step)
            checkpoint.delete_after(str(output_dir), step, "")  # as a run that continues from there
            assert not [name for name in names(output_dir) if name.startswith(".")]
            save(output_dir, 11, keep)
            assert find(output_dir)[0].name == "step_00000011"
            assert all(find(output_dir, str(path))[0] for path in checkpoint._complete(str(output_dir)))
        if disk.count < n:
            break
    assert n > 30, "a save has more file operations than that"
    assert found_steps == sorted(found_steps), "once a checkpoint is published, it stays"
    assert {*found_steps} == {9, 10}


def test_nothing_is_renamed_before_it_is_on_disk_nor_deleted_before_the_rename_is(output_dir, monkeypatch):
    """The order of a save's operations, as a journal: what test_whatever_... rests on, said directly."""
    save(output_dir, 9)
    journal = []
    for name in ("rename", "fsync", "unlink", "rmdir"):
        real = getattr(os, name)

        def spy(*args, name=name, real=real, **kwargs):
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[0])
            journal.append((name, Path(target).name))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, spy)
    folder = save(output_dir, 10, keep=1)
    publish = journal.index(("rename", ".step_00000010.tmp"))
    assert {name for what, name in journal[:publish] if what == "fsync"} >= {path.name for path in folder.iterdir()}
    assert journal[publish - 1 : publish + 3] == [
        ("fsync", ".step_00000010.tmp"),
        ("rename", ".step_00000010.tmp"),
        ("fsync", "checkpoints"),
        ("rename", "step_00000009"),
    ]
    assert not [name for what, name in journal[:publish] if what in ("unlink", "rmdir")]


def test_a_write_error_on_any_thread_stops_training_with_one_clear_line(output_dir, monkeypatch):
    save(output_dir, 9)
    real = files.write_file

    def failing(path, blocks):
        if "part_000" in path.name:
            raise OSError(5, os.strerror(5))
        return real(path, blocks)

    monkeypatch.setattr(checkpoint, "write_file", failing)
    with pytest.raises(TrainingStopped, match="could not be written: Input/output error; older checkpoints are intact"):
        save(output_dir, 10)
    assert find(output_dir)[0].name == "step_00000009"


def test_replace_file_leaves_the_old_text_or_the_new(tmp_path):
    path = tmp_path / "run_config.json"
    for n in range(1, 20):
        for how in ("crash", "power loss"):
            path.write_text("old " * 100)
            with Disk(pytest.MonkeyPatch(), [checkpoint, files], n) as disk, contextlib.suppress(Crash):
                files.replace_file(path, "new " * 100)
            if how == "power loss":
                disk.lose_power(tmp_path)
            assert path.read_text() in ("old " * 100, "new " * 100)
    assert disk.count < n
    assert path.read_text() == "new " * 100


# ------------------------------------------------------------------ damage


def damage(path: Path, how: str, rng: random.Random):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "grow":
        path.write_bytes(bytes(data) + b"\0")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "remove"])
def test_damage_to_any_file_is_said_and_the_checkpoint_before_is_used(output_dir, how):
    rng = random.Random(0)
    before, newest = save(output_dir, 9), save(output_dir, 10)
    whole = newest.with_name("whole")
    shutil.copytree(newest, whole)
    for name in sorted(os.listdir(newest)):
        for _ in range(8):
            shutil.rmtree(newest)
            shutil.copytree(whole, newest)
            damage(newest / name, how, rng)
            found, said = find(output_dir)
            assert found == before, f"{how} {name}"
            assert f"{newest} is not whole, passing it over:" in said
            assert name in said
            with pytest.raises(UserError, match=f"--resume .*{name}"):
                find(output_dir, str(newest))
    shutil.rmtree(newest)
    shutil.copytree(whole, newest)
    assert find(output_dir) == (newest, "")


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(output_dir, monkeypatch, error):
    for step in (1, 2):
        save(output_dir, step)
    before, real = sorted(output_dir.rglob("*")), files.file_digest

    def failing(path):
        if path.parent.name == "step_00000002" and "part_000" in path.name:
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "file_digest", failing)
    with pytest.raises(UserError, match=f"step_00000002 cannot be read: {os.strerror(error)} .*part_000") as told:
        find(output_dir)
    assert "\n" not in str(told.value) and sorted(output_dir.rglob("*")) == before


def test_a_path_to_resume_from_that_is_not_there_is_refused_as_such(output_dir):
    path = save(output_dir, 1)
    for name in ("AUTO", str(path / "manifest.json"), "checkpoints/step_2"):
        with pytest.raises(UserError, match=f"--resume {name}: there is no such folder"):
            find(output_dir, name)


def test_where_no_checkpoint_is_whole_a_run_starts_over_and_says_why(output_dir):
    for step in (1, 2):
        (save(output_dir, step) / "state.json").write_text("{}")
    found, said = find(output_dir)
    assert found is None
    assert said.count("state.json has 2 bytes in place of") == 2


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "COMPLETE is missing"),
        ({"COMPLETE": "x"}, "manifest.json is missing"),
        ({"manifest.json": "{}"}, "COMPLETE is missing"),
        ({"manifest.json": "[]", "COMPLETE": files.digest(b"[]")}, "not of this project"),
        ({"manifest.json": "{}", "COMPLETE": files.digest(b"{}")}, "not of this project"),
        (
            {"manifest.json": '{"files": {"a": 1}}', "COMPLETE": files.digest(b'{"files": {"a": 1}}'), "a": ""},
            "not of this project",
        ),
        ({"manifest.json": "\udcff", "COMPLETE": "\udcff"}, "not of this project|not the one"),
    ],
    ids=str,
)
def test_a_folder_without_a_manifest_of_ours_is_refused_by_path(tmp_path, files, why):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"--resume {tmp_path}: .*({why})"):
        find(tmp_path, str(tmp_path))


def test_a_pickle_is_never_opened(output_dir, tmp_path):
    """A file that our manifest does not name is not read, whatever it is."""

    class Boom:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/unpickled",))

    folder = save(output_dir, 9)
    torch.save(Boom(), folder / "mp_rank_00_model_states.pt")
    assert find(output_dir)[0] == folder
    assert not (tmp_path / "unpickled").exists()
    assert "pickle" not in vars(checkpoint)


# ------------------------------------------------------------------ which checkpoint, which run


def test_a_run_that_continues_from_an_earlier_step_leaves_no_later_one_behind(output_dir):
    """Else keep_last_n would delete the new ones, and the next resume would find the abandoned ones."""
    for step in (3, 6, 9):
        save(output_dir, step)
    checkpoint.delete_after(str(output_dir), 3, "")
    save(output_dir, 4, keep=1)
    assert names(output_dir) == ["step_00000004"]


def config_of(cls, **changes):
    return dataclasses.replace(parse_config(cls, []), **changes)


def identity_of(config, folder: Path, data="d", template="t"):
    (folder / "config.json").write_text("{}")
    return run_record.run_identity(config, data, template, str(folder))


# A field is here or it must be the same in a resume.
FREE = {
    "output_dir",
    "cache_dir",
    "resume",
    "logging_steps",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "clean_checkpoints_at_end",
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "attn_implementation",
    "compile_layers",
    "collective_timeout_minutes",
    "ds_config",
    "stop_after_steps",
    "share_prompt",
}
# Other words for the same rows, template or weights are the same run.
BY_CONTENTS = {"dataset_mixer", "chat_template", "model_name_or_path", "model_revision", "ref_model_name_or_path"}


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])
def test_each_value_that_changes_the_result_is_refused_with_old_and_new(cls, output_dir, tmp_path):
    identity = identity_of(config_of(cls), tmp_path)
    output_dir.mkdir()
    checkpoint.save(parameters(1), RunState(step=1, identity=identity), str(output_dir), 1, OneRank())

    def start(new_identity):
        return checkpoint.starting_point(str(output_dir), "auto", new_identity, 10, OneRank())

    assert start(identity)[0].step == 1
    for field in dataclasses.fields(cls):
        old = getattr(config_of(cls), field.name)
        new = not old if isinstance(old, bool) else old + 1 if isinstance(old, (int, float)) else "other"
        changed = identity_of(config_of(cls, **{field.name: new}), tmp_path)
        if field.name in FREE | BY_CONTENTS:
            assert start(changed)[0].step == 1
        else:
            with pytest.raises(UserError) as e:
                start(changed)
            assert f"{field.name} was {old!r}, is {new!r}" in str(e.value)
            assert "\n" not in str(e.value)
    for what, arguments in {"dataset_mixer": {"data": "other"}, "chat_template": {"template": "other"}}.items():
        with pytest.raises(UserError, match=f"{what} .contents. was '.', is 'other'"):
            start(identity_of(config_of(cls), tmp_path, **arguments))
    with pytest.raises(UserError, match=r"learning_rate was .*; seed was 42, is 7"):
        start(identity_of(config_of(cls, seed=7, learning_rate=1.0), tmp_path))


def test_a_checkpoint_past_the_last_step_is_refused(output_dir):
    save(output_dir, 9)
    with pytest.raises(UserError, match="past this run's last step, 5"):
        checkpoint.starting_point(str(output_dir), "auto", {}, 5, OneRank())


def test_a_folder_in_which_another_run_writes_is_refused_until_that_ends(tmp_path):
    code = (
        "import sys; from common.run import output_dir; from common.config import SFTConfig; "
        "output_dir.check_output_dir(SFTConfig(output_dir=sys.argv[1]), {}, 5); print('held', flush=True); sys.stdin.read()"
    )
    config = config_of(SFTConfig, output_dir=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(run_record.__file__).parents[2],
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run writes there now"):
            run_record.check_output_dir(config, {}, 5)
        other.kill()
    for _ in range(2):  # a process may look twice
        assert not run_record.check_output_dir(config, {}, 5)


@pytest.mark.parametrize("flag", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_model_that_is_read_is_not_written_over(tmp_path, flag):
    config = config_of(DPOConfig, output_dir=str(tmp_path / "a/.."), **{flag: str(tmp_path)})
    with pytest.raises(UserError, match=f"is --{flag}, which would be lost"):
        run_record.check_output_dir(config, {}, 5)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "run_config.json"])
def test_what_is_in_the_way_is_named_before_training(tmp_path, name):
    (tmp_path / name).touch() if name == "checkpoints" else (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is in the way"):
        run_record.check_output_dir(config_of(SFTConfig, output_dir=str(tmp_path)), {}, 5)


@pytest.mark.parametrize("text", ["null", "3", '"text"', '{"identity": 3}', '{"result": []}', "{"])
def test_a_run_config_that_no_run_wrote_is_refused(tmp_path, text):
    (tmp_path / "run_config.json").write_text(text)
    with pytest.raises(UserError, match="not JSON that a run wrote"):
        run_record.check_output_dir(config_of(SFTConfig, output_dir=str(tmp_path)), {}, 5)


def write_export(folder: Path) -> list[Path]:
    """The files by which a model is known to be there: its index and the shards that it names."""
    index = folder / "model.safetensors.index.json"
    shards = [folder / f"model-{i}.safetensors" for i in (1, 2)]
    index.write_text(json.dumps({"weight_map": {"a": shards[0].name, "b": shards[1].name}}))
    for shard in shards:
        shard.touch()
    return [index, *shards]


def test_a_run_config_that_another_run_finished_is_refused(tmp_path):
    config = config_of(SFTConfig, output_dir=str(tmp_path))
    identity = identity_of(config, tmp_path)
    run_record.write_run_config(str(tmp_path), {"identity": identity, "result": {"steps": 4}})
    write_export(tmp_path)
    assert run_record.check_output_dir(config, identity, 4)
    with pytest.raises(UserError, match="after 4 steps, past the 3 asked for"):
        run_record.check_output_dir(config, identity, 3)
    assert not run_record.check_output_dir(config, identity, 5)  # --stop_after_steps was raised: it continues
    assert not run_record.check_output_dir(dataclasses.replace(config, resume="never"), identity, 4)
    with pytest.raises(UserError, match=r"seed was 42, is 43"):
        run_record.check_output_dir(config, {**identity, "seed": 43}, 4)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_finished_run_whose_model_is_gone_is_not_finished(tmp_path, lost):
    config = config_of(SFTConfig, output_dir=str(tmp_path))
    identity = identity_of(config, tmp_path)
    run_record.write_run_config(str(tmp_path), {"identity": identity, "result": {"steps": 4}})
    files = write_export(tmp_path)
    assert run_record.check_output_dir(config, identity, 4)
    files[lost].unlink()
    assert not run_record.check_output_dir(config, identity, 4)
    for text in ("[]", "null", '{"weight_map": 3}', "{"):
        files[0].write_text(text)
        assert not run_record.check_output_dir(config, identity, 4)
    run_record.write_run_config(str(tmp_path), {"identity": identity, "result": {}})
    assert not run_record.check_output_dir(config, identity, 4)


def test_checkpoints_are_cleaned_only_once_the_result_is_written(output_dir, monkeypatch, tmp_path):
    """Killed between the two, the rerun finds a finished run and cleans up; the other order would train again."""
    config = config_of(SFTConfig, output_dir=str(output_dir), clean_checkpoints_at_end=True)
    save(output_dir, 9)
    write_export(output_dir)
    identity = identity_of(config, tmp_path)
    monkeypatch.setattr(run_record, "delete_after", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run_record.finish(config, {"method": "SFT", "identity": identity}, RunState(step=9), None, [[9]], "")
    monkeypatch.undo()
    assert names(output_dir) == ["step_00000009"]
    assert run_record.check_output_dir(config, identity, 9)
    assert names(output_dir) == []


# ------------------------------------------------------------------ disk


def test_space_is_checked_for_checkpoints_and_export_with_both_numbers(output_dir, monkeypatch):
    save(output_dir, 9)
    Usage = namedtuple("Usage", "total used free")
    taken = sum(path.stat().st_size for path in (output_dir / "checkpoints").rglob("*") if path.is_file())
    numel = 7 * 3 + 5 + 1
    needed = 4 * 12 * numel + 2 * numel
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - taken))
    checkpoint.require_disk_space(parameters(0), str(output_dir), 4)
    with pytest.raises(UserError, match=r"needs 0.0 GB for 5 checkpoints and the model, 0.0 GB are free"):
        checkpoint.require_disk_space(parameters(0), str(output_dir), 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - taken - 1))
    with pytest.raises(UserError, match="--keep_last_n_checkpoints"):
        checkpoint.require_disk_space(parameters(0), str(output_dir), 4)
    big = Slice((1,), 0)
    big.ds_numel = 8 * 10**9
    with pytest.raises(UserError, match=r"needs 400.0 GB for 4 checkpoints"):
        checkpoint.require_disk_space({"w": big}, str(output_dir), 4)


# ------------------------------------------------------------------ stop requests


@pytest.fixture
def request_of_one(monkeypatch):
    """StopRequest with `os._exit` raising SystemExit, and the handlers put back afterwards."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "PLAINTUNE_RUN_SH"):
        monkeypatch.delenv(name, raising=False)
    ranks = OneRank()
    yield lambda: stopping.StopRequest(ranks), ranks, signal
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_repeated_signal_is_one_request_and_a_later_one_leaves_at_once(request_of_one, monkeypatch):
    make, ranks, signal = request_of_one
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.2)
    request = make()
    assert request.votes() == (0, 0)
    assert request.agreed(0, 0, ranks) == 0
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes a terminal's Ctrl-C on, as SIGTERM
    assert request.votes() == (0, 1)
    assert request.agreed(0, 1, ranks) == signal.SIGINT
    os.kill(os.getpid(), signal.SIGTERM)  # and may do so late
    time.sleep(0.25)
    with pytest.raises(SystemExit) as e:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert e.value.code == 143


def test_a_rank_that_others_told_of_the_stop_does_not_take_its_own_late_signal_for_a_second(request_of_one):
    make, ranks, signal = request_of_one
    request = make()
    assert request.agreed(1, 0, ranks) == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


@pytest.mark.parametrize("is_early", [False, True], ids=["during the export", "between the last vote and the export"])
def test_during_the_export_the_first_request_waits_and_the_second_leaves(request_of_one, monkeypatch, capfd, is_early):
    make, _, signal = request_of_one
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.1)
    request = make()
    if is_early:
        os.kill(os.getpid(), signal.SIGINT)
        request.wait_for_export()
    else:
        request.wait_for_export()
        os.kill(os.getpid(), signal.SIGINT)
    assert "writing the model first" in capfd.readouterr().out
    time.sleep(0.15)
    with pytest.raises(SystemExit) as e:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert e.value.code == 130


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, False),
        ({"CROSS_RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "x"}, True),
        ({"CROSS_RANK": "0", "PLAINTUNE_RUN_SH": "1"}, False),
    ],
    ids=str,
)
def test_a_bare_launcher_s_30_seconds_are_said(request_of_one, monkeypatch, environment, warned):
    make, ranks, _ = request_of_one
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    make()
    assert ("30 s" in "".join(ranks.said)) == warned


def test_other_weights_under_the_same_name_are_another_run(tmp_path):
    """A DPO run's SFT folder that a new SFT run has overwritten: neither finished nor to be resumed."""
    config = SFTConfig(cache_dir=str(tmp_path / "cache"))
    one, other = (
        run_record.run_identity(config, "data", "template", str(models.make_model(tmp_path / "model", seed=seed)))
        for seed in (0, 1)
    )
    assert {name for name in one if one[name] != other[name]} == {"model_name_or_path (weights)"}


def test_the_same_weights_under_another_name_are_the_same_run(tmp_path, monkeypatch):
    """However its path is written, and wherever it was moved to."""
    monkeypatch.chdir(tmp_path)
    models.make_model(tmp_path / "model")
    shutil.copytree("model", "moved")
    identities = []
    for name in ("model", "./model", str(tmp_path / "moved")):
        config = DPOConfig(cache_dir="cache", model_name_or_path=name, ref_model_name_or_path=name)
        identities.append(run_record.run_identity(config, "data", "template", name, name))
    assert identities[0] == identities[1] == identities[2]


def test_another_reference_under_the_same_name_is_another_run(tmp_path):
    config = DPOConfig(cache_dir=str(tmp_path / "cache"), ref_model_name_or_path=str(tmp_path / "reference"))
    policy = str(models.make_model(tmp_path / "policy"))
    none = run_record.run_identity(config, "data", "template", policy)
    one, other = (
        run_record.run_identity(
            config, "data", "template", policy, str(models.make_model(tmp_path / "reference", seed=seed))
        )
        for seed in (0, 1)
    )
    assert {name for name in one if one[name] != other[name]} == {"ref_model_name_or_path (weights)"}
    assert set(one) - set(none) == {f"ref_model_name_or_path ({part})" for part in ("weights", "config.json")}
