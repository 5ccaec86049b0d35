"""Checkpoints are whole or absent: every file operation of a save, every damage, in one process.

    python -m pytest tests/test_checkpoint.py

What needs real ranks and a real engine is in test_resume.py; whose checkpoint it is, in test_output_dir.py.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import Crash, Disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import OneRank
from safetensors.numpy import load_file

from common import files
from common.config import SFTConfig
from common.failures import UserError, explained
from common.run import disk
from common.zero import checkpoint, residency
from common.zero.checkpoint import RunState
from common.zero.host_state import Shard

SHAPES = {"embed.weight": (7, 3), "layer.weight": (5,), "norm.weight": (1,)}


class Slice:
    """A parameter's partition on the one rank: master weights and moments, each with DeepSpeed's padding behind it."""

    def __init__(self, shape, step):
        numel = int(np.prod(shape))
        self.ds_shape, self.ds_numel = torch.Size(shape), numel
        self.local = {
            kind: torch.cat([torch.arange(numel) + 100.0 * step + 0.25 * i, torch.full((2,), torch.nan)])
            for i, kind in enumerate(checkpoint.KINDS)
        }

    def element_size(self):
        return 2


def as_shard(local: dict) -> Shard:
    return Shard(weight=local["master"], **local)  # of the weight the device alone counts


def patch_engine(monkeypatch):
    """The parameters stand for the engine."""
    monkeypatch.setattr(residency, "state_shards", lambda engine: {p: as_shard(p.local) for p in engine.values()})
    monkeypatch.setattr(residency, "set_step", lambda engine, step: None)
    monkeypatch.setattr(residency, "round_master_weights", lambda engine: None)


@pytest.fixture
def output_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(checkpoint, "SHARD_FILE_BYTES", 150)  # several files a rank
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 32)  # several blocks a tensor
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of them; faults.Disk knows which were asked for
    patch_engine(monkeypatch)
    return tmp_path / "run"


def parameters(step: int) -> dict:
    return {name: Slice(shape, step) for name, shape in SHAPES.items()}


def save(output_dir: Path, step: int, keep: int = 3, beside: bool = False, settings: dict | None = None) -> Path:
    """beside: as a run that takes further steps meanwhile. settings: what its export needs."""
    writer = make_writer(output_dir, step, keep)
    writer.settings = settings or {}
    writer.save(RunState(step=step, samples=4 * step))
    while beside and writer.stage is not None:
        writer.proceed(writer.vote())
    writer.wait()
    return writer.path


def make_writer(output_dir: Path, step: int, keep: int = 3) -> checkpoint.Writer:
    (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    values, config = parameters(step), SFTConfig(output_dir=str(output_dir), keep_last_n_checkpoints=keep)
    return checkpoint.Writer(values, values, config, OneRank())


def find(output_dir: Path, resume: str = "auto") -> tuple[Path | None, str]:
    """(what a resume takes, what it says)."""
    ranks, into = OneRank(), parameters(0)
    path = checkpoint.find(str(output_dir), resume, ranks)
    if path is not None:
        state = checkpoint.read_state(path)
        checkpoint.load(into, into, path, state, resume, ranks)
        path = path.with_name(f"step_{state.step:08d}")
        assert state.samples == 4 * state.step
        for name, p in parameters(state.step).items():
            for kind in checkpoint.KINDS:
                np.testing.assert_array_equal(into[name].local[kind][:-2], p.local[kind][:-2])
    return path, "\n".join(line for line in ranks.said if not line.startswith("resuming"))


def names(output_dir: Path) -> list[str]:
    return sorted(os.listdir(output_dir / "checkpoints"))


def assert_holds(folder: Path, step: int):
    """Every number of the checkpoint of `step`, by safetensors' own reader."""
    assert checkpoint.read_state(folder).step == json.loads((folder / "state.json").read_text())["step"] == step
    read = {}
    for file in folder.glob("*.safetensors"):
        read |= load_file(file)
    of_all = parameters(step).items()
    expected = {f"{kind}/{name}": x[:-2].numpy() for name, p in of_all for kind, x in p.local.items()}
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(read[name], values)


# ------------------------------------------------------------------ one save


