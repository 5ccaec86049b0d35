"""What both scripts promise, whole runs against a plain loop: pytest tests/test_train.py

The plain loop (reference.py) takes one sample at a time; a run may lay them out in any way, on any number of ranks.
"""

import functools
import json
import math
import re

import launch
import models
import pytest
import reference
import torch
from test_images import is_of_images
from test_model import load_silently

LONGEST = 271  # tokens of the longest conversation
NUM_SAMPLES = 10  # of sft_data and of dpo_data
# The last step of an epoch holds one conversation, or two pairs; clipping, weight decay and warm-up are on.
SFT = {"learning_rate": 1e-2, "warmup_ratio": 0.4, "weight_decay": 0.1, "max_grad_norm": 0.7, "global_batch_size": 3}
SFT |= {"lr_scheduler_type": "cosine", "adam_beta2": 0.95, "seed": 5}
DPO = {"learning_rate": 3e-3, "warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5, "global_batch_size": 4}
DPO_NORM = {"loss_type": "dpo_norm", "beta": 5.0}

PLAIN = {  # name -> (method, architecture, max_seq_length, steps, what the run and the plain loop are both told)
    "sft": ("sft", "llama", 512, 6, SFT),
    "sft qwen2": ("sft", "qwen2", 512, 5, SFT | {"global_batch_size": 4, "lr_scheduler_type": "linear"}),
    "sft olmo2": ("sft", "olmo2", 120, 5, SFT | {"global_batch_size": 4, "max_grad_norm": 0}),  # with truncation
    "sft qwen3_next": ("sft", "qwen3_next", 512, 2, SFT | {"global_batch_size": 4, "lr_scheduler_type": "polynomial"}),
    "sft qwen3_moe": ("sft", "qwen3_moe", 512, 3, SFT | {"global_batch_size": 4, "router_aux_loss_coef": 0.3}),
    "sft gemma3": ("sft", "gemma3", 512, 2, SFT | {"global_batch_size": 4}),  # of images too
    "sft gpt_oss": ("sft", "gpt_oss", 512, 3, SFT | {"global_batch_size": 4}),
    "sigmoid": ("dpo", "llama", 512, 4, DPO | {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.2}),
    "dpo_norm": ("dpo", "llama", 512, 4, DPO | DPO_NORM),
    "ipo": ("dpo", "llama", 512, 4, DPO | {"loss_type": "ipo", "beta": 0.5}),
    "simpo": ("dpo", "llama", 512, 4, DPO | {"loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.4}),
    "dpo mixtral": ("dpo", "mixtral", 512, 2, DPO | DPO_NORM | {"router_aux_loss_coef": 0.3}),
    "dpo gemma2": ("dpo", "gemma2", 512, 2, DPO | {"loss_type": "sigmoid", "beta": 0.1}),
    "dpo qwen3_5": ("dpo", "qwen3_5", 512, 2, DPO | DPO_NORM),  # of images too
}
COMPARED = {"train_loss", "router_aux_loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected"}
RUNS = [  # (of PLAIN, ranks, flags that change speed alone, what the ds_config keeps whole)
    ("sft", 1, {}, {}),
    ("sft", 2, {"max_tokens_per_micro_batch": LONGEST}, {}),
    ("sft", 2, {"max_tokens_per_micro_batch": LONGEST}, {"residency": "nothing"}),
    ("sft", 4, {"max_tokens_per_micro_batch": 300}, {"residency": "gradients"}),
    ("sft qwen2", 2, {"max_tokens_per_micro_batch": LONGEST, "gradient_checkpointing": 1}, {}),
    ("sft olmo2", 2, {"max_tokens_per_micro_batch": 120}, {}),
    ("sft qwen3_next", 2, {"max_tokens_per_micro_batch": LONGEST, "gradient_checkpointing": "full"}, {}),
    ("sft qwen3_moe", 4, {"max_tokens_per_micro_batch": LONGEST}, {"residency": "gradients"}),
    ("sft gemma3", 2, {"max_tokens_per_micro_batch": LONGEST, "gradient_checkpointing": "full"}, {}),
    ("sft gpt_oss", 2, {"max_tokens_per_micro_batch": LONGEST, "gradient_checkpointing": 1}, {}),
    ("dpo gemma2", 2, {"max_tokens_per_micro_batch": 280}, {}),
    ("dpo mixtral", 2, {"max_tokens_per_micro_batch": 280}, {"residency": "nothing"}),
    ("sigmoid", 2, {"max_tokens_per_micro_batch": 280}, {}),
    ("dpo_norm", 4, {"max_tokens_per_micro_batch": 280}, {}),
    ("dpo_norm", 2, {"share_prompt": False, "max_tokens_per_micro_batch": 420}, {}),
    ("ipo", 1, {"max_tokens_per_micro_batch": 280}, {}),
    ("simpo", 2, {"max_tokens_per_micro_batch": 280}, {}),
    ("dpo qwen3_5", 2, {"gradient_checkpointing": "full"}, {}),
]
IDS = [
    ", ".join([f"{run[0]} on {run[1]}", *(f"{name} {value}" for name, value in (run[2] | run[3]).items())])
    for run in RUNS
]
every_run = pytest.mark.parametrize("number", range(len(RUNS)), ids=IDS)
every_dpo = pytest.mark.parametrize("number", [i for i, run in enumerate(RUNS) if PLAIN[run[0]][0] == "dpo"])


class Runs:
    """Each model, plain loop and run, made once."""

    def __init__(self, root, data: dict):
        self.root, self.data = root, data

    @functools.cache  # noqa: B019
    def model(self, architecture: str):
        return models.make_model(self.root / architecture, architecture)

    @functools.cache  # noqa: B019
    def samples(self, name: str) -> list:
        method, architecture, longest, *_ = PLAIN[name]
        tokenizer = reference.load_tokenizer(self.model(architecture))
        if method == "dpo":
            return [reference.pair_tokens(tokenizer, row, longest) for row in models.preferences(NUM_SAMPLES)]
        rows = models.conversations(NUM_SAMPLES)
        return [reference.conversation_tokens(tokenizer, row["messages"], longest) for row in rows]

    @functools.cache  # noqa: B019
    def plain(self, name: str) -> tuple[list[dict], torch.nn.Module]:
        """(the plain loop's records, the model it trained)."""
        method, architecture, _, num_steps, settings = PLAIN[name]
        model = reference.load(self.model(architecture))
        train = getattr(reference, f"train_{method}")
        return train(model, self.samples(name), num_steps=num_steps, **settings), model.eval()

    @functools.cache  # noqa: B019
    def __call__(self, number: int) -> launch.Finished:
        name, num_ranks, layout, residency = RUNS[number]
        method, architecture, longest, num_steps, settings = PLAIN[name]
        ds_config = self.root / f"{number}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": 3}} | residency))
        changes = {"max_seq_length": longest, "max_train_steps": num_steps, "ds_config": ds_config}
        changes |= {"output_dir": self.root / f"run_{number}"} | settings | layout
        flags = launch.flags(self.model(architecture), self.data[method], self.root, **changes)
        return launch.launch(f"train_{method}", flags, num_ranks).succeeded()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_data, dpo_data) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), {"sft": sft_data, "dpo": dpo_data})


