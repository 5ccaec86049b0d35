"""The reference cache is the starting model's log-probabilities or it is not used.

pytest tests/test_reference_cache.py
"""

import errno
import os
import random
import re
import shutil
import time

import launch
import models
import pytest
import reference
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from common.failures import UserError
from common.files import replace_file, weight_digests
from common.step.schedule import step_samples

NUM_PAIRS = 40
SETTINGS = {
    "loss_type": "sigmoid",
    "beta": 0.1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "global_batch_size": 10,
    "max_train_steps": 4,
}
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
    return logps_of(tiny_llama, rows)


def logps_of(folder, rows) -> torch.Tensor:
    model, tokenizer = reference.load(folder), reference.load_tokenizer(folder)
    with torch.no_grad():
        return torch.tensor(
            [
                [reference.token_logps(model, *side).sum() for side in reference.pair_tokens(tokenizer, row)]
                for row in rows
            ]
        )


def flags(model, data, cache, output, **changes) -> dict:
    return {
        "model_name_or_path": model,
        "dataset_mixer": data,
        "dtype": "float32",
        "max_seq_length": 512,
        "cache_dir": cache,
        "output_dir": output,
        **SETTINGS,
        **changes,
    }


@pytest.fixture(scope="module")
def written(tiny_llama, data, tmp_path_factory):
    """(cache_dir, the run that wrote it): three ranks, parts of six pairs, a checkpoint after each half."""
    root = tmp_path_factory.mktemp("written")
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, root / "cache", root / "output", checkpointing_steps=2), 3, SMALL_PARTS
    )
    return root / "cache", run.succeeded()


@pytest.fixture
def cache(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written[0], tmp_path / "cache")


def parts(cache) -> list:
    return sorted((cache / "reference").glob("*/part_*.safetensors"))


def read_parts(cache) -> torch.Tensor:
    """float32 [pairs, 2], read without the product's code; every pair once."""
    logps = torch.full((NUM_PAIRS, 2), torch.nan)
    for path in parts(cache):
        with safe_open(path, "pt") as file:
            pairs, values = file.get_tensor("pairs"), file.get_tensor("logps")
        assert logps[pairs].isnan().all()
        logps[pairs] = values
    return logps


def numbers(run) -> list:
    return [
        [record[name] for name in ("train_loss", "grad_norm", "rewards/margin", "logps/chosen")]
        for record in run.metrics
    ]


def assert_same_numbers(run, expected) -> None:
    """To float32's own tolerance: other ranks lay other pairs together."""
    for seen, wanted in zip(numbers(run), numbers(expected), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-5, abs=2e-5)


def stamps(cache) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in parts(cache)}


# ------------------------------------------------------------------ what is written and who may read it


def test_cache_holds_the_log_probabilities_of_full_logits(written, plain_logps):
    torch.testing.assert_close(read_parts(written[0]), plain_logps, rtol=1e-5, atol=1e-4)
    assert len(parts(written[0])) == 7, "40 pairs, six a part"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_numbers_of_ranks_read_what_three_wrote(written, cache, tiny_llama, data, tmp_path, num_ranks):
    before = stamps(cache)
    run = launch.launch("train_dpo", flags(tiny_llama, data, cache, tmp_path / "output"), num_ranks).succeeded()
    assert "40 of 40 pairs cached" in run.stdout
    assert stamps(cache) == before
    assert_same_numbers(run, written[1])


@pytest.mark.parametrize("changes", [{"share_prompt": False}, {"dtype": "bfloat16"}, {"max_seq_length": 64}])
def test_what_changes_a_log_probability_changes_the_key(cache, tiny_llama, data, tmp_path, changes):
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, cache, tmp_path / "output", max_train_steps=1, **changes)
    ).succeeded()
    assert "reference log-probabilities: 0 of" in run.stdout


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "dpo_norm", "beta": 2.0}, {"seed": 7, "learning_rate": 1e-5}, {"max_tokens_per_micro_batch": 600}],
)
def test_what_does_not_keeps_it(cache, tiny_llama, data, tmp_path, changes):
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, cache, tmp_path / "output", max_train_steps=1, **changes)
    ).succeeded()
    assert "reference log-probabilities: 10 of 10 pairs cached" in run.stdout


