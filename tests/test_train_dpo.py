"""train_dpo.py, whole runs against a plain loop: pytest tests/test_train_dpo.py"""

import functools
import json
import math

import launch
import models
import pytest
import reference
import torch
from test_model import load_silently

from common.run.reference import reference_logps

SETTINGS = {"learning_rate": 3e-3, "warmup_ratio": 0.3, "weight_decay": 0.1, "global_batch_size": 4}
NUM_STEPS, NUM_PAIRS = 4, 10  # an epoch's last step holds two pairs
LOSSES = {  # name -> settings; each clips in some step
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1, "max_grad_norm": 0.3},
    "sigmoid, smoothed": {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.2, "max_grad_norm": 0.3},
    "dpo_norm": {"loss_type": "dpo_norm", "beta": 5.0, "max_grad_norm": 0.5},
    "ipo": {"loss_type": "ipo", "beta": 0.5, "max_grad_norm": 0.5},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.4, "max_grad_norm": 0.5},
}
PLACEMENTS = {"shared prompts, 2 ranks, small micro-batches": (True, 2, 280), "whole sides, 1 rank": (False, 1, "auto")}
MORE = {"shared prompts, 4 ranks": (True, 4, "auto"), "whole sides, 2 ranks, small micro-batches": (False, 2, 420)}
CASES = [(loss, placement) for loss in LOSSES for placement in PLACEMENTS] + [
    ("dpo_norm", placement) for placement in MORE
]
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margin"]


def flags(model, data, tmp_path, **changes) -> dict:
    return {
        "model_name_or_path": model,
        "dataset_mixer": data,
        "dtype": "float32",
        "max_seq_length": 512,
        "output_dir": tmp_path / "output",
        "cache_dir": tmp_path / "cache",
        **changes,
    }


@pytest.fixture(scope="module")
def pairs(tiny_llama):
    tokenizer = reference.load_tokenizer(tiny_llama)
    return [reference.pair_tokens(tokenizer, row) for row in models.preferences(NUM_PAIRS)]


@pytest.fixture(scope="module")
def plain(tiny_llama, pairs):
    """{loss: (the plain loop's records, the model it trained)}"""
    done = {}
    for name, settings in LOSSES.items():
        model = reference.load(tiny_llama)
        done[name] = reference.train_dpo(model, pairs, num_steps=NUM_STEPS, **SETTINGS, **settings), model.eval()
    return done