# ------------------------------------------------------------------ the numbers


@every_run
def test_every_step_equals_the_plain_loop(runs, number):
    name = RUNS[number][0]
    for seen, expected in zip(runs(number).metrics, runs.plain(name)[0], strict=True):
        for column in ("step", "samples", "epoch", "target_tokens"):
            assert seen[column] == pytest.approx(expected[column], rel=1e-12), column
        for column in COMPARED & {*expected}:
            assert seen[column] == pytest.approx(expected[column], rel=1e-5, abs=1e-9), (column, expected["step"])


@every_dpo
def test_rewards_equal_the_plain_loop(runs, number):
    """To 1e-5 of the log-probabilities that they are differences of; accuracy exactly, a tie being a half."""
    name = RUNS[number][0]
    for seen, expected in zip(runs(number).metrics, runs.plain(name)[0], strict=True):
        tolerance = 1e-5 * PLAIN[name][4]["beta"] * abs(expected["logps/chosen"])
        for column in ("rewards/chosen", "rewards/rejected", "rewards/margin"):
            assert seen[column] == pytest.approx(expected[column], rel=1e-5, abs=tolerance), (column, expected["step"])
        difference = seen["rewards/chosen"] - seen["rewards/rejected"]
        assert seen["rewards/margin"] == pytest.approx(difference, rel=1e-9, abs=1e-9)
        if expected["step"] > 1 or name == "simpo":  # at step 1 every pair is a tie but for rounding
            assert seen["rewards/accuracy"] == pytest.approx(expected["rewards/accuracy"], abs=1e-12)