def test_only_the_pairs_that_steps_will_take_are_computed(tiny_llama, data, tmp_path):
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output", max_train_steps=1)
    ).succeeded()
    assert "0 of 10 pairs cached" in run.stdout
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output2", max_train_steps=2)
    ).succeeded()
    assert "10 of 20 pairs cached" in run.stdout


# ------------------------------------------------------------------ other weights


def test_other_weights_in_the_same_folder_are_noticed(data, rows, tmp_path):
    folder = models.make_model(tmp_path / "model", seed=1)
    launch.launch("train_dpo", flags(folder, data, tmp_path / "cache", tmp_path / "output1")).succeeded()
    size = (folder / "model.safetensors").stat().st_size
    models.make_model(folder, seed=2)
    assert (folder / "model.safetensors").stat().st_size == size
    run = launch.launch("train_dpo", flags(folder, data, tmp_path / "cache", tmp_path / "output2")).succeeded()
    assert "0 of 40 pairs cached" in run.stdout
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2
    assert run.metrics[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    tokenizer = reference.load_tokenizer(folder)
    pairs = [reference.pair_tokens(tokenizer, row) for row in rows]
    expected = reference.train_dpo(
        reference.load(folder), pairs, "sigmoid", beta=0.1, learning_rate=1e-3, global_batch_size=10, num_steps=4
    )
    assert run.column("train_loss") == pytest.approx([record["train_loss"] for record in expected], rel=1e-5)


def test_a_copy_of_the_folder_has_the_same_key(written, cache, tiny_llama, data, tmp_path):
    """The key is the contents, not the path."""
    copied = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    run = launch.launch("train_dpo", flags(copied, data, cache, tmp_path / "output")).succeeded()
    assert "40 of 40 pairs cached" in run.stdout


def test_weights_are_digested_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    folder = models.make_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    first = weight_digests(str(folder), str(tmp_path / "cache"))
    assert first == {"model.safetensors": xxhash.xxh3_128_hexdigest(weights.read_bytes())}

    def never(path):
        raise AssertionError(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr("common.files.file_digest", never)
        assert weight_digests(str(folder), str(tmp_path / "cache")) == first
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # the same size, the same inode
    assert (
        weight_digests(str(folder), str(tmp_path / "cache"))
        == {"model.safetensors": xxhash.xxh3_128_hexdigest(content)}
        != first
    )


def test_weights_that_are_not_there_are_named(tmp_path):
    """As in a hub's cache that was cleaned: a link to nothing."""
    folder = models.make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: No such file"):
        weight_digests(str(folder), str(tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["{torn", "[]", "null", '{"weights": {}}', "another digest"])
def test_a_memo_of_digests_that_is_not_as_written_is_not_used(tmp_path, damage):
    folder, memo = models.make_model(tmp_path / "model"), tmp_path / "cache" / "weight_digests.json"
    first = weight_digests(str(folder), str(tmp_path / "cache"))
    assert first == weight_digests(str(folder), str(tmp_path / "cache"))
    text = memo.read_text()
    assert first["model.safetensors"] in text
    memo.write_text(text.replace(first["model.safetensors"], "0" * 32) if damage == "another digest" else damage)
    assert weight_digests(str(folder), str(tmp_path / "cache")) == first
    assert memo.read_text() == text


def test_a_memo_of_digests_that_cannot_be_written_is_done_without(tmp_path):
    folder = models.make_model(tmp_path / "model")
    (tmp_path / "cache").touch()
    expected = {"model.safetensors": xxhash.xxh3_128_hexdigest((folder / "model.safetensors").read_bytes())}
    assert weight_digests(str(folder), str(tmp_path / "cache")) == expected


# ------------------------------------------------------------------ kills, damage, lies


def kill_at(delay: float, given: dict, num_ranks: int) -> None:
    run = launch.start("train_dpo", given, num_ranks, SMALL_PARTS)
    deadline = time.monotonic() + 60
    while not parts(given["cache_dir"]) and run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    run.kill()
    for process in run.processes:
        process.join()


def check_kill(written, tiny_llama, data, tmp_path, delay: float, num_ranks: int) -> int:
    """Kills a run `delay` seconds after its first part was written, wherever it is, even at its end, and runs another
    with that cache. How many parts were left."""
    given = flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output")
    kill_at(delay, given | {"output_dir": tmp_path / "killed"}, num_ranks)
    before = stamps(tmp_path / "cache")
    assert before
    run = launch.launch("train_dpo", given, 2, SMALL_PARTS).succeeded()
    after = stamps(tmp_path / "cache")
    assert {name: after[name] for name in before} == before, "finished parts are kept"
    assert f"{min(NUM_PAIRS, 6 * len(before))} of 40 pairs cached" in run.stdout
    assert not read_parts(tmp_path / "cache").isnan().any()
    assert_same_numbers(run, written[1])
    return len(before)


def test_kill_9_keeps_finished_parts_and_the_final_numbers(written, tiny_llama, data, tmp_path):
    left = [
        check_kill(written, tiny_llama, data, tmp_path / str(i), delay, i + 1) for i, delay in enumerate((0.0, 0.05))
    ]
    assert min(left) < 7, "no kill came in the middle"


@pytest.mark.soak
@pytest.mark.parametrize("i", range(20))
def test_kill_9_at_random_points(written, tiny_llama, data, tmp_path, i):
    rng = random.Random(i)
    check_kill(written, tiny_llama, data, tmp_path, rng.uniform(0, 1.0), rng.randint(1, 3))


@pytest.mark.parametrize("damage", ["torn", "edited", "empty", "garbage", "half-written"])
def test_a_damaged_part_is_not_used(written, cache, tiny_llama, data, plain_logps, tmp_path, damage):
    path = max(parts(cache), key=lambda path: path.stat().st_size)  # of six pairs
    content = bytearray(path.read_bytes())
    if damage == "torn":
        path.write_bytes(content[:-20])
    elif damage == "edited":
        content[-3] ^= 0x10
        path.write_bytes(content)
    elif damage == "half-written":
        os.rename(path, path.with_name(f".{path.name}.123.tmp"))
    else:
        path.write_bytes(b"" if damage == "empty" else os.urandom(300))
    run = launch.launch("train_dpo", flags(tiny_llama, data, cache, tmp_path / "output"), 2).succeeded()
    assert "34 of 40 pairs cached" in run.stdout
    assert_same_numbers(run, written[1])
    torch.testing.assert_close(read_parts(cache), plain_logps, rtol=1e-5, atol=1e-4)


def test_values_of_another_model_stop_the_run_with_3(cache, tiny_llama, data, tmp_path):
    """Every part whole and its digest right, every value that of other weights: the numbers are in the message."""
    for path in parts(cache):
        with safe_open(path, "pt") as file:
            pairs, values = file.get_tensor("pairs"), file.get_tensor("logps")
        values = values * 1.02
        digest = xxhash.xxh3_128_hexdigest(pairs.numpy().tobytes() + values.numpy().tobytes())
        save_file({"pairs": pairs, "logps": values}, path, metadata={"digest": digest})
    run = launch.launch("train_dpo", flags(tiny_llama, data, cache, tmp_path / "output"), 2)
    assert run.exit_codes == [3, 3]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert "disagrees" in errors[0] and "preferences.jsonl:" in errors[0]
    assert not (tmp_path / "output" / "metrics.jsonl").exists()


def without_memory(*_) -> None:
    torch.empty(2**46)


def test_running_out_of_memory_says_where_and_what_to_change(tiny_llama, data, tmp_path):
    given = flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output")
    run = launch.launch("train_dpo", given, 1, {"common.run.reference.sequence_logps": without_memory})
    assert run.exit_codes == [3] and "Traceback" not in run.stderr
    error = re.search(r"error: the reference pass: out of memory on a micro-batch of ([0-9,]+) tokens (.*)", run.stderr)
    smaller = int(error[1].replace(",", "")) // 2
    assert f"Try --max_tokens_per_micro_batch {smaller}, a lower --max_seq_length, or more devices" in error[2]


def second_part_on_a_full_disk(path, data) -> None:
    if path.name.startswith("part_") and parts(path.parents[2]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    replace_file(path, data)


def test_a_part_that_cannot_be_written_stops_all_ranks_and_keeps_those_before_it(tiny_llama, data, tmp_path):
    given = flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output")
    patches = SMALL_PARTS | {"common.run.reference.replace_file": second_part_on_a_full_disk}
    run = launch.launch("train_dpo", given, 2, patches)
    assert run.exit_codes == [3, 3], run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]  # the progress bar's line is over
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert f"error: {tmp_path}/cache/reference/" in errors[0] and "could not be written: No space left" in errors[0]
    assert "free disk space" in errors[0] and "--cache_dir" in errors[0]
    run = launch.launch("train_dpo", given, 2).succeeded()
    assert "6 of 40 pairs cached" in run.stdout


@pytest.mark.parametrize("blocked", ["folder", "part"])
def test_a_cache_that_cannot_be_used_is_one_line_and_2(cache, tiny_llama, data, tmp_path, blocked):
    path = cache / "reference" if blocked == "folder" else parts(cache)[2]
    if blocked == "folder":
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    run = launch.launch("train_dpo", flags(tiny_llama, data, cache, tmp_path / "output"), 2)
    assert run.exit_codes == [2, 2], run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert f"--cache_dir {cache}: {path}" in errors[0]


def test_runs_that_fill_a_cache_at_once_keep_each_others_parts(tiny_llama, data, rows, tmp_path):
    """Each read the empty cache before either wrote; the second's order takes other pairs first."""
    first = flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output1", max_train_steps=2)
    second = first | {"seed": 7, "output_dir": tmp_path / "output2", "cache_dir": tmp_path / "cache2"}
    for given in (first, second):
        launch.launch("train_dpo", given, 1, SMALL_PARTS).succeeded()
    folder = parts(tmp_path / "cache")[0].parent
    for path in parts(tmp_path / "cache2"):
        shutil.copy(path, folder / path.name)
    given = flags(tiny_llama, data, tmp_path / "cache", tmp_path / "output3")
    taken = {i for seed in (42, 7) for step in range(2) for i in step_samples(step, NUM_PAIRS, 10, seed)}
    assert 20 < len(taken) < NUM_PAIRS
    run = launch.launch("train_dpo", given).succeeded()
    assert f"{len(taken)} of 40 pairs cached" in run.stdout


# ------------------------------------------------------------------ resume


def test_a_resume_without_the_cache_takes_the_starting_weights_for_reference(
    written, tiny_llama, data, plain_logps, tmp_path
):
    """Not the checkpoint's: a half-trained policy as its own reference would train something else."""
    output = tmp_path / "output"
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(written[1].output_dir / "checkpoints" / "step_00000002", output / "checkpoints" / "step_00000002")
    lines = (written[1].output_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:2]))
    run = launch.launch("train_dpo", flags(tiny_llama, data, tmp_path / "cache", output), 2).succeeded()
    assert "resuming after step 2" in run.stdout and "0 of 40 pairs cached" in run.stdout
    torch.testing.assert_close(read_parts(tmp_path / "cache"), plain_logps, rtol=1e-5, atol=1e-4)
    assert_same_numbers(run, written[1])
    assert abs(run.metrics[-1]["rewards/margin"]) > 0.01