def test_a_checkpoint_holds_every_number_and_a_manifest_of_every_file(output_dir):
    folder = save(output_dir, 5, settings={"config.json": b"{}"})
    assert folder.name == "step_00000005"
    assert_holds(folder, 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {*manifest["files"]} == {*paths} - {"manifest.json", "COMPLETE"}
    assert len([name for name in paths if name.endswith(".safetensors")]) > 1
    for name, entry in manifest["files"].items():
        places = entry.pop("tensors", {})
        assert entry == {"size": paths[name].stat().st_size, "digest": files.digest(paths[name].read_bytes())}
        for tensor, (start, end) in places.items():
            assert paths[name].read_bytes()[start:end] == load_file(paths[name])[tensor].tobytes()
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
        save(output_dir, 8, keep)
        save(output_dir, 9, keep)
        patch, ended = pytest.MonkeyPatch(), None
        with Disk(patch, [checkpoint, files], n, "full" if how == "full" else "crash") as disk:
            try:
                save(output_dir, 10, keep, beside=keep == 2, settings={"config.json": b"{}"})
            except (Crash, OSError) as e:
                ended = e
                assert isinstance(e, OSError) == (how == "full")
        if how == "full" and ended:
            assert ended.errno == errno.ENOSPC and explained(ended).EXIT_CODE == 3
        if how == "power loss" and ended:
            disk.lose_power(output_dir)
        found, _ = find(output_dir)
        assert found is not None, f"operation {n}: nothing to resume from"
        step = int(found.name[5:])
        assert step in (9, 10)
        assert_holds(found, step)
        found_steps.append(step)
        checkpoint.clear_after(str(output_dir), step, "auto")  # as a run that continues from there
        assert all(name.startswith("step_") for name in names(output_dir)), "nothing to set aside nor half-written"
        save(output_dir, 11, keep)
        assert find(output_dir)[0].name == "step_00000011"
        assert all(find(output_dir, str(output_dir / "checkpoints" / name))[0] for name in names(output_dir))
        if disk.count < n:
            break
    assert n > 25, "a save has more file operations than that"
    assert found_steps == sorted(found_steps), "once a checkpoint is published, it stays"
    assert {*found_steps} == {9, 10}


@pytest.mark.parametrize("is_between_stages", [False, True])
def test_a_folder_that_was_renamed_is_not_made_again(output_dir, is_between_stages):
    """Between its stages a checkpoint without its shards would look complete there."""
    writer = make_writer(output_dir, 10)
    writer.settings = {"config.json": b"{}"}
    if is_between_stages:
        writer.save(RunState(step=10))
        writer.stage.result()
    output_dir.rename(output_dir.with_name("elsewhere"))
    with pytest.raises(OSError, match=r"\.step_00000010\.tmp"):
        if not is_between_stages:
            writer.save(RunState(step=10))
        writer.wait()
    assert not output_dir.exists()


def test_a_checkpoint_that_is_a_link_is_deleted_as_a_link_and_nothing_of_it_is_in_the_way_later(output_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save(output_dir, 1).rename(elsewhere)
    (output_dir / "checkpoints" / "step_00000001").symlink_to(elsewhere)
    save(output_dir, 2, keep=1)
    assert names(output_dir) == ["step_00000002"] and (elsewhere / "COMPLETE").is_file()
    save(output_dir, 1)  # as after `--resume never`
    save(output_dir, 3, keep=1)
    assert names(output_dir) == ["step_00000003"]


def test_two_processes_of_one_pid_write_a_file_under_different_names_first(tmp_path, monkeypatch):
    """As in two containers that share a folder."""
    seen, write = [], files.write_file
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(files, "write_file", lambda path, blocks: seen.append(path) or write(path, blocks))
    for _ in range(2):
        files.replace_file(tmp_path / "kept.json", "{}")
    assert len({*seen}) == 2 and os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("how", ["crash", "power loss"])
def test_replace_file_leaves_the_old_text_or_the_new(tmp_path, how):
    path = tmp_path / "run_config.json"
    for n in range(1, 20):
        path.write_text("old " * 100)
        with Disk(pytest.MonkeyPatch(), [checkpoint, files], n) as disk, contextlib.suppress(Crash):
            files.replace_file(path, "new " * 100)
        if how == "power loss":
            disk.lose_power(tmp_path)
        assert path.read_text() in ("old " * 100, "new " * 100)
    assert disk.count < n and path.read_text() == "new " * 100


def shard_of(rank: int, world_size: int) -> tuple[OneRank, dict]:
    """A rank of several, and its shards at step 5: those of ZeRO-3, padded to equal sizes."""
    ranks, values = OneRank(), parameters(5)
    ranks.rank, ranks.world_size, ranks.is_main = rank, world_size, rank == 0
    for p in values.values():
        size = -(-p.ds_numel // world_size)
        for kind, whole in p.local.items():
            padded = torch.cat([whole[: p.ds_numel], torch.zeros(size * world_size - p.ds_numel)])
            p.local[kind] = padded[rank * size : (rank + 1) * size].clone()
    return ranks, values


@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_ranks_reads_what_any_number_wrote_and_every_byte_is_verified(output_dir, writers, readers):
    shutil.rmtree(output_dir, ignore_errors=True)
    temporary, entries = output_dir / "checkpoints" / ".step_00000005.tmp", []
    temporary.mkdir(parents=True)
    for rank in reversed(range(writers)):
        ranks, values = shard_of(rank, writers)
        writer = checkpoint.Writer(values, values, SFTConfig(output_dir=str(output_dir)), ranks)
        writer.memory.wait_until_pinned()
        copied = partial(writer._copied, {p: as_shard(p.local) for p in values.values()})
        entries.append(checkpoint._write_files(temporary, [*writer.files], copied, 1 + rank % 2))
    writer.path = output_dir / "checkpoints" / "step_00000005"
    writer._publish(temporary, json.dumps({"step": 5}), entries)
    manifest, verified = json.loads((writer.path / "manifest.json").read_text()), set()
    for rank in range(readers):
        ranks, values = shard_of(rank, readers)
        empty = {p: {kind: torch.zeros_like(shard) for kind, shard in p.local.items()} for p in values.values()}
        shards = {p: as_shard(local) for p, local in empty.items()}
        with pytest.MonkeyPatch.context() as patch:
            opened: list[str] = []
            seen = partial(lambda opened, path, mode: opened.append(path.name) or open(path, mode), opened)
            patch.setattr(checkpoint, "open", seen, raising=False)
            assert checkpoint._read(writer.path, manifest, values, shards, ranks) is None
        assert len(opened) == len({*opened}), "read more than once"
        verified |= {*opened}
        for p, read in empty.items():
            for kind, values_read in read.items():
                np.testing.assert_array_equal(values_read, p.local[kind])
    assert verified == {*manifest["files"]} - {"state.json"}


# ------------------------------------------------------------------ beside the next steps


def test_a_checkpoint_is_that_of_its_step_whatever_the_next_steps_do_meanwhile(output_dir, monkeypatch):
    """Held before its first file: training goes on, and neither publishes it nor deletes an older one."""
    before, may_write = save(output_dir, 9), threading.Event()
    write = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *args: may_write.wait() and write(*args))
    writer = make_writer(output_dir, 10, keep=1)
    writer.save(RunState(step=10))
    for p in writer.parameters.values():
        for values in p.local.values():
            values.fill_(-1)
    assert writer.vote() == 0
    writer.proceed(0)
    assert find(output_dir)[0] == before and len(names(output_dir)) == 2
    may_write.set()
    writer.wait()
    assert writer.ranks.said == [f"waiting for {writer.path} to be written", f"checkpoint {writer.path}"]
    assert names(output_dir) == ["step_00000010"]
    assert_holds(writer.path, 10)


def raising(error: OSError):
    raise error


def test_it_is_published_once_all_ranks_have_written_theirs_and_not_if_one_has_failed(output_dir, monkeypatch):
    """Rank 0 of three; the votes of the two others are given."""
    for step, votes_of_others in ((9, (0, 1, 2)), (10, (0, 3))):
        writer = make_writer(output_dir, step)
        writer.ranks.world_size = 3
        writer.save(RunState(step=step))
        writer.stage.result()
        assert writer.vote() == 1
        for votes in votes_of_others[:-1]:
            writer.proceed(1 + votes)
        assert writer.publish is not None and f".step_{step:08d}.tmp" in names(output_dir)
        if step == 9:
            writer.proceed(1 + votes_of_others[-1])
            writer.stage.result()
        else:  # the third one's
            error = OSError(errno.EIO, "another rank's")
            monkeypatch.setattr(writer.ranks, "gather", lambda work, error=error: [work(), raising(error)])
            with pytest.raises(OSError, match="another rank's"):
                writer.proceed(1 + votes_of_others[-1])
    assert names(output_dir) == [".step_00000010.tmp", "step_00000009"]


def test_a_failure_of_this_rank_is_enough_for_all_to_look(output_dir, monkeypatch):
    writer = make_writer(output_dir, 10)
    writer.ranks.world_size = 3
    monkeypatch.setattr(checkpoint, "write_file", lambda *_: raising(OSError(errno.EIO, "no")))
    writer.save(RunState(step=10))
    with contextlib.suppress(OSError):
        writer.stage.result()
    assert writer.vote() >= 3
    with pytest.raises(OSError, match="no"):
        writer.proceed(writer.vote())


def test_where_host_memory_has_no_room_for_a_copy_training_waits_and_that_is_said_before(output_dir, monkeypatch):
    monkeypatch.setattr(checkpoint, "available_host_memory", lambda: 4 * 3 * 27)
    writer = make_writer(output_dir, 10)
    assert "Training stands still" in writer.ranks.said[0]
    writer.save(RunState(step=10))
    assert writer.stage is None
    assert_holds(writer.path, 10)


def test_one_checkpoint_may_stay_beyond_the_newest(output_dir):
    save(output_dir, 1, keep=1)
    checkpoint.keep(str(output_dir), {"step": 2})
    for step in (2, 3, 4):
        save(output_dir, step, keep=1)
    assert names(output_dir) == ["kept.json", "step_00000002", "step_00000004"]
    checkpoint.keep(str(output_dir), {"step": 4})
    for step in (5, 6):
        save(output_dir, step, keep=1)
    assert names(output_dir) == ["kept.json", "step_00000004", "step_00000006"]
    checkpoint.clear_after(str(output_dir), 0, "never")  # another run's step 4 is none of this one's
    assert names(output_dir) == []


# ------------------------------------------------------------------ damage


def damage(path: Path, how: str, rng: random.Random):
    data = path.read_bytes()
    place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how != "remove":
        path.write_bytes({"flip": flipped, "cut": data[:place], "grow": data + b"\0"}[how])


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "remove", "pipe", "device"])
def test_damage_to_any_file_is_said_and_the_checkpoint_before_is_used(output_dir, tmp_path, how):
    rng = random.Random(0)
    before, newest = save(output_dir, 9), save(output_dir, 10)
    whole = shutil.copytree(newest, tmp_path / "whole")
    for name in sorted(path.name for path in newest.iterdir() if path.is_file()):
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