@every_dpo
def test_step_1_is_what_a_policy_that_is_its_reference_has(runs, number):
    expected = {"ipo": 1.0, "simpo": None}.get(RUNS[number][0], math.log(2))  # ipo: (1 / (2 x 0.5))^2
    assert expected is None or runs(number).metrics[0]["train_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_settings_bite(runs, name):
    """Or equal runs would prove little: clipping is active in some step, rates differ, training moves the loss."""
    records, limit = runs.plain(name)[0], PLAIN[name][4]["max_grad_norm"]
    assert any(record["grad_norm"] > limit for record in records)
    assert len({record["learning_rate"] for record in records}) >= len(records) - 1
    assert abs(records[-1]["train_loss"] - records[0]["train_loss"]) > 0.01
    assert PLAIN[name][0] == "sft" or any(abs(record["rewards/margin"]) > 0.01 for record in records)


@every_run
def test_exported_weights_are_those_of_the_plain_loop(runs, number):
    load_silently(runs(number).output_dir)
    exported, plain = reference.load(runs(number).output_dir).eval(), runs.plain(RUNS[number][0])[1]
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-3, atol=2e-3)
    for (name, seen), expected in zip(exported.named_parameters(), plain.parameters(), strict=True):
        assert (seen - expected).norm() <= 1e-4 * expected.norm(), name


# ------------------------------------------------------------------ the records


