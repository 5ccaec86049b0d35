"""Kill it anywhere, run the same command, get the same model, on any number of ranks.

    python -m pytest tests/test_resume.py                 two kills a method, of three kinds
    python -m pytest tests/test_resume.py -m soak         thirty-two, and of runs that are killed again and again

Real runs of both scripts: float32, 2 CPU processes, 12 steps of a tiny model, a checkpoint every 3. Every rerun
has to end with the metrics (all but times, speeds and memory) and the weights of the run that nothing stopped.
"""

import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import launch
import models
import numpy as np
import pytest
import torch
from faults import Disk
from safetensors.numpy import load_file
from safetensors.torch import save_file
from test_model import settings_of
from test_ranks import check_that_nothing_listens_beyond_this_host

import train_sft
from common import files
from common import ranks as distributed
from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError
from common.files import replace_file
from common.model import export as model_export
from common.model import load as model
from common.run.metrics import MetricsFile
from common.run.output_dir import read_run_config
from common.verbs import export, verify
from common.zero import checkpoint, residency
from common.zero.checkpoint import _write_files as write_files
from common.zero.ds_config import deepspeed_config
from common.zero.engine import build_engine

LAST_STEP = 12
NUM_OPERATIONS = (375, 275)  # about as many changes to the disk as rank 0 and rank 1 make
TIMES = {"step_seconds", "tokens_per_second", "per_device_tps", "max_memory_gb", "mfu"}
both = pytest.mark.parametrize("method", ["sft", "dpo"])


class Setting:
    """A model and data for both methods, one cache, and the uninterrupted run of each."""

    def __init__(self, root: Path, model: Path, data: dict[str, Path]):
        self.root, self.model, self.data = root, model, data
        placement = json.loads((launch.REPO / "ds_configs" / "zero3.json").read_text()) | {"residency": "nothing"}
        placement["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        # As of a large model: nothing stays whole between its uses.
        self.released = models.write_jsonl(root / "released.json", [placement])
        self.uninterrupted = {}
        self.numbers = itertools.count(1)

    def flags(self, method: str, output_dir: Path, **changes) -> dict:
        """10 samples, 4 a step: an epoch is 3 steps, the last of 2 samples. SFT keeps all whole, DPO nothing."""
        own = {"global_batch_size": 4, "num_train_epochs": 4, "learning_rate": 1e-3, "checkpointing_steps": 3}
        own |= {"keep_last_n_checkpoints": 2, "max_tokens_per_micro_batch": 300, "output_dir": output_dir}
        own["ds_config"] = self.released if method == "dpo" else "ds_configs/zero3.json"
        return launch.flags(self.model, self.data[method], self.root, **own | changes)

    def folder(self) -> Path:
        return self.root / f"run_{next(self.numbers)}"

    def start(self, method: str, output_dir: Path, num_ranks: int = 2, patches=None, **changes) -> launch.Run:
        return launch.start(f"train_{method}", self.flags(method, output_dir, **changes), num_ranks, patches)

    def run(self, method: str, output_dir: Path, num_ranks: int = 2, patches=None, **changes) -> launch.Finished:
        return self.start(method, output_dir, num_ranks, patches, **changes).wait()

    def whole(self, method: str) -> launch.Finished:
        """The run that nothing stops, its checkpoints at the ends of its epochs."""
        if method not in self.uninterrupted:
            done = self.run(method, self.root / f"whole_{method}", checkpointing_steps="epoch").succeeded()
            self.uninterrupted[method] = done
        return self.uninterrupted[method]

    def copy_of_whole(self, method: str) -> Path:
        """Its folder as it was after its last step: the checkpoints of steps 9 and 12, no model yet."""
        output_dir = self.folder()
        shutil.copytree(self.whole(method).output_dir, output_dir)
        for path in [*output_dir.glob("model*"), output_dir / "config.json"]:
            path.unlink()
        record = json.loads((output_dir / "run_config.json").read_text())
        del record["result"]
        (output_dir / "run_config.json").write_text(json.dumps(record))
        return output_dir


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_llama, sft_data, dpo_data) -> Setting:
    return Setting(tmp_path_factory.mktemp("resume"), tiny_llama, {"sft": sft_data, "dpo": dpo_data})


def checkpoints(output_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in output_dir.glob("checkpoints/step_*"))


def weights(output_dir: Path) -> dict[str, np.ndarray]:
    return {name: array for file in output_dir.glob("model*.safetensors") for name, array in load_file(file).items()}


