"""Held-out evaluation: its numbers, what it leaves alone, and how it ends a run: pytest tests/test_evaluate.py"""

import dataclasses
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import launch
import models
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from models import OneRank
from test_model import load_silently
from test_resume import assert_same_weights, checkpoints, without_times

from common.config import SFTConfig, parse_config
from common.data.cache import prepare_tokens
from common.data.chat_template import resolve_template
from common.data.dataset import TokenDataset
from common.failures import UserError
from common.run import evaluate
from common.run.evaluate import has_stalled, num_also_in, source_names, split, training_and_held_out
from common.run.output_dir import read_run_config
from common.zero import checkpoint

METHODS = ("sft", "dpo")
both = pytest.mark.parametrize("method", METHODS)
MADE = {"sft": models.conversations, "dpo": models.preferences}


class Setting:
    """A model; 10 rows to train on; two held-out files, of 5 and 3 rows, the longest row of all in the first."""

    def __init__(self, root: Path):
        self.root, self.model = root, models.make_model(root / "llama")
        self.rows = {method: make(18) for method, make in MADE.items()}
        nothing = {"zero_optimization": {"stage": 3}, "residency": "nothing"}
        self.nothing, self.num_folders = models.write_jsonl(root / "nothing.json", [nothing]), 0

    def file(self, method: str, name: str, start: int, end: int) -> Path:
        path = self.root / method / name
        path.parent.mkdir(exist_ok=True)
        return models.write_jsonl(path, self.rows[method][start:end])

    def flags(self, method: str, **changes) -> dict:
        self.num_folders += 1
        own = {"global_batch_size": 4, "max_train_steps": 6, "learning_rate": 3e-3, "warmup_ratio": 0}
        own |= {"output_dir": self.root / f"run_{self.num_folders}", "max_tokens_per_micro_batch": 300}
        if method == "dpo":
            own["ds_config"] = self.nothing
        return launch.flags(self.model, self.file(method, "train.jsonl", 0, 10), self.root, **own | changes)

    def held_out(self, method: str) -> dict:
        """Flags: two sources, evaluated after steps 2, 4 and 6."""
        files = [self.file(method, "one.jsonl", 10, 15), self.file(method, "two.jsonl", 15, 18)]
        return {"eval_dataset_mixer": files, "eval_steps": 2}

    def run(self, method: str, num_ranks: int = 2, patches=None, **changes) -> launch.Finished:
        return launch.launch(f"train_{method}", self.flags(method, **changes), num_ranks, patches)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluated(setting) -> dict[str, launch.Finished]:
    return {method: setting.run(method, **setting.held_out(method)).succeeded() for method in METHODS}


# ------------------------------------------------------------------ the numbers


def plain(method: str, model, rows: list[dict], start, tokenizer) -> dict[str, float]:
    """The plain loop's step over all of rows: what it reports is of the weights before its update."""
    once = {"global_batch_size": len(rows), "num_steps": 1}
    if method == "sft":
        samples = [reference.conversation_tokens(tokenizer, row["messages"], 512) for row in rows]
        loss = reference.train_sft(model, samples, **once)[0]["train_loss"]
        return {"loss": loss, "perplexity": math.exp(loss)}
    pairs = [reference.pair_tokens(tokenizer, row, 512) for row in rows]
    record = reference.train_dpo(model, pairs, "dpo_norm", beta=5.0, reference_model=start, **once)[0]
    names = {"loss": "train_loss", "accuracy": "rewards/accuracy", "margin": "rewards/margin"}
    return {name: record[there] for name, there in names.items()}


@both
def test_numbers_of_each_source_and_of_all_are_the_plain_loops(setting, evaluated, method):
    """Under the exported model, those of the last step: sums over tokens or pairs, no means of means."""
    run, tokenizer = evaluated[method], reference.load_tokenizer(setting.model)
    parts = {"eval": (10, 18), "eval/one": (10, 15), "eval/two": (15, 18)}
    for prefix, (start, end) in parts.items():
        model, first = load_silently(run.output_dir), reference.load(setting.model)
        for name, value in plain(method, model, setting.rows[method][start:end], first, tokenizer).items():
            assert run.metrics[-1][f"{prefix}/{name}"] == pytest.approx(value, rel=2e-5), (prefix, name)