@pytest.fixture(scope="module")
def runs(tiny_llama, dpo_data, tmp_path_factory):
    """runs(loss, placement): the finished run of that case."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(loss: str, placement: str) -> launch.Finished:
        share, num_ranks, budget = (PLACEMENTS | MORE)[placement]
        given = flags(
            tiny_llama,
            dpo_data,
            root,
            **SETTINGS,
            **LOSSES[loss],
            share_prompt=share,
            max_train_steps=NUM_STEPS,
            max_tokens_per_micro_batch=budget,
            output_dir=root / f"{loss}, {placement}",
        )
        return launch.launch("train_dpo", given, num_ranks).succeeded()

    return run


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("loss", "placement"), CASES)
def test_every_step_equals_the_plain_loop(runs, plain, loss, placement):
    for seen, expected in zip(runs(loss, placement).metrics, plain[loss][0], strict=True):
        for column in ("train_loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected"):
            assert seen[column] == pytest.approx(expected[column], rel=1e-5, abs=1e-9), (column, expected["step"])
        for column in ("step", "samples", "epoch", "target_tokens"):
            assert seen[column] == pytest.approx(expected[column], rel=1e-12), column


@pytest.mark.parametrize(("loss", "placement"), CASES)
def test_rewards_equal_the_plain_loop(runs, plain, loss, placement):
    """To 1e-5 of the log-probabilities that they are differences of."""
    beta = LOSSES[loss]["beta"]
    for seen, expected in zip(runs(loss, placement).metrics, plain[loss][0], strict=True):
        tolerance = 1e-5 * beta * abs(expected["logps/chosen"])
        for column in REWARDS:
            assert seen[column] == pytest.approx(expected[column], rel=1e-5, abs=tolerance), (column, expected["step"])
        assert seen["rewards/margin"] == pytest.approx(
            seen["rewards/chosen"] - seen["rewards/rejected"], rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize(("loss", "placement"), CASES)
def test_accuracy_equals_the_plain_loop_and_a_tie_counts_half(runs, plain, loss, placement):
    seen = runs(loss, placement).column("rewards/accuracy")
    assert seen == pytest.approx([record["rewards/accuracy"] for record in plain[loss][0]], abs=1e-12)


def test_the_settings_bite(plain):
    """Clipping is active, the losses differ, and training moves them."""
    for name, (records, _) in plain.items():
        assert any(record["grad_norm"] > LOSSES[name]["max_grad_norm"] for record in records), name
        assert abs(records[-1]["train_loss"] - records[0]["train_loss"]) > 0.01, name
        assert any(abs(record["rewards/margin"]) > 0.01 for record in records), name
    assert len({round(records[-1]["train_loss"], 4) for records, _ in plain.values()}) == len(plain)


@pytest.mark.parametrize(("loss", "placement"), CASES)
def test_first_step_is_what_a_policy_that_is_its_reference_has(runs, loss, placement):
    first = runs(loss, placement).metrics[0]["train_loss"]
    if loss != "simpo":
        assert first == pytest.approx(1.0 if loss == "ipo" else math.log(2), abs=1e-5)  # ipo: (1 / (2 x 0.5))^2


@pytest.mark.parametrize(("loss", "placement"), CASES)
def test_exported_weights_are_those_of_the_plain_loop(runs, plain, loss, placement):
    exported = load_silently(runs(loss, placement).output_dir)
    for (name, seen), expected in zip(exported.named_parameters(), plain[loss][1].parameters(), strict=True):
        assert (seen - expected).norm() <= 1e-4 * expected.norm(), name


def test_tokens_are_counted_as_run_and_sharing_saves_the_prompts(runs, pairs):
    prompts = [min(chosen[1][0], rejected[1][0]) for chosen, rejected in pairs]
    whole = [len(chosen[0]) + len(rejected[0]) for chosen, rejected in pairs]
    order = [
        i for e in range(2) for i in torch.randperm(NUM_PAIRS, generator=torch.Generator().manual_seed(42 + e)).tolist()
    ]
    taken = order[: NUM_PAIRS + 4]  # 4 + 4 + 2, and 4 of the second epoch
    assert runs("dpo_norm", "whole sides, 1 rank").metrics[-1]["total_tokens"] == sum(whole[i] for i in taken)
    shared = runs("dpo_norm", "shared prompts, 4 ranks").metrics[-1]["total_tokens"]
    assert sum(whole[i] - prompts[i] for i in taken) >= shared > sum(whole[i] - 2 * prompts[i] for i in taken)


# ------------------------------------------------------------------ other shapes, real preferences


@pytest.mark.parametrize("architecture", ["qwen2", "olmo2"])
def test_other_architectures_equal_the_plain_loop(architecture, dpo_data, tmp_path):
    """Tied embeddings; normed queries and keys."""
    folder = models.make_model(tmp_path / "model", architecture)
    tokenizer = reference.load_tokenizer(folder)
    pairs = [reference.pair_tokens(tokenizer, row) for row in models.preferences(NUM_PAIRS)]
    expected = reference.train_dpo(reference.load(folder), pairs, num_steps=3, **SETTINGS, **LOSSES["dpo_norm"])
    run = launch.launch(
        "train_dpo",
        flags(
            folder,
            dpo_data,
            tmp_path,
            **SETTINGS,
            **LOSSES["dpo_norm"],
            max_train_steps=3,
            gradient_checkpointing="full",
        ),
        2,
    ).succeeded()
    for column in ("train_loss", "grad_norm", "logps/chosen", "logps/rejected"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column


@pytest.mark.parametrize("loss", LOSSES)
def test_real_preferences_equal_the_plain_loop(shared, tiny_llama, tmp_path_factory, loss):
    """Four full-batch steps on real texts, long prompts and truncated answers among them, in tiny tokens."""
    root, max_length = tmp_path_factory.mktemp("real"), 350
    rows = [json.loads(line) for line in (shared / "data" / "preferences.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(json.dumps(row)))[:9]
    tokenizer = reference.load_tokenizer(tiny_llama)
    pairs = [pair for row in rows if (pair := reference.pair_tokens(tokenizer, row, max_length))]
    assert len(pairs) >= 5 and any(len(side[0]) == max_length for pair in pairs for side in pair)
    settings = {"learning_rate": 1e-3, "global_batch_size": len(pairs)}
    expected = reference.train_dpo(reference.load(tiny_llama), pairs, num_steps=4, **settings, **LOSSES[loss])
    data = models.write_jsonl(root / "preferences.jsonl", rows)
    run = launch.launch(
        "train_dpo",
        flags(
            tiny_llama,
            data,
            root,
            **settings,
            **LOSSES[loss],
            warmup_ratio=0,
            num_train_epochs=4,
            max_tokens_per_micro_batch=1000,
            max_seq_length=max_length,
        ),
        2,
    ).succeeded()
    for column in ("train_loss", "grad_norm", "target_tokens", "logps/chosen", "logps/rejected"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column


def test_the_llama_3_tokenizer_equals_the_plain_loop(shared, tmp_path):
    """Tokens from the expected vectors: the shortest pairs, in one step."""

    def lines(path):
        return [json.loads(line) for line in (shared / "data" / path).read_text().splitlines()]

    rows = zip(lines("expected/preferences.tulu.1024.jsonl"), lines("preferences.jsonl"), strict=True)
    tokens, texts = zip(
        *sorted(rows, key=lambda row: len(row[0]["chosen_input_ids"] + row[0]["rejected_input_ids"]))[:3], strict=True
    )
    pairs = [
        tuple(
            (row[f"{side}_input_ids"], list(range(row["prompt_length"], len(row[f"{side}_input_ids"]))))
            for side in ("chosen", "rejected")
        )
        for row in tokens
    ]
    folder = models.make_model(
        tmp_path / "model",
        vocab_size=128256,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        eos_token_id=128001,
        tie_word_embeddings=True,
    )
    settings = {"learning_rate": 1e-3, "global_batch_size": 3, "max_grad_norm": 0.1}
    expected = reference.train_dpo(reference.load(folder), pairs, "dpo_norm", beta=5.0, num_steps=1, **settings)
    data = models.write_jsonl(tmp_path / "preferences.jsonl", texts)
    run = launch.launch(
        "train_dpo",
        flags(
            folder,
            data,
            tmp_path,
            **settings,
            warmup_ratio=0,
            max_train_steps=1,
            max_seq_length=1024,
            tokenizer_name_or_path=shared / "tokenizers" / "llama3",
        ),
    ).succeeded()
    for column in ("train_loss", "grad_norm", "target_tokens", "logps/chosen", "logps/rejected"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column


def test_real_launcher_torchrun_runs_it(tiny_llama, dpo_data, plain, tmp_path):
    run = launch.launch_for_real(
        "train_dpo",
        flags(tiny_llama, dpo_data, tmp_path, **SETTINGS, **LOSSES["dpo_norm"], max_train_steps=NUM_STEPS),
        2,
        "torchrun",
    ).succeeded()
    assert run.column("train_loss") == pytest.approx(
        [record["train_loss"] for record in plain["dpo_norm"][0]], rel=1e-5
    )
    assert (run.output_dir / "curves.png").is_file()


def test_another_reference_model_equals_the_plain_loop(tiny_llama, dpo_data, pairs, tmp_path):
    """Of another shape even: it is loaded first, in the policy's place."""
    other = models.make_model(tmp_path / "other", "qwen3", seed=5)
    settings = {**SETTINGS, **LOSSES["dpo_norm"], "ref_model_name_or_path": other, "max_train_steps": NUM_STEPS}
    run = launch.launch("train_dpo", flags(tiny_llama, dpo_data, tmp_path, **settings), 2).succeeded()
    expected = reference.train_dpo(
        reference.load(tiny_llama),
        pairs,
        num_steps=NUM_STEPS,
        reference_model=reference.load(other),
        **SETTINGS,
        **LOSSES["dpo_norm"],
    )
    assert abs(expected[0]["train_loss"] - math.log(2)) > 0.01
    for column in ("train_loss", "grad_norm", "logps/chosen", "rewards/margin"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-4), column