@every_run
def test_metrics_are_the_contracts(runs, number):
    name, num_ranks, layout, _ = RUNS[number]
    method, samples, budget = PLAIN[name][0], runs.samples(name), layout.get("max_tokens_per_micro_batch", 4096)
    total = 0
    for record in runs(number).metrics:
        own = {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"}
        own |= {"logps/chosen", "logps/rejected"}
        assert {key for key in record if "/" in key} == (own if method == "dpo" else set())
        tokens, total = record["total_tokens"] - total, record["total_tokens"]
        assert record["tokens_per_second"] == pytest.approx(tokens / record["step_seconds"])
        assert record["per_device_tps"] == pytest.approx(record["tokens_per_second"] / num_ranks)
        assert record["packing_efficiency"] == pytest.approx(tokens / (budget * num_ranks * record["micro_batches"]))
        assert record["micro_batches"] >= -(-tokens // (budget * num_ranks)) and record["max_memory_gb"] > 0.01
    taken, seed = [], PLAIN[name][4].get("seed", 42)
    for epoch in range(2):
        taken += torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    taken = taken[: record["samples"]]
    if method == "sft":
        assert total == sum(len(samples[i][0]) for i in taken)
    else:  # a shared prompt's last token stands before each answer
        whole = sum(len(side[0]) for i in taken for side in samples[i])
        prompts = sum(min(side[1][0] for side in samples[i]) for i in taken)
        is_shared = layout.get("share_prompt", True)
        assert whole - prompts >= total > whole - 2 * prompts if is_shared else total == whole


@every_run
def test_run_config_says_what_was_run_and_that_parameters_were_partitioned(runs, number):
    name, num_ranks, layout, residency = RUNS[number]
    _, architecture, _, num_steps, settings = PLAIN[name]
    run = json.loads((runs(number).output_dir / "run_config.json").read_text())
    assert run["config"]["learning_rate"] == settings["learning_rate"]
    assert run["num_steps"] == run["result"]["steps"] == num_steps and run["world_size"] == num_ranks
    assert run["result"]["rank_agreement"] is True
    model = reference.load(runs.model(architecture))
    of_text = (p.numel() for name, p in model.named_parameters() if not is_of_images(name))
    num_parameters, held = sum(of_text), run["zero"]["partitioned_parameters_per_rank"]
    assert run["zero"]["num_parameters"] == num_parameters and len(held) == num_ranks
    assert all(num_parameters / num_ranks <= shard < num_parameters / num_ranks + 100 for shard in held)
    assert run["residency"] == ({"residency": "all"} | residency)["residency"]
    recomputed = {"full": 2}.get(*[layout.get("gradient_checkpointing", 0)] * 2)
    assert run["layers"] == {"number": 2, "recomputed": recomputed, "compiled": False}
    assert run["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_finished_run_is_not_run_again(runs, method):
    number = next(i for i, run in enumerate(RUNS) if PLAIN[run[0]][0] == method)
    before = {path: path.stat().st_mtime_ns for path in runs(number).output_dir.glob("[!.]*.*")}
    again = runs.__call__.__wrapped__(runs, number)
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in again.output_dir.glob("[!.]*.*")} == before


# ------------------------------------------------------------------ mistakes: exit 2, one line, before the model loads


def without_weights(folder, **changes):
    models.make_config(**changes).save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return folder


def written(path, *rows):
    return models.write_jsonl(path, rows)


def that_cannot_be_exported(folder):
    """transformers reads these settings, and refuses to write them."""
    return written(models.make_model(folder) / "generation_config.json", {"do_sample": False, "top_p": 0.5}).parent


ONE_PAIR = models.preferences(1)[0]
OTHER_PROMPT = ONE_PAIR | {"rejected": [{"role": "user", "content": "so"}, *ONE_PAIR["rejected"][1:]]}
# (method, ranks, folder -> the flags that differ, what the line must name): one for each room that finds any
MISTAKES = [
    ("sft", 2, lambda t: {"dataset_mixer": written(t / "wrong.jsonl", {"text": ""})}, ["wrong.jsonl"]),
    ("sft", 1, lambda t: {"model_name_or_path": t / "absent"}, ["absent"]),
    ("sft", 1, lambda t: {"model_name_or_path": without_weights(t / "m", vocab_size=100)}, ["100 rows"]),
    ("sft", 1, lambda t: {"ds_config": written(t / "d.json", {"gradient_clipping": 1.0})}, ["d.json"]),
    ("sft", 1, lambda t: {"max_tokens_per_micro_batch": 100}, ["--max_tokens_per_micro_batch", "100", str(LONGEST)]),
    ("sft", 1, lambda t: {"model_name_or_path": without_weights(t / "m")}, ["model.safetensors"]),
    ("sft", 1, lambda t: {"model_name_or_path": that_cannot_be_exported(t / "m")}, ["cannot be written"]),
    ("sft", 1, lambda t: {"resume": t}, ["--resume"]),
    ("sft", 1, lambda t: {"output_dir": written(t / "file", {})}, ["--output_dir"]),
    ("dpo", 1, lambda t: {"dataset_mixer": written(t / "x.jsonl", ONE_PAIR, OTHER_PROMPT)}, ["x.jsonl", "--allow_"]),
    ("dpo", 2, lambda t: {"label_smoothing": 0.1, "loss_type": "ipo"}, ["--label_smoothing", "ipo"]),
    ("dpo", 1, lambda t: {"ref_model_name_or_path": models.make_model(t / "m", vocab_size=400)}, ["--ref_model_name"]),
]


def never(*_):
    raise AssertionError("the model is loaded")


@pytest.mark.parametrize(("method", "num_ranks", "make", "named"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_before_the_model_loads(runs, tmp_path, method, num_ranks, make, named):
    given = launch.flags(runs.model("llama"), runs.data[method], tmp_path) | make(tmp_path)
    error = launch.launch(f"train_{method}", given, num_ranks, {"common.model.load.load_partitioned": never}).refused(2)
    assert all(words in error for words in named), error
    assert not list(tmp_path.glob("output/metrics.jsonl"))


# ------------------------------------------------------------------ numbers that are not finite


def test_the_sample_that_makes_a_loss_not_finite_is_named_with_its_rank_and_tokens(tmp_path):
    """One row of the embedding is so large that attention, without a norm before it, overflows; one pair has it."""
    rows, culprit = models.preferences(6), 3
    for side in ("chosen", "rejected"):
        rows[culprit][side][0]["content"] += " \u00df"
    data = models.write_jsonl(tmp_path / "data.jsonl", rows)
    folder = models.make_model(tmp_path / "model", "olmo2")
    tokenizer, weights = reference.load_tokenizer(folder), reference.load(folder)
    checked = torch.randint(weights.config.vocab_size, (24 + 17,), generator=torch.Generator().manual_seed(0)).tolist()
    token = next(t for t in tokenizer("\u00df")["input_ids"] if t not in checked)  # by the check of the packed forward
    with torch.no_grad():
        weights.get_input_embeddings().weight[token] = 3e38
    weights.save_pretrained(folder)
    given = launch.flags(folder, data, tmp_path, global_batch_size=6, max_tokens_per_micro_batch=LONGEST)
    error = launch.launch("train_dpo", given, 2).refused(3)
    assert error.startswith("error: step 1: the loss is")
    ((_, _, tokens, named),) = re.findall(r"rank ([01]), micro-batch (\d) of ([\d,]+) tokens: ([^;)]*)", error)
    rows_named = [int(row) for row in re.findall(r"data.jsonl:(\d+)", named)]
    assert culprit + 1 in rows_named and len(rows_named) < 6 and int(tokens.replace(",", "")) <= LONGEST