def test_a_run_goes_on_before_damaged_checkpoints_as_it_was_planned_if_that_is_its_own(output_dir):
    """Its micro-batches and residency come from the newest one's state, before its bytes are read."""
    for identity in ({}, {"seed": 1}):
        for step, own in ((8, identity), (9, {}), (10, {})):
            writer = make_writer(output_dir, step)
            writer.save(RunState(step=step, samples=4 * step, micro_batch_budget=step, identity=own))
            writer.wait()
            if step > 8:
                damage(next(writer.path.glob("*.exp_avg_*")), "flip", random.Random(0))
        into, state = parameters(0), checkpoint.read_state(writer.path)
        with pytest.raises(UserError, match="step_00000008") if identity else contextlib.nullcontext():
            checkpoint.load(into, into, writer.path, state, "auto", OneRank())
            assert (state.step, state.samples, state.micro_batch_budget) == (8, 32, 10)
        shutil.rmtree(output_dir)


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(output_dir, monkeypatch, error):
    for step in (1, 2):
        save(output_dir, step)
    before = sorted(output_dir.rglob("*"))

    def failing(path, mode):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(checkpoint, "open", failing, raising=False)
    with pytest.raises(OSError, match=r"step_00000002.*_000.safetensors") as told:
        find(output_dir)
    assert explained(told.value).EXIT_CODE == 3 and sorted(output_dir.rglob("*")) == before


