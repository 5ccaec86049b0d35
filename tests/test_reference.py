"""The reference cache is the starting model's log-probabilities or it is not used: pytest tests/test_reference.py"""

import errno
import os
import random
import shutil
import time
from importlib.metadata import distributions
from types import SimpleNamespace

import launch
import models
import numpy as np
import pytest
import reference
import torch
from safetensors import safe_open

from common.config import DPOConfig
from common.failures import UserError
from common.files import replace_file
from common.run import reference as run_reference
from common.run.reference import reference_key

NUM_PAIRS = 40
SETTINGS = {"loss_type": "sigmoid", "beta": 0.1, "learning_rate": 1e-3, "warmup_ratio": 0}
SETTINGS |= {"global_batch_size": 10, "max_train_steps": 4}
SMALL_PARTS = {"common.run.reference.PAIRS_PER_PART": 6}


@pytest.fixture(scope="module")
def rows():
    return models.preferences(NUM_PAIRS, seed=9)


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return models.write_jsonl(tmp_path_factory.mktemp("data") / "preferences.jsonl", rows)


@pytest.fixture(scope="module")
def plain_logps(tiny_llama, rows):
    """float32 [pairs, 2]: what full logits of plain transformers give, one side at a time."""
    model, tokenizer = reference.load(tiny_llama), reference.load_tokenizer(tiny_llama)
    pairs = [reference.pair_tokens(tokenizer, row) for row in rows]
    with torch.no_grad():
        return torch.tensor([[reference.token_logps(model, *side).sum() for side in pair] for pair in pairs])


@pytest.fixture
def train(tiny_llama, data, tmp_path):
    """train(num_ranks, patches, **changes): a run of its own output_dir, with the cache in tmp_path/cache."""

    def run(num_ranks=1, patches=None, start=launch.launch, **changes):
        own = {"output_dir": tmp_path / f"output_{time.monotonic_ns()}"} | SETTINGS | changes
        return start("train_dpo", launch.flags(tiny_llama, data, tmp_path, **own), num_ranks, patches)

    return run


@pytest.fixture(scope="module")
def written(tiny_llama, data, tmp_path_factory):
    """(cache_dir, the run that wrote it): three ranks, parts of six pairs, a checkpoint after each half."""
    root = tmp_path_factory.mktemp("written")
    given = launch.flags(tiny_llama, data, root, **SETTINGS, checkpointing_steps=2)
    return root / "cache", launch.launch("train_dpo", given, 3, SMALL_PARTS).succeeded()


@pytest.fixture
def cache(written, tmp_path):
    """A copy to spoil, where `train` looks."""
    return shutil.copytree(written[0], tmp_path / "cache")


def parts(cache) -> list:
    return sorted((cache / "reference").glob("*/part_*.safetensors"))


def read_part(path) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("pairs"), file.get_tensor("logps")


def read_parts(cache) -> torch.Tensor:
    """float32 [pairs, 2], read without the product's code; every pair once."""
    logps = torch.full((NUM_PAIRS, 2), torch.nan)
    for pairs, values in map(read_part, parts(cache)):
        assert logps[pairs].isnan().all()
        logps[pairs] = values
    return logps


def assert_same_numbers(run, expected) -> None:
    """To float32's own tolerance: other ranks lay other pairs together."""
    for name in ("train_loss", "grad_norm", "rewards/margin", "logps/chosen"):
        assert run.column(name) == pytest.approx(expected.column(name), rel=1e-5, abs=2e-5), name


def stamps(cache) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in parts(cache)}


# ------------------------------------------------------------------ what is written and who may read it


def test_cache_holds_the_log_probabilities_of_full_logits(written, plain_logps):
    torch.testing.assert_close(read_parts(written[0]), plain_logps, rtol=1e-5, atol=1e-4)
    assert len(parts(written[0])) == 7, "40 pairs, six a part"


def test_another_number_of_ranks_reads_what_three_wrote(written, cache, train):
    before = stamps(cache)
    run = train(2).succeeded()
    assert "40 of 40 pairs cached" in run.stdout
    assert stamps(cache) == before
    assert_same_numbers(run, written[1])


def key(weights="w", data="d", kernel="sdpa", device_type="cpu", **changes) -> str:
    return reference_key(weights, data, DPOConfig(**changes), kernel, device_type)


def test_what_changes_a_log_probability_and_nothing_else_changes_the_key(monkeypatch):
    """max_seq_length is in the data's digest."""
    for changes in ({"loss_type": "simpo"}, {"seed": 7, "learning_rate": 1e-5}, {"max_tokens_per_micro_batch": 600}):
        assert key(**changes) == key()
    keys = [key(), key(weights="other"), key(data="other"), key(kernel="varlen"), key(device_type="cuda")]
    keys += [key(share_prompt=False), key(dtype="float32")]
    for library in ("torch", "transformers", "flash-attn", "flash-attn-4"):
        with monkeypatch.context() as patch:
            own = [SimpleNamespace(version="0.0.1")]
            of_all = lambda name: own if name == library else distributions(name=name)  # noqa: E731
            patch.setattr(run_reference, "distributions", of_all)
            keys.append(key())
    assert len({*keys}) == len(keys)


def test_only_the_pairs_that_steps_will_take_are_computed(train):
    assert "0 of 10 pairs cached" in train(max_train_steps=1).succeeded().stdout
    assert "10 of 20 pairs cached" in train(max_train_steps=2).succeeded().stdout


# ------------------------------------------------------------------ other weights


