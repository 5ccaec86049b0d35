"""Hosts that would train different things train nothing: pytest tests/test_agreement.py"""

import json
import os
import shutil
from types import SimpleNamespace

import launch
import pytest
from models import OneRank

from common.config import SFTConfig
from common.run import agreement


def on_two_hosts(logs: str, script: str, words: list[str], others: list[str], port: int) -> None:
    """In a rank's process: each rank is a host of its own, and the second one has `others` as well."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch.run_script(logs, script, words + others * (os.environ["RANK"] == "1"), {})


@pytest.fixture
def run(tiny_llama, sft_data, tmp_path):
    """run(flags that the second host has besides, those of both): a finished run of one step."""

    def start(*others, script="train_sft", **changes):
        flags = launch.flags(tiny_llama, sft_data, tmp_path, **{"max_train_steps": 1} | changes)
        arguments = (script, launch.argv(flags), [str(word) for word in others], launch.free_port())
        return launch.Run(on_two_hosts, 2, arguments, tmp_path / "output").wait()

    return start


def test_hosts_that_see_other_checkpoints_train_nothing_and_move_nothing(run, tmp_path):
    """An older copy of the folder, without its newest checkpoint, or with that of another run."""
    output_dir, older = tmp_path / "output", tmp_path / "older"
    run(stop_after_steps=2, checkpointing_steps=1, max_train_steps=3).succeeded()
    newest = older / "checkpoints" / "step_00000002"
    shutil.copytree(output_dir, older)
    (older / ".lock").unlink()
    (older / ".lock").symlink_to(output_dir / ".lock")
    for change in (lambda: (newest / "COMPLETE").write_text("another's"), lambda: shutil.rmtree(newest)):
        change()
        for folder in (output_dir, older):
            (folder / "logs").mkdir(exist_ok=True)
        before = [sorted(folder.rglob("step*")) for folder in (output_dir, older)]
        error = run("--output_dir", older, max_train_steps=3).refused(2)
        assert "rank 1" in error and newest.name in error and "step_00000001" not in error
        assert [sorted(folder.rglob("step*")) for folder in (output_dir, older)] == before


def copied(folder, source):
    """A copy of a model's folder or of a data file."""
    copy = folder / f"of the second host {source.name}"
    (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    return copy


# Without the agreement on what is asked for, ranks would wait for one another in different places.
ASKED = {"eval_holdout": "2", "resume": "never", "learning_rate": "1e-3"}
COPIED = {  # flag -> what is copied, the file of it that is changed, and how
    "dataset_mixer": ("sft_data", "", lambda data: data.partition(b"\n")[2]),
    "eval_dataset_mixer": ("sft_data", "", lambda data: data),
    "model_name_or_path": ("tiny_llama", "model.safetensors", lambda data: data[:-1] + b"\x01"),
    "tokenizer_name_or_path": ("tiny_llama", "tokenizer_config.json", lambda data: data + b" "),
    "ref_model_name_or_path": ("tiny_llama", "model.safetensors", lambda data: data[:-1] + b"\x01"),
}
OF_BOTH = {"ref_model_name_or_path": ("train_dpo", "dpo_data"), "tokenizer_name_or_path": ("train_sft", "sft_data")}


@pytest.mark.parametrize("what", [*ASKED, *COPIED])
def test_a_host_that_differs_is_named_with_what_differs_before_anything_is_trained(run, request, tmp_path, what):
    """In one value, one row, one bit of a weight of a file of the same size that only that host has."""
    value, both = ASKED.get(what), {}
    if what in COPIED:
        source, name, edit = COPIED[what]
        value = copied(tmp_path, request.getfixturevalue(source))
        (value / name).write_bytes(edit((value / name).read_bytes()))
    if what in OF_BOTH:
        script, data = OF_BOTH[what]
        both = {"script": script, "dataset_mixer": request.getfixturevalue(data)}
        both[what] = request.getfixturevalue("tiny_llama")
    error = run(f"--{what}", value, **both).refused(2)
    assert "rank 1" in error and what.removesuffix("_name_or_path") in error
    assert not (tmp_path / "output" / "metrics.jsonl").exists()


def test_hosts_with_copies_of_the_same_files_agree_and_the_record_says_so(run, tiny_llama, sft_data, tmp_path):
    model, data = copied(tmp_path, tiny_llama), copied(tmp_path, sft_data)
    run("--model_name_or_path", model, "--dataset_mixer", data).succeeded()
    assert json.loads((tmp_path / "output" / "run_config.json").read_text())["result"]["rank_agreement"] is True


def test_clocks_that_are_far_apart_are_warned_of_by_host():
    assert agreement.clocks_apart({"a": 100.0, "b": 104.9}) == agreement.clocks_apart({"a": 100.0}) == ""
    warning = agreement.clocks_apart({"a": 1000.0, "b": 1003.0, "c": 990.0})
    assert "clock of b is 13 s ahead of that of c" in warning


def test_the_kernel_that_was_chosen_is_compared_and_is_no_part_of_which_run_it_is(monkeypatch, tmp_path):
    views, of = [], (SFTConfig(), {}, str(tmp_path), {})
    monkeypatch.setattr(agreement, "require_agreement", lambda view, ranks: views.append(view()))
    one, other = (agreement.agreed_identity(*of, kernel, OneRank()) for kernel in ("varlen", "sdpa"))
    assert one == other and len(agreement.differences(*views)) == 1


OTHERS = {  # what differs -> of the module agreement: what is patched, and how
    "version of torch": ("version", lambda package: "9" if package == "torch" else "1"),
    "python": ("platform", SimpleNamespace(python_version=lambda: "3.99")),
    "this project's code": ("file_digest", lambda path: "other" if path.name == "ranks.py" else "same"),
    "ds_config (contents)": None,
    "NVIDIA_TF32_OVERRIDE": ("os", SimpleNamespace(environ={"NVIDIA_TF32_OVERRIDE": "0"})),
    "version of flash-attn": ("version", lambda package: "2.8.3" if package == "flash-attn" else "1"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_host_runs_is_compared(monkeypatch, what):
    ds_config = {"zero_optimization": {"stage": 3}}
    before = agreement.environment(SFTConfig(), ds_config)
    assert agreement.environment(SFTConfig(), ds_config) == before
    if OTHERS[what] is None:
        ds_config = {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    else:
        monkeypatch.setattr(agreement, *OTHERS[what])
    after = agreement.environment(SFTConfig(), ds_config)
    assert any(found.startswith(what) for found in agreement.differences(before, after))