def test_what_was_passed_over_is_set_aside_and_never_looked_at_again(output_dir):
    """Deleting is for --resume never, keep_last_n and what begins with a dot."""
    contents = {}
    save(output_dir, 9)
    for attempt in (1, 2):  # a second one of the same step takes no other's place
        folder = save(output_dir, 12)
        (folder / "COMPLETE").write_text(f"damaged {attempt}")
        contents[f"damaged_step_00000012{'' if attempt == 1 else '_2'}"] = f"damaged {attempt}"
        checkpoint.clear_after(str(output_dir), int(find(output_dir)[0].name[5:]), "auto")
    assert names(output_dir) == [*contents, "step_00000009"]
    for name, text in contents.items():
        assert (output_dir / "checkpoints" / name / "COMPLETE").read_text() == text
        assert len(os.listdir(output_dir / "checkpoints" / name)) == len(os.listdir(folder.with_name("step_00000009")))
    save(output_dir, 10, keep=1)
    assert names(output_dir) == [*contents, "step_00000010"]
    checkpoint.clear_after(str(output_dir), 0, "never")
    assert names(output_dir) == [*contents]
    assert find(output_dir) == (None, "")


def test_a_run_that_continues_from_an_earlier_step_leaves_no_later_one_behind(output_dir):
    """Else keep_last_n would delete the new ones, and the next resume would find the abandoned ones."""
    for step in (3, 6, 9):
        folder = save(output_dir, step)
    checkpoint.clear_after(str(output_dir), 3, str(folder.with_name("step_00000003")))
    assert save(output_dir, 4, keep=1) == find(output_dir)[0]
    assert names(output_dir) == ["abandoned_step_00000006", "abandoned_step_00000009", "step_00000004"]