@both
def test_training_is_the_same_to_all_digits_with_and_without(setting, evaluated, method):
    without = setting.run(method).succeeded()
    of_training = [{n: v for n, v in row.items() if not n.startswith("eval/")} for row in evaluated[method].metrics]
    assert without_times(of_training) == without_times(without.metrics)
    assert_same_weights(evaluated[method].output_dir, without.output_dir)


@both
def test_it_is_in_the_metrics_where_it_is_due_and_in_the_record_and_card(evaluated, method):
    run = evaluated[method]
    assert [record["step"] for record in run.metrics if "eval/loss" in record] == [2, 4, 6]
    record = read_run_config(str(run.output_dir))
    assert record["evaluation"]["samples"] == {"eval": 8, "eval/one": 5, "eval/two": 3}
    assert f"| eval/two/loss | {run.metrics[-1]['eval/two/loss']} |" in (run.output_dir / "README.md").read_text()


def test_an_evaluation_at_a_step_that_is_not_logged_is_written_with_it(setting):
    run = setting.run("sft", 1, **setting.held_out("sft") | {"logging_steps": 5, "eval_steps": 3}).succeeded()
    assert run.column("step") == [3, 5, 6]


def test_a_killed_run_that_goes_on_neither_loses_nor_doubles_an_evaluation(setting, evaluated):
    """Killed in the evaluation after step 4, while step 3's checkpoint is written; step 2's is the best so far."""
    changes = setting.held_out("dpo") | {"output_dir": setting.root / "killed", "checkpointing_steps": 3}
    changes |= {"keep_best": "eval/loss"}
    killed = setting.run("dpo", patches={"train_dpo.Evaluation": KilledInTheSecond}, **changes)
    assert -9 in killed.exit_codes and 2 in checkpoints(killed.output_dir)
    resumed = setting.run("dpo", **changes).succeeded()
    assert without_times(resumed.metrics) == without_times(evaluated["dpo"].metrics)


class KilledInTheSecond(evaluate.Evaluation):
    calls = 0

    def __call__(self, *args):
        type(self).calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), 9)
        return super().__call__(*args)


# ------------------------------------------------------------------ what is held out


def tokenized(path: Path, folder: Path, tokenizer, method: str = "sft", amount: str = "") -> TokenDataset:
    config = SFTConfig(dataset_mixer=[f"{path}{amount}"], cache_dir=str(folder), max_seq_length=512)
    return TokenDataset(prepare_tokens(method, config, resolve_template("tulu", tokenizer)))


@pytest.mark.parametrize(("method", "amount", "expected"), [("sft", "20%", 8), ("dpo", "3", 3), ("sft", "=150%", 8)])
def test_a_split_takes_the_drawn_rows_with_all_their_copies_and_leaves_the_rest(tmp_path, method, amount, expected):
    data = models.write_jsonl(tmp_path / "rows.jsonl", MADE[method](40))
    source, amount = (amount, "20%") if amount.startswith("=") else ("", amount)
    whole = tokenized(data, tmp_path, models.make_tokenizer(), method, source)
    rest, held_out = split(whole, amount)
    drawn = np.random.RandomState(42).choice(40, size=expected, replace=False) + 1
    assert {row for _, row in held_out.rows.tolist()} == {*drawn.tolist()}
    assert {row for _, row in rest.rows.tolist()} == {*range(1, 41)} - {*drawn.tolist()}
    for part in (rest, held_out):
        mine = {part.source_of(i) for i in range(len(part))}
        same = [i for i in range(len(whole)) if whole.source_of(i) in mine]
        for i, j in zip(range(len(part)), same, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(part[i], whole[j], strict=True))
            assert part.lengths[i] == whole.lengths[j] and part.num_targets[i] == whole.num_targets[j]
        if method == "sft":
            ends = [part[i].input_ids[part[i].trained_spans[:, 1] - 1] for i in range(len(part))]
            assert part.last_tokens().tolist() == np.concatenate(ends).tolist()
    assert len(rest) + len(held_out) == len(whole) and len({rest.digest, held_out.digest, whole.digest}) == 3