def without_times(metrics: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in metrics]


def assert_same_run(done: launch.Finished, whole: launch.Finished) -> None:
    """Bitwise: every metric but times, every weight."""
    assert without_times(done.metrics) == without_times(whole.metrics)
    assert_same_weights(done.output_dir, whole.output_dir)
    assert not [path for path in (done.output_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    assert json.loads((done.output_dir / "run_config.json").read_text())["result"]["steps"] == LAST_STEP


def assert_same_weights(one: Path, other: Path) -> None:
    theirs = weights(other)
    assert theirs
    np.testing.assert_equal(weights(one), theirs)


def steps_run(stdout: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", stdout, re.MULTILINE)]


def assert_continued(done: launch.Finished, step: int) -> None:
    """It began after `step`, and ran the others once each."""
    assert steps_run(done.stdout) == list(range(step + 1, LAST_STEP + 1))
    assert (f"resuming after step {step} from" in done.stdout) == (step > 0)


# ------------------------------------------------------------------ kill -9


def rerun_until_done(setting: Setting, method: str, output_dir: Path, whole: launch.Finished) -> None:
    """The same command again; it must go on from the newest checkpoint and end as `whole` did."""
    stands = max(checkpoints(output_dir), default=0)
    was_finished = "result" in read_run_config(str(output_dir))
    done = setting.run(method, output_dir).succeeded()
    if was_finished:
        assert "nothing to do" in done.stdout
    else:
        assert_continued(done, stands)
    assert_same_run(done, whole)


def end_as_a_launcher_does(run: launch.Run) -> None:
    """When a rank has died, the others are ended."""
    while all(process.is_alive() for process in run.processes):
        time.sleep(0.002)
    time.sleep(random.choice((0, 0.05, 1)))
    run.kill()
    run.wait(timeout=60)


def kill_some(run: launch.Run, rng: random.Random) -> None:
    """SIGKILL to one rank, or to all."""
    for process in rng.choice([run.processes, run.processes[:1], run.processes[1:]]):
        process.kill()
    end_as_a_launcher_does(run)


def kill_at_a_moment(setting: Setting, method: str, rng: random.Random, times: int = 1) -> None:
    """At any time between the first step and the end, one rank or all; of several times each rerun is killed too."""
    whole, output_dir = setting.whole(method), setting.folder()
    for _ in range(times):
        run = setting.start(method, output_dir)
        run.wait_for("\nstep ")
        time.sleep(rng.uniform(0, 1.2 * sum(whole.column("step_seconds")) / times + 0.3))
        kill_some(run, rng)
    rerun_until_done(setting, method, output_dir, whole)


def kill_in_a_file_operation(setting: Setting, method: str, rng: random.Random) -> None:
    """A rank dies by its own hand between two changes to the disk: in a save, a rename, a delete, the export."""
    whole, output_dir = setting.whole(method), setting.folder()
    flags = launch.argv(setting.flags(method, output_dir))
    rank = rng.randrange(2)
    operation = rng.randrange(1, NUM_OPERATIONS[rank])
    print(f"rank {rank} dies at its file operation {operation}")
    run = launch.Run(dying_rank, 2, (f"train_{method}", flags, rank, operation), output_dir)
    end_as_a_launcher_does(run)
    rerun_until_done(setting, method, output_dir, whole)


WRITE_FILES = "common.zero.checkpoint._write_files"


def written_slowly(*arguments) -> dict:
    time.sleep(1)
    return write_files(*arguments)


def kill_beside_a_write(setting: Setting, method: str, rng: random.Random) -> None:
    """While the files of a checkpoint are on their way and steps go on, one rank or all."""
    whole, output_dir = setting.whole(method), setting.folder()
    run = setting.start(method, output_dir, patches={WRITE_FILES: written_slowly})
    run.wait_for(f"\nstep {rng.choice((4, 7, 10))}/")
    time.sleep(rng.uniform(0, 1.2))
    kill_some(run, rng)
    rerun_until_done(setting, method, output_dir, whole)


def dying_rank(logs: str, script: str, words: list[str], rank: int, operation: int) -> None:
    """In a rank's process: `rank` gets SIGKILL at its n-th change to the disk once it has an engine."""
    real = checkpoint.clear_after
    if int(os.environ["RANK"]) == rank:
        end = partial(os.kill, os.getpid(), signal.SIGKILL)
        disk = Disk(pytest.MonkeyPatch(), [checkpoint, model_export, files], operation, end)
        if rank == 0:  # who makes way in the folder
            checkpoint.clear_after = lambda *arguments: (real(*arguments), disk.__enter__())[0]
        else:
            disk.__enter__()
    launch.run_script(logs, script, words, {})


@both
def test_a_killed_run_ends_as_if_nothing_had_happened(setting, method):
    """A new seed every day, shown where it fails."""
    seed = int(time.time()) // 86400
    print(f"seed {seed} {method}")
    rng = random.Random(f"{seed} {method}")
    for kill in (kill_in_a_file_operation, kill_at_a_moment if method == "sft" else kill_beside_a_write):
        kill(setting, method, rng)


@pytest.mark.soak
@both
@pytest.mark.parametrize("number", range(16))
def test_killed_at_a_random_moment(setting, method, number):
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    again_and_again = partial(kill_at_a_moment, times=8)
    kills = kill_at_a_moment, kill_in_a_file_operation, kill_beside_a_write, again_and_again
    kills[number % 4](setting, method, rng)


# ------------------------------------------------------------------ other numbers of ranks


# (ranks, flag, tokens of a micro-batch): kept at as many ranks, or a resume by another `auto` would not be bitwise.
PARTS = {"sft": [(2, 300, 300), (2, "auto", 300), (1, "auto", 4096)], "dpo": [(n, 300, 300) for n in (2, 1, 4, 3)]}


@both
def test_2_then_1_then_4_then_3_ranks_are_one_curve(setting, method):
    parts = PARTS[method]
    whole, output_dir, size = setting.whole(method), setting.folder(), LAST_STEP // len(parts)
    for i, (num_ranks, flag, budget) in enumerate(parts):
        flags = {"max_tokens_per_micro_batch": flag, "stop_after_steps": size * (i + 1)}
        done = setting.run(method, output_dir, num_ranks, **flags).succeeded()
        assert steps_run(done.stdout) == list(range(size * i + 1, size * (i + 1) + 1))
        assert json.loads((output_dir / "run_config.json").read_text())["micro_batch_budget"] == budget
    exact = dict.fromkeys(("step", "samples", "target_tokens", "epoch", "learning_rate"), 0)
    for name, tolerance in (exact | {"train_loss": 1e-5, "grad_norm": 1e-4}).items():
        np.testing.assert_allclose(done.column(name), whole.column(name), rtol=0, atol=tolerance, err_msg=name)
    theirs = weights(whole.output_dir)
    for name, values in weights(output_dir).items():
        np.testing.assert_allclose(values, theirs[name], atol=2e-5, err_msg=name)


def engine_of(config: SFTConfig | DPOConfig, **placement) -> tuple:
    """In a rank's process: the group, the model of the config's folder, and its engine."""
    ranks, ds_config = distributed.start(5), deepspeed_config(config) | placement
    folder, dtype = str(config.model_name_or_path), getattr(torch, config.dtype)
    policy = model.load_partitioned(folder, model.load_config(folder), dtype, "sdpa", ds_config, ranks)
    return ranks, policy, build_engine(policy, config, ds_config)


def engine_states(script: str, words: list[str], checkpoint_path: str, stays_whole: str) -> dict[str, torch.Tensor]:
    """In a rank's process: what a loaded engine holds, whole; of float32 through DeepSpeed's own reading of it, which
    knows no other master weights."""
    config = parse_config(SFTConfig if script == "train_sft" else DPOConfig, words)
    ranks, policy, built = engine_of(config, residency=stays_whole)
    parameters = dict(policy.lm.named_parameters())
    checkpoint.load(built, parameters, Path(checkpoint_path), checkpoint.RunState(step=9), "auto", ranks)
    policy.finish_gathering()
    states, read = {}, deepspeed.utils.safe_get_full_optimizer_state
    shards = residency.state_shards(built)
    for name, param in parameters.items():
        for kind in checkpoint.KINDS:
            if config.dtype == "float32":
                whole = deepspeed.utils.safe_get_full_fp32_param(param) if kind == "master" else read(param, kind)
            else:
                parts = ranks.gather(lambda shard=shards[param], kind=kind: shard.read(kind, 0, len(shard.weight)))
                whole = torch.cat(parts)[: param.ds_numel].view(param.ds_shape)
            states[f"{kind}/{name}"] = whole.clone()
        with deepspeed.zero.GatheredParameters([param]):
            states[f"model/{name}"] = param.detach().clone()
    steps = {float(state["step"]) for state in built.optimizer.optimizer.state.values()}
    return {name: values.float().numpy() for name, values in states.items()} | {"steps": steps}


READERS = [("dpo", 2, "bfloat16", "nothing"), ("sft", 5, "float32", "nothing")]
READERS += [("dpo", 3, "float32", "all"), ("sft", 1, "bfloat16", "gradients")]


@pytest.mark.parametrize(("method", "num_ranks", "dtype", "residency"), READERS)
def test_every_number_of_ranks_reads_the_same_masters_and_moments(setting, method, num_ranks, dtype, residency):
    """Written by 2. The expected arrays are put together from the files by the names they bear, with numpy alone."""
    folder = setting.whole(method).output_dir / "checkpoints" / "step_00000009"
    by_rank = [{}, {}]
    for file in folder.glob("*.safetensors"):
        by_rank[int(file.name[5:10])] |= load_file(file)
    shapes = json.loads((folder / "manifest.json").read_text())["parameters"]
    whole = {key: np.concatenate([by_rank[0][key], by_rank[1][key]]) for key in by_rank[0]}
    words = launch.argv(setting.flags(method, setting.folder(), dtype=dtype))
    for held in launch.on_ranks(engine_states, num_ranks, f"train_{method}", words, str(folder), residency):
        assert held.pop("steps") == {9.0}
        assert len(held) == 4 * len(shapes)
        for key, values in held.items():
            kind, _, name = key.partition("/")
            expected = whole[f"master/{name}" if kind == "model" else key].reshape(shapes[name])
            if kind == "model":
                expected = torch.from_numpy(expected).to(getattr(torch, dtype)).float().numpy()
            np.testing.assert_array_equal(values, expected, err_msg=key)
        assert any(np.abs(values).max() > 0 for key, values in held.items() if key.startswith("exp_avg_sq"))


def with_nan_in_fresh_memory(logs: str, script: str, words: list[str]) -> None:
    """In a rank's process: whoever reads what nobody has set is found out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    launch.run_script(logs, script, words, {})


PLACES = {"sft": [(3, "nothing", 1.0), (2, "all", 0.5), (5, "gradients", 1.0)]}
PLACES |= {"dpo": [(2, "gradients", 0.5), (3, "all", 1.0), (1, "nothing", 0.5)]}


@both
def test_memory_that_nobody_has_set_comes_into_no_step_checkpoint_resume_or_export(setting, method):
    """Of sizes that no number of ranks divides, and scalars; PLACES: ranks, residency, share of the state on the
    device, of one run's parts."""
    folder, output_dir = models.make_model(setting.folder(), "apertus", intermediate_size=49), setting.folder()
    for i, (num_ranks, stays_whole, share) in enumerate(PLACES[method]):
        placement = json.loads(setting.released.read_text()) | {"residency": stays_whole, "optimizer_state": share}
        models.write_jsonl(setting.root / "placement.json", [placement])
        changes = {"model_name_or_path": folder, "ds_config": setting.root / "placement.json", "checkpointing_steps": 1}
        changes |= {"stop_after_steps": 2 * i + 2, "export_at_checkpoints": "true"}
        words = launch.argv(setting.flags(method, output_dir, **changes))
        done = launch.Run(with_nan_in_fresh_memory, num_ranks, (f"train_{method}", words), output_dir).wait()
        assert steps_run(done.succeeded().stdout) == [2 * i + 1, 2 * i + 2]
        tensors = [(file, tensor) for file in output_dir.rglob("*.safetensors") for tensor in load_file(file).values()]
        assert len({file.parent for file, _ in tensors}) == 7, "two checkpoints, their settings and models, the run"
        assert [file for file, tensor in tensors if not np.isfinite(tensor).all()] == []
    assert np.isfinite([done.column(name) for name in ("train_loss", "grad_norm")]).all()


# ------------------------------------------------------------------ the model of a checkpoint, and an auditor's look


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def exported_both_ways(root: str, words: list[str]) -> list[dict[str, bytes]]:
    """In a rank's process: the files that a run exports, and those of its checkpoint of the same step."""
    checkpoint.SHARD_FILE_BYTES = 4_000
    settings = parse_config(SFTConfig, words)
    ranks, policy, built = engine_of(settings, residency="all", optimizer_state=0.5)
    folder = str(settings.model_name_or_path)
    residency.set_step(built, 7)
    torch.manual_seed(ranks.rank)
    for shard in residency.state_shards(built).values():
        master = shard.read("master", 0, len(shard.master)).cpu()
        shard.write("master", 0, master + 0.01 * torch.randn_like(master))  # no bfloat16 any more
    residency.round_master_weights(built)
    writer = checkpoint.Writer(built, dict(policy.lm.named_parameters()), settings, ranks)
    ranks.once(lambda: writer.folder.mkdir(parents=True))
    writer.settings = ranks.once(lambda: settings_of(policy.lm, folder))
    writer.save(checkpoint.RunState(step=7))
    writer.wait()
    model_export.export_model(policy, settings.output_dir, writer.settings, ranks)
    return [files_of(path) for path in (Path(settings.output_dir), writer.path / "model")]


EXPORTED = [("apertus", "float32", 3), ("gpt_neox", "bfloat16", 1)]
EXPORTED += [(name, "bfloat16", 2) for name in ("qwen2", "mixtral", "gemma3")]


@pytest.mark.parametrize(("architecture", "dtype", "num_ranks"), EXPORTED)
def test_an_export_of_a_checkpoint_is_the_runs_own_byte_for_byte(setting, architecture, dtype, num_ranks):
    """With tied weights, buffers, several files of the export or one, and files of a rank."""
    root = setting.folder()
    shard = "1GB" if num_ranks == 3 else "10KB"
    folder = models.make_model(root / "model", architecture, getattr(torch, dtype), shard=shard)
    changes = {"model_name_or_path": folder, "dtype": dtype, "export_at_checkpoints": "true"}
    words = launch.argv(setting.flags("sft", root / "output", **changes))
    own, ours = launch.on_ranks(exported_both_ways, num_ranks, str(root), words)[0]
    assert own == ours
    assert len([name for name in own if name.endswith(".safetensors")]) in ((1,) if num_ranks == 3 else range(3, 99))


def forked(words: list[str]) -> SimpleNamespace:
    """start_run without a launcher: it gives what has ended."""
    done = launch.Run(launch.run_script, int(words[1]), (f"train_{words[0]}", words[2:], {})).wait()
    return SimpleNamespace(stdout=done.stdout.splitlines(True), wait=lambda: max(done.exit_codes), send_signal=None)


@both
def test_export_and_verify_take_what_a_run_leaves(setting, method, capfd, monkeypatch):
    """The model of the last step; step 11 again, of 2 ranks, from step 9: what differs is told, and that nothing is."""
    output_dir, out = setting.copy_of_whole(method), setting.folder()
    folder = output_dir / "checkpoints" / "step_00000012"
    models.write_jsonl((out / ".export").mkdir(parents=True) or out / ".export" / "torn", [{}])  # one was cut off
    models.write_jsonl(out / "config.json", [{}])
    assert export.main(str(folder), str(out)) == 0
    theirs = files_of(setting.whole(method).output_dir)
    assert {name: theirs[name] for name in files_of(out)} == files_of(out)
    assert {name for name in theirs if name.startswith("model")} <= {*files_of(out)}
    with pytest.raises(UserError, match=str(out)):
        export.main(str(folder), str(out))  # a second time: it is not empty
    with pytest.raises(UserError, match=str(out / "config.json")):
        export.main(str(folder), str(out / "config.json"))
    monkeypatch.setattr(verify, "start_run", forked)
    if method == "sft":  # another one in the record
        metrics = (output_dir / "metrics.jsonl").read_text()
        (output_dir / "metrics.jsonl").write_text(metrics.replace('"grad_norm": ', '"grad_norm": 1'))
    before = sorted(output_dir.rglob("*"))
    assert verify.main(str(output_dir), "--step", "11") == (method == "sft"), capfd.readouterr()
    *_, differing, said = capfd.readouterr().out.splitlines()
    told = ("1 of ",) if method == "sft" else ("bit by bit", "train_loss", "grad_norm", "total_tokens")
    assert all(text in said for text in told) and ("grad_norm was 1" in differing) == (method == "sft")
    assert sorted(output_dir.rglob("*")) == before
    file = next(folder.glob("*exp_avg_sq*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert verify.main(str(output_dir)) == 1 and file.name in capfd.readouterr().out
    with pytest.raises(UserError, match=str(folder)):
        (folder / "COMPLETE").unlink()
        export.main(str(folder), str(setting.folder()))


@pytest.mark.parametrize("whose", ["the run's", "its evaluation's"])
def test_verify_says_that_reference_logps_are_gone_and_not_that_values_differ(setting, monkeypatch, whose):
    """Computed again they would be others in their last bits: a step is compared only where they are the very ones."""
    output_dir = setting.copy_of_whole("dpo")
    record = read_run_config(str(output_dir))
    folder, names = Path(record["reference_cache"]), record["reference_parts"]
    assert sorted(i for name in names for i in load_file(folder / name)["pairs"].tolist()) == [*range(10)]
    gone = {"reference_cache": str(folder), "reference_parts": [*names, "part_gone.safetensors"]}
    record |= gone if whose == "the run's" else {"evaluation": gone}
    (output_dir / "run_config.json").write_text(json.dumps(record))
    logged = [row | ({"eval/loss": 0.5} if row["step"] > 4 else {}) for row in setting.whole("dpo").metrics]
    models.write_jsonl(output_dir / "metrics.jsonl", logged)
    ran = SimpleNamespace(stdout=[], wait=lambda: 7, send_signal=None)
    monkeypatch.setattr(verify, "start_run", lambda words: ran)
    with pytest.raises(UserError, match=r"--step 11: .*part_gone"):
        verify.main(str(output_dir), "--step", "11")
    if whose != "the run's":
        assert verify.main(str(output_dir), "--step", "4") == 7, "a step without an evaluation needs none of its own"


# ------------------------------------------------------------------ the same command, and others


def test_resume_auto_never_and_a_path(setting):
    """The newest one damaged: the one before it goes on, with other flags that are free to differ."""
    whole, output_dir = setting.whole("dpo"), setting.copy_of_whole("dpo")
    folder = output_dir / "checkpoints"
    file = folder / "step_00000012" / "rank_00001_of_00002.master_000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    changes = {"logging_steps": 2, "checkpointing_steps": 50, "collective_timeout_minutes": 5}
    done = setting.run("dpo", output_dir, **changes).succeeded()
    assert f"{file.parent} is not whole" in done.stdout and "--checkpointing_steps 50" in done.stdout
    assert "resuming after step 9 from" in done.stdout
    assert done.column("step") == [*range(1, 11), 12]
    assert_same_weights(output_dir, whole.output_dir)
    assert (folder / "damaged_step_00000012" / file.name).read_bytes().endswith(b"\x7f"), "set aside, not deleted"
    assert "learning_rate" in setting.run("dpo", output_dir, learning_rate=2e-3).refused(2)

    # From a path, though a later checkpoint is there.
    output_dir = setting.copy_of_whole("dpo")
    path = output_dir / "checkpoints" / "step_00000009"
    done = setting.run("dpo", output_dir, resume=os.path.relpath(path, launch.REPO)).succeeded()
    assert_continued(done, 9)
    assert_same_run(done, whole)
    assert checkpoints(output_dir) == [9, 12] and (output_dir / "checkpoints" / "abandoned_step_00000012").is_dir()

    changes = {"stop_after_steps": 1, "clean_checkpoints_at_end": "true", "checkpointing_steps": 1}
    done = setting.run("dpo", output_dir, resume="never", **changes).succeeded()
    assert steps_run(done.stdout) == done.column("step") == [1]
    assert checkpoints(output_dir) == []


# ------------------------------------------------------------------ stops


STOPS = [("sft", signal.SIGTERM, slice(1, 2), 143, 4), ("dpo", signal.SIGINT, slice(2), 130, 1)]


@pytest.mark.parametrize(("method", "number", "asked", "code", "after"), STOPS)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(setting, method, number, asked, code, after):
    """To one while the checkpoint of step 3 is on its way, which is waited for; to all, as a terminal's Ctrl-C."""
    whole, output_dir = setting.whole(method), setting.folder()
    run = setting.start(method, output_dir, patches={WRITE_FILES: written_slowly})
    run.wait_for(f"\nstep {after}/")
    for process in run.processes[asked]:
        os.kill(process.pid, number)
    done = run.wait()
    assert done.exit_codes == [code, code] and "Traceback" not in done.stderr
    stopped_after = steps_run(done.stdout)[-1]
    assert stopped_after < LAST_STEP
    assert checkpoints(output_dir) == sorted({*range(3, stopped_after, 3), stopped_after})[-2:]
    assert f"waiting for {output_dir}/checkpoints/step_" in done.stdout
    assert done.stdout.index("asked to stop") < done.stdout.index(f"/checkpoints/step_{stopped_after:08d}\n")
    done = setting.run(method, output_dir).succeeded()
    assert_continued(done, stopped_after)
    assert_same_run(done, whole)


def slow_save(*_) -> None:
    print("saving", flush=True)
    time.sleep(60)


def test_a_signal_before_the_first_step_ends_the_run_without_a_traceback(setting):
    run = setting.start("sft", setting.folder(), patches={"common.model.load.load_partitioned": slow_save})
    assert run.wait_for("saving")
    for process in run.processes:
        os.kill(process.pid, signal.SIGINT)
    done = run.wait(timeout=60)
    assert done.exit_codes == [-signal.SIGINT] * 2 and "Traceback" not in done.stderr


def test_under_the_real_launcher_the_ranks_code_comes_through(setting):
    """And what its 30 s mean is said before step 1; and nothing listens beyond this host."""
    output_dir = setting.folder()
    flags = setting.flags("sft", output_dir, num_train_epochs=400)
    command, environment = launch.launcher_command("train_sft", flags, 2)
    environment.pop("PLAINTUNE_RUN_SH", None)
    log = setting.root / "real_launcher"
    with open(log, "w") as out:
        pipes = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        launcher = subprocess.Popen(command, cwd=launch.REPO, env=environment, **pipes)
    try:
        deadline = time.monotonic() + 200
        while "\nstep 2/" not in log.read_text() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        _, second = re.findall(r"process (\d+) spawned", log.read_text())
        check_that_nothing_listens_beyond_this_host(launcher.pid)
        os.kill(int(second), signal.SIGTERM)
        assert launcher.wait(timeout=120) == 143
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = log.read_text()
    assert text.index("this launcher gives a checkpoint 30 s") < text.index("\nstep 1/")
    assert "Traceback" not in text
    assert checkpoints(output_dir)[-1] == steps_run(text)[-1]


# ------------------------------------------------------------------ disks: exit 3, one line that names the file


def written_by_one_rank(folder: Path, *arguments) -> dict:
    """From step 6's checkpoint on, the system refuses rank 1 larger files."""
    if "step_00000006" in folder.name and os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return write_files(folder, *arguments)


def save_where_no_file_may_be_large(tensors, path, metadata) -> None:
    """safetensors' own, with a limit on the size of files in the place of a full disk."""
    if ".export" in str(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save_file(tensors, path, metadata)


class Full(MetricsFile):
    """metrics.jsonl on a disk that is full from step 5 on, after the first half of its record."""

    def append(self, record):
        if record["step"] == 5 and self.ranks.is_main:
            self.file.write(json.dumps(record)[:50])
            self.file.close()
            self.file = open("/dev/full", "a")
        super().append(record)


def no_space(*path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *map(str, path))


class NotFlushed(MetricsFile):
    """Every record is written; before step 6's checkpoint the system cannot bring them to the disk."""

    def flush_to_disk(self):
        if self.last["step"] == 6:
            os.fsync = lambda _: no_space()
        super().flush_to_disk()


def refusing(name: str, path: Path, data) -> None:
    """replace_file, but for a file of this name."""
    no_space(path) if path.name == name else replace_file(path, data)


METRICS, MODEL = "common.run.output_dir.MetricsFile", ".export/model.safetensors"
OF_RANK_1 = r"checkpoints/\.step_00000006\.tmp/rank_00001_of_00002\..*"


NOT_WRITTEN = [
    ("sft", {METRICS: Full}, "metrics.jsonl", 5, None),  # step 3's may have been in flight
    ("dpo", {METRICS: NotFlushed}, "metrics.jsonl", 6, [3]),
    ("dpo", {WRITE_FILES: written_by_one_rank}, OF_RANK_1, None, [3]),
    ("sft", {"common.run.metrics.replace_file": partial(refusing, "metrics.jsonl")}, "metrics.jsonl", 0, []),
    ("dpo", {"common.run.output_dir.replace_file": partial(refusing, "README.md")}, "README.md", 12, [9, 12]),
    ("sft", {"common.model.export.save_file": save_where_no_file_may_be_large}, MODEL, 12, [9, 12]),
]


@pytest.mark.parametrize(("method", "patches", "file", "last_step", "left"), NOT_WRITTEN)
def test_a_file_that_cannot_be_written_stops_all_ranks(setting, method, patches, file, last_step, left):
    """Before the next update, but for what is written beside the steps."""
    whole, output_dir = setting.whole(method), setting.folder() / "output"
    done = setting.run(method, output_dir, patches=patches)
    assert re.search(rf"{output_dir}/{file}: ", done.refused(3))
    assert checkpoints(output_dir) == left or left is None
    assert file != MODEL or not list(output_dir.glob("*.safetensors"))
    assert last_step is None or steps_run(done.stdout) == list(range(1, last_step + 1))
    if last_step in (None, 5, LAST_STEP):  # after step 3; behind half a record; with all but the model
        rerun_until_done(setting, method, output_dir, whole)


def renamed_before(real, *arguments) -> None:
    """As the user may do in the last seconds of a run."""
    output_dir = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    if os.environ["RANK"] == "0":
        output_dir.rename(output_dir.with_name(f"{output_dir.name}_renamed"))
    real(*arguments)


@pytest.mark.parametrize("before", ["export_model", "finish"])
def test_a_folder_that_is_renamed_before_the_model_or_the_result_is_written_is_not_done(setting, before):
    output_dir = setting.copy_of_whole("sft")
    patches = {f"train_sft.{before}": partial(renamed_before, getattr(train_sft, before))}
    done = setting.run("sft", output_dir, patches=patches)
    assert str(output_dir) in done.refused(3) and "done: " not in done.stdout
    renamed = output_dir.with_name(f"{output_dir.name}_renamed")
    assert checkpoints(renamed) == [9, 12] and "result" not in read_run_config(str(renamed))
    shutil.rmtree(output_dir, ignore_errors=True)
    rerun_until_done(setting, "sft", renamed, setting.whole("sft"))


FULL_DISK = """\
mount -t tmpfs -o size=$1 none "$2" || exit 77
mkdir "$2/run"
until [ -e "$2/run/checkpoints/step_00000003/COMPLETE" ]; do sleep 0.01; done &&
head -c $(( $(df --output=avail --block-size=1 "$2" | tail -n 1) - 100000 )) /dev/zero > "$2/filler" &
"${@:4}"; echo "code $?"
kill $!; rm "$2/filler"
"$3" -m common.verbs verify "$2/run"; echo "code $?"
"${@:4}"; echo "code $?"
"""


def test_a_file_system_that_fills_up_ends_the_run_with_3_and_older_checkpoints_stay_whole(setting):
    """One of 40 MB of its own, which needs root, with room for records, but for no checkpoint."""
    folder = setting.folder()
    folder.mkdir()
    words = [sys.executable, "train_sft.py", *launch.argv(setting.flags("sft", folder / "run", num_train_epochs=40))]
    command = ["unshare", "--mount", "bash", "-c", FULL_DISK, "x", "40M", str(folder), sys.executable, *words]
    options = dict(env=os.environ | launch.CPU_ENVIRONMENT, capture_output=True, text=True, timeout=launch.TIMEOUT)
    done = subprocess.run(command, cwd=launch.REPO, check=False, **options)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs root")
    assert re.findall(r"^code (\d+)", done.stdout, re.MULTILINE) == ["3", "0", "0"], done
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(rf"{folder}/run/checkpoints/\.step_\d+\.tmp/.*No space left", error), error
    assert re.search(r"step_0+\d+: whole", done.stdout) and "resuming after step" in done.stdout


def test_verify_compares_what_was_logged_on_as_many_ranks(tmp_path, monkeypatch):
    """A step without an evaluation, which the repeated run has at its end; one that two and three ranks have led to."""
    logged = [{"step": step, "train_loss": 0.5, "tokens_per_second": 6.0, "per_device_tps": 3.0} for step in (1, 2, 3)]
    logged[2]["per_device_tps"] = 2.0
    models.write_jsonl(tmp_path / "metrics.jsonl", logged)
    record = {"method": "SFT", "config": {"eval_holdout": "1", "keep_best": "eval/loss"}}
    models.write_jsonl(tmp_path / "run_config.json", [record])

    def repeated(words: list[str]) -> SimpleNamespace:
        folder = Path(next(word for word in words if "--output_dir=" in word).partition("=")[2])
        assert "--keep_best=None" in words, "no checkpoint is written"
        models.write_jsonl(folder / "metrics.jsonl", [logged[0], {**logged[1], "eval/loss": 0.5}])
        return SimpleNamespace(stdout=[], wait=lambda: 0, send_signal=None)

    monkeypatch.setattr(verify, "start_run", repeated)
    monkeypatch.setattr(verify, "on_request_to_stop", id)
    dead, living = tmp_path / ".verify_dead", tmp_path / ".verify_living"  # one was killed, one is at work now
    files.held(dead).close()
    with files.held(living):
        assert verify.main(str(tmp_path), "--step", "2") == 0
        assert not dead.exists() and living.is_dir()
    with pytest.raises(UserError, match=r"--step 3: .*\[2, 3\] ranks"):
        verify.main(str(tmp_path), "--step", "3")