def test_checkpoints_of_which_none_is_whole_are_no_fresh_start(output_dir, monkeypatch):
    """As where a copy was cut short, or where one host does not see the folder."""
    for step in (3, 6):
        (save(output_dir, step) / "COMPLETE").unlink()
    before = sorted(output_dir.rglob("*"))
    with pytest.raises(UserError, match=f"--output_dir {output_dir}: .*COMPLETE.*--resume never"):
        find(output_dir)
    assert sorted(output_dir.rglob("*")) == before and find(output_dir, "never") == (None, "")
    ranks = OneRank()
    views = iter([[None, "COMPLETE is missing"], [None, None]])  # rank 1 does not see the newest
    ranks.gather = lambda work: next(views)
    with pytest.raises(UserError, match="rank 1"):
        checkpoint.find(str(output_dir), "auto", ranks)


def test_a_checkpoint_under_the_name_of_another_step_is_refused_by_name(output_dir):
    folder = save(output_dir, 9).rename(output_dir / "checkpoints" / "step_00000012")
    assert checkpoint.find(str(output_dir), "auto", OneRank()) == folder
    with pytest.raises(UserError, match=r"step_00000012 .*step 9"):
        checkpoint.read_state(folder)


def test_a_path_to_resume_from_is_a_checkpoint_of_this_folder(output_dir, tmp_path):
    path, other = save(output_dir, 1), save(tmp_path / "other", 1)
    os.symlink(output_dir, tmp_path / "link")
    for name in (str(path), str(tmp_path / "link" / "checkpoints" / path.name), os.path.relpath(path)):
        assert find(output_dir, name)[0] == path
    for name in ("AUTO", str(path / "manifest.json"), "checkpoints/step_2", str(other), str(tmp_path)):
        with pytest.raises(UserError, match=f"--resume {name}: .*--output_dir {output_dir}"):
            find(output_dir, name)


# ------------------------------------------------------------------ disk


def test_space_for_checkpoints_and_export_is_what_they_take_and_what_is_replaced_is_free(output_dir, monkeypatch):
    """What was set aside is not."""
    folder = save(output_dir, 9)
    shutil.copytree(folder, folder.with_name("damaged_step_00000012"))
    taken = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    config, schedule = SFTConfig(output_dir=str(output_dir)), SimpleNamespace(last_step=9, save_every=1, keeps_end=0)
    for numel, is_enough in ((taken + 5) // 50, True), ((taken + 5) // 50 + 1, False):
        said = disk.need(config, numel, schedule)
        assert "4 checkpoints and 1 exported" in said and said.endswith(disk.SHORT) != is_enough