# ------------------------------------------------------------------ ends and mistakes


def test_a_first_step_that_is_not_ln_2_stops_with_3(tiny_llama, dpo_data, tmp_path):
    """Made so by a reference that is off: the packed DPO of another project starts at 6 x ln 2."""
    run = launch.launch(
        "train_dpo",
        flags(tiny_llama, dpo_data, tmp_path, max_train_steps=2, warmup_ratio=0),
        patches={"train_dpo.reference_logps": shifted_reference_logps},
    )
    assert run.exit_codes == [3]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step 1" in errors[0] and "0.6931" in errors[0] and "Traceback" not in run.stderr
    assert not run.metrics


def shifted_reference_logps(engine, data, *rest):
    logps, cached_in = reference_logps(engine, data, *rest)
    logps[:, 1] += 3.0
    return logps, cached_in


def with_another_vocabulary(folder):
    return models.make_model(folder, vocab_size=models.make_config().vocab_size + 8)


def without_weights(folder):
    models.make_config().save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return folder


def differing_prompts(path):
    rows = models.preferences(4)
    rows[2]["rejected"][0]["content"] += " so"
    return models.write_jsonl(path, rows)


MISTAKES = {
    "prompts that differ": (
        lambda t: {"dataset_mixer": differing_prompts(t / "rows.jsonl")},
        ["rows.jsonl:3", "message 1"],
    ),
    "beta 0": (lambda t: {"beta": 0}, ["--beta"]),
    "label_smoothing above a half": (lambda t: {"label_smoothing": 0.6}, ["--label_smoothing"]),
    "label_smoothing for ipo": (lambda t: {"label_smoothing": 0.1, "loss_type": "ipo"}, ["--label_smoothing", "ipo"]),
    "a pair above the budget": (
        lambda t: {"max_tokens_per_micro_batch": 60},
        ["60", "--max_tokens_per_micro_batch", ".jsonl:"],
    ),
    "a reference with another vocabulary": (
        lambda t: {"ref_model_name_or_path": with_another_vocabulary(t / "other")},
        ["--ref_model_name_or_path", "vocabulary"],
    ),
    "a reference for simpo": (
        lambda t: {"ref_model_name_or_path": t, "loss_type": "simpo"},
        ["--ref_model_name_or_path", "simpo"],
    ),
    "conversations in place of preferences": (
        lambda t: {"dataset_mixer": models.write_jsonl(t / "sft.jsonl", models.conversations(3))},
        ["sft.jsonl:1", "chosen"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_before_the_model_loads(name, dpo_data, tmp_path):
    make, named = MISTAKES[name]
    run = launch.launch("train_dpo", flags(without_weights(tmp_path / "model"), dpo_data, tmp_path) | make(tmp_path), 2)
    assert run.exit_codes == [2, 2], run.stderr[-2000:]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert all(words in errors[0] for words in named), errors


def test_odd_pairs_are_dropped_and_counted(tiny_llama, tmp_path):
    """Equal answers and empty answers: one odd row never stops a run."""
    rows = models.preferences(6)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[4]["chosen"][-1]["content"] = ""
    data = models.write_jsonl(tmp_path / "rows.jsonl", rows)
    run = launch.launch(
        "train_dpo", flags(tiny_llama, data, tmp_path, max_train_steps=1, global_batch_size=8)
    ).succeeded()
    assert run.metrics[0]["samples"] == 4
    assert "equal completions" in run.stdout and "empty completion" in run.stdout