def test_a_run_without_its_held_out_rows_is_a_run_on_a_file_without_them(setting):
    run = setting.run("sft", eval_holdout="20%").succeeded()
    held_out = read_run_config(str(run.output_dir))["evaluation"]["rows"]
    numbers = {int(place.rpartition(":")[2]) for place in held_out}
    assert numbers == {*(np.random.RandomState(42).choice(10, size=2, replace=False) + 1).tolist()}
    rows = [row for number, row in enumerate(setting.rows["sft"][:10], 1) if number not in numbers]
    other = setting.run("sft", dataset_mixer=models.write_jsonl(setting.root / "rest.jsonl", rows)).succeeded()
    for name in ("train_loss", "grad_norm"):
        assert run.column(name) == other.column(name)
    assert [record["step"] for record in run.metrics if "eval/loss" in record] == [1, 2, 3, 4, 5, 6]
    again = setting.run("sft", eval_holdout="3", output_dir=run.output_dir)
    assert "eval_holdout" in again.refused(2)


def test_samples_in_both_sets_are_counted_by_their_tokens(tmp_path):
    rows, paths = models.conversations(6), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = map(models.write_jsonl, paths, [rows[:4], [rows[5], rows[1], rows[0]]])
    data, held_out = (tokenized(file, tmp_path, models.make_tokenizer()) for file in files)
    assert num_also_in(held_out, data) == 2 and num_also_in(data, data) == 4


def test_sources_have_names_of_their_own():
    files = [{"path": f"/{folder}/my chats.v2.jsonl", "sha256": ""} for folder in ("x", "y")]
    data = SimpleNamespace(stats={"sources": [*files, {"path": "org/set-3.1"}]})
    assert source_names(data) == ["my_chats", "my_chats~2", "set-3.1"]


ODD = ["eval_steps=3", "early_stopping_patience=3", "keep_best=eval/loss", "export_best=true --eval_holdout=1"]
ODD += ["eval_holdout=1 --eval_dataset_mixer x.jsonl"]
ODD += [f"eval_holdout={amount}" for amount in ("0.1", "100%", "10", "0", "1%", "x", "-3")]


@pytest.mark.parametrize("flag", ODD)
def test_flags_that_hold_out_nothing_or_everything_are_refused(tmp_path, flag):
    path = models.write_jsonl(tmp_path / "rows.jsonl", models.conversations(10))
    words = ["--dataset_mixer", str(path), "--cache_dir", str(tmp_path), *f"--{flag}".split()]
    with pytest.raises(UserError, match=f"--{flag.partition('=')[0]}"):
        config = parse_config(SFTConfig, words)
        training_and_held_out("sft", config, resolve_template("tulu", models.make_tokenizer()), OneRank())


# ------------------------------------------------------------------ early stopping


@given(st.lists(st.one_of(st.integers(0, 5).map(float), st.just(math.nan)), max_size=8), st.integers(1, 4))
def test_a_run_stalls_once_the_last_evaluations_bettered_nothing(losses, patience):
    """A loss that is no number betters nothing."""

    def bettered(i: int) -> bool:
        return losses[i] < min([loss for loss in losses[:i] if loss == loss], default=math.inf)

    stalled = len(losses) >= patience and not any(map(bettered, range(len(losses) - patience, len(losses))))
    assert has_stalled(losses, patience) == stalled and not has_stalled(losses, None)