def test_other_weights_in_the_same_folder_are_noticed(train, tmp_path):
    """Their bytes are the key: not the path, nor the size."""
    folder = models.make_model(tmp_path / "model", seed=1)
    size = (folder / "model.safetensors").stat().st_size
    train(model_name_or_path=folder).succeeded()
    models.make_model(folder, seed=2)
    assert (folder / "model.safetensors").stat().st_size == size
    run = train(model_name_or_path=folder).succeeded()
    assert "0 of 40 pairs cached" in run.stdout
    assert run.metrics[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------ kills, damage


def check_kill(written, train, cache, delay: float, num_ranks: int) -> int:
    """Kills a run `delay` seconds after its first part was written, wherever it is, even at its end, and runs another
    with that cache. How many parts were left."""
    run = train(num_ranks, SMALL_PARTS, launch.start, cache_dir=cache)
    run.wait_until(lambda: parts(cache))
    time.sleep(delay)
    run.kill()
    run.wait()
    before = stamps(cache)
    assert before
    run = train(2, SMALL_PARTS, cache_dir=cache).succeeded()
    after = stamps(cache)
    assert {name: after[name] for name in before} == before, "finished parts are kept"
    assert f"{min(NUM_PAIRS, 6 * len(before))} of 40 pairs cached" in run.stdout
    assert not read_parts(cache).isnan().any()
    assert_same_numbers(run, written[1])
    return len(before)


def test_kill_9_keeps_finished_parts_and_the_final_numbers(written, train, tmp_path):
    assert check_kill(written, train, tmp_path, 0.0, 2) < 7, "the kill did not come in the middle"


@pytest.mark.soak
@pytest.mark.parametrize("i", range(20))
def test_kill_9_at_random_points(written, train, tmp_path, i):
    rng = random.Random(i)
    check_kill(written, train, tmp_path / "cache", rng.uniform(0, 1.0), rng.randint(1, 3))


def test_a_damaged_part_is_not_used(cache):
    for damage in ("torn", "edited", "empty", "garbage", "half-written"):
        *_, spoilt = sorted(parts(cache), key=lambda path: path.stat().st_size)  # six pairs or four
        content, whole = bytearray(spoilt.read_bytes()), {*parts(cache)} - {spoilt}
        edited = content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:]
        spoilt.write_bytes({"torn": content[:-20], "edited": edited, "empty": b""}.get(damage, os.urandom(300)))
        if damage == "half-written":
            left = spoilt.rename(spoilt.with_name(f".{spoilt.name}.123.tmp"))
            os.utime(left, (0, 0))
        read = run_reference._read_parts(spoilt.parent, str(cache))
        assert not list(spoilt.parent.glob(".*")), "what a kill left is swept up"
        assert {*parts(cache)} == whole and len(read) == len(whole)
        expected = {i for path in whole for i in read_part(path)[0].tolist()}
        assert {i for _, pairs, _ in read for i in pairs.tolist()} == expected


def without_memory(*_) -> None:
    torch.empty(2**46)


def test_running_out_of_memory_says_where_and_what_to_change(train):
    error = train(1, {"common.run.reference.sequence_logps": without_memory}).refused(3)
    assert "the reference pass: out of memory" in error and "--max_tokens_per_micro_batch" in error


def second_part_on_a_full_disk(path, data) -> None:
    if path.name.startswith("part_") and parts(path.parents[2]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    replace_file(path, data)


def test_a_part_that_cannot_be_written_stops_all_ranks_and_keeps_those_before_it(train, tmp_path):
    error = train(2, SMALL_PARTS | {"common.run.reference.replace_file": second_part_on_a_full_disk}).refused(3)
    assert f"{tmp_path}/cache/reference/" in error
    assert "6 of 40 pairs cached" in train(2).succeeded().stdout


def test_a_cache_that_cannot_be_used_is_refused_by_its_flag(tmp_path):
    (tmp_path / "reference").touch()
    with pytest.raises(UserError, match=f"--cache_dir {tmp_path}"):
        run_reference._read_parts(tmp_path / "reference" / "key", str(tmp_path))


def test_runs_that_fill_a_cache_at_once_keep_each_others_parts(tmp_path):
    """Each read the empty cache before either wrote; of the pairs that both computed either may count."""
    for pairs in ([0, 1, 2], [2, 3], [0, 1, 4]):
        run_reference._write_part(tmp_path, np.array(pairs), np.ones((len(pairs), 2), np.float32))
    read = run_reference._read_parts(tmp_path, "")
    assert {i for _, pairs, _ in read for i in pairs.tolist()} == {0, 1, 2, 3, 4}


# ------------------------------------------------------------------ resume


def test_a_resume_without_the_cache_takes_the_starting_weights_for_reference(written, train, plain_logps, tmp_path):
    """Not the checkpoint's: a half-trained policy as its own reference would train something else."""
    checkpoint = "checkpoints/step_00000002"
    shutil.copytree(written[1].output_dir / checkpoint, tmp_path / "resumed" / checkpoint)
    shutil.copy(written[1].output_dir / "metrics.jsonl", tmp_path / "resumed" / "metrics.jsonl")
    run = train(2, output_dir=tmp_path / "resumed").succeeded()
    assert "resuming after step 2" in run.stdout and "0 of 40 pairs cached" in run.stdout
    torch.testing.assert_close(read_parts(tmp_path / "cache"), plain_logps, rtol=1e-5, atol=1e-4)
    assert_same_numbers(run, written[1])
    assert abs(run.metrics[-1]["rewards/margin"]) > 0.01