def test_a_run_that_stalls_ends_well_says_so_and_is_finished_for_the_same_patience(setting):
    changes = setting.held_out("sft") | {"early_stopping_patience": 2, "learning_rate": 3.0, "max_train_steps": 30}
    changes |= {"output_dir": setting.root / "stalls", "checkpointing_steps": 2}
    run = setting.run("sft", **changes).succeeded()
    losses = [record["eval/loss"] for record in run.metrics if "eval/loss" in record]
    assert has_stalled(losses, 2) and not has_stalled(losses[:-1], 2) and len(run.metrics) == 2 * len(losses) < 30
    before = run.metrics
    assert "early stopping" in run.stdout and read_run_config(str(run.output_dir))["result"]["stopped_early"] == 2
    assert "nothing to do" in setting.run("sft", **changes).succeeded().stdout
    resumed = changes | {"output_dir": setting.root / "stalls_resumed"}
    setting.run("sft", **resumed, stop_after_steps=len(before) - 2).succeeded()
    other = resumed | {"output_dir": setting.root / "stalls_on_others", "early_stopping_patience": 1}
    other["eval_dataset_mixer"] = resumed["eval_dataset_mixer"][:1]  # its first loss betters all
    shutil.copytree(resumed["output_dir"], other["output_dir"])
    evaluated = [r["step"] for r in setting.run("sft", **other).succeeded().metrics if "eval/loss" in r]
    assert max(evaluated) >= len(before) + 2
    assert setting.run("sft", **resumed).succeeded().column("step") == [*range(1, len(before) + 1)]
    longer = setting.run("sft", **changes | {"early_stopping_patience": 3}).succeeded()
    assert longer.metrics[: len(before)] == before and len(longer.metrics) > len(before)


def test_the_best_checkpoint_stays_and_is_exported_if_asked_for(setting):
    """Its weights are those of a run that ends at that step on the same schedule; the state of a resume is the last."""
    changes = setting.held_out("sft") | {"keep_best": "eval/loss", "learning_rate": 0.3, "keep_last_n_checkpoints": 1}
    changes |= {"lr_scheduler_type": "constant", "max_train_steps": 12, "checkpointing_steps": 4}
    run = setting.run("sft", **changes, export_best=True).succeeded()
    losses = {record["step"]: record["eval/loss"] for record in run.metrics if "eval/loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert best < 12 and checkpoints(run.output_dir) == [best, 12]
    record = read_run_config(str(run.output_dir))
    assert record["exported_step"] == best and record["result"]["steps"] == 12
    assert "resuming" not in run.stdout and f"the model of step {best}, after 12 steps" in run.stdout
    short = setting.run("sft", **changes, stop_after_steps=best).succeeded()
    assert_same_weights(run.output_dir, short.output_dir)
    for is_best in (False, True):  # of the finished run
        setting.run("sft", **changes, export_best=is_best, output_dir=run.output_dir).succeeded()
        assert read_run_config(str(run.output_dir))["exported_step"] == (best if is_best else 12)
    assert_same_weights(run.output_dir, short.output_dir)


def test_the_best_is_compared_with_what_is_kept_and_of_the_same_held_out_data(tmp_path):
    """Not with a lower loss of other data, nor with one whose checkpoint nobody kept."""
    config = dataclasses.replace(SFTConfig(), keep_best="eval/loss", output_dir=str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    evaluation = object.__new__(evaluate.Evaluation)
    evaluation.config, evaluation.ranks, evaluation.held_out = config, OneRank(), SimpleNamespace(digest="one")
    losses = [3.0, math.nan, 2.0, 2.5]
    assert [evaluation.notes_best(i, loss) for i, loss in enumerate(losses)] == [True, False, True, False]
    checkpoint.clear_after(str(tmp_path), 1, "auto")  # as the one of step 2 is set aside
    assert evaluation.notes_best(3, 2.5)
    evaluation.held_out = SimpleNamespace(digest="another")
    assert evaluation.notes_best(4, 9.0) and not evaluation.notes_best(5, 9.5)
    checkpoint.clear_after(str(tmp_path), 5, "auto")  # as the one of step 4 was deleted
    assert evaluation.notes_best(6, 9.5)
    (tmp_path / "checkpoints" / "kept.json").write_text("")
    with pytest.raises(UserError, match=r"kept\.json"):
        checkpoint.clear_after(str(tmp_path), 6, "auto")
