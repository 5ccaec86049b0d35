"""train_sft.py, whole runs against a plain loop: pytest tests/test_train_sft.py"""

import functools
import json
import os
import random
import re
import resource

import launch
import models
import pytest
import reference
import torch
from test_model import load_silently

from common.zero.engine import set_learning_rate

# Clipping is active, weight decay and warm-up are on, the last step of an epoch holds one sample.
SETTINGS = {
    "learning_rate": 1e-2,
    "warmup_ratio": 0.4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.7,
    "global_batch_size": 3,
    "lr_scheduler_type": "cosine",
    "adam_beta2": 0.95,
    "seed": 5,
}
NUM_STEPS, NUM_SAMPLES = 6, 10
LONGEST = 271
RUNS = {  # name -> (ranks, max_tokens_per_micro_batch, what ds_config says)
    "1 rank": (1, "auto", {}),
    "1 rank, small micro-batches": (1, LONGEST, {}),
    "2 ranks": (2, "auto", {}),
    "2 ranks, small micro-batches": (2, LONGEST, {}),
    "4 ranks": (4, 300, {}),
    "2 ranks, nothing kept whole": (2, LONGEST, {"residency": "nothing"}),
    "4 ranks, gradients whole": (4, 300, {"residency": "gradients"}),
}


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
def samples(tiny_llama):
    tokenizer = reference.load_tokenizer(tiny_llama)
    tokens = [reference.conversation_tokens(tokenizer, row["messages"]) for row in models.conversations(NUM_SAMPLES)]
    assert max(len(ids) for ids, _ in tokens) == LONGEST
    return tokens


@pytest.fixture(scope="module")
def plain(tiny_llama, samples):
    """(the records of the plain loop, the model it trained)"""
    model = reference.load(tiny_llama)
    return reference.train_sft(model, samples, num_steps=NUM_STEPS, **SETTINGS), model.eval()


@pytest.fixture(scope="module")
def runs(tiny_llama, sft_data, tmp_path_factory):
    """runs(name): the finished run of that name."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name: str) -> launch.Finished:
        num_ranks, budget, residency = RUNS[name]
        ds_config = root / f"{name}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": 3}} | residency))
        return launch.launch(
            "train_sft",
            flags(
                tiny_llama,
                sft_data,
                root,
                **SETTINGS,
                max_train_steps=NUM_STEPS,
                output_dir=root / name,
                max_tokens_per_micro_batch=budget,
                ds_config=ds_config,
            ),
            num_ranks,
        ).succeeded()

    return run


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("column", ["train_loss", "grad_norm", "learning_rate"])
def test_every_step_equals_the_plain_loop(runs, plain, name, column):
    """Any number of ranks, any micro-batches, steps with fewer samples than ranks."""
    expected = [record[column] for record in plain[0]]
    assert runs(name).column(column) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_settings_bite(plain):
    """Or equal runs would prove little: clipping is active in some steps and the rates differ."""
    assert sum(record["grad_norm"] > SETTINGS["max_grad_norm"] for record in plain[0]) >= 3
    assert len({record["learning_rate"] for record in plain[0]}) >= 5


@pytest.mark.parametrize("name", RUNS)
def test_exported_weights_are_those_of_the_plain_loop(runs, plain, name):
    exported = load_silently(runs(name).output_dir)
    with torch.no_grad():
        ids = torch.arange(60)[None]
        torch.testing.assert_close(exported(input_ids=ids).logits, plain[1](input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    for (name, seen), expected in zip(exported.named_parameters(), plain[1].parameters(), strict=True):
        assert (seen - expected).norm() <= 1e-4 * expected.norm(), name


# ------------------------------------------------------------------ the records


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_the_contracts(runs, plain, samples, name):
    num_ranks, budget, _ = RUNS[name]
    budget = 4096 if budget == "auto" else budget
    tokens = 0
    visited = [i for e in range(2) for i in torch.randperm(10, generator=torch.Generator().manual_seed(5 + e)).tolist()]
    steps = [visited[0:3], visited[3:6], visited[6:9], visited[9:10], visited[10:13], visited[13:16]]
    for record, expected, taken in zip(runs(name).metrics, plain[0], steps, strict=True):
        assert {
            "step",
            "epoch",
            "train_loss",
            "learning_rate",
            "grad_norm",
            "total_tokens",
            "target_tokens",
            "samples",
            "step_seconds",
            "tokens_per_second",
            "per_device_tps",
            "max_memory_gb",
            "micro_batches",
            "packing_efficiency",
        } <= record.keys()
        assert not any(key.startswith(("rewards", "logps")) for key in record)
        for column in ("step", "samples", "epoch", "target_tokens"):
            assert record[column] == pytest.approx(expected[column], rel=1e-12), column
        step_tokens = sum(len(samples[i][0]) for i in taken)
        tokens += step_tokens
        assert record["total_tokens"] == tokens
        assert record["tokens_per_second"] == pytest.approx(step_tokens / record["step_seconds"])
        assert record["per_device_tps"] == pytest.approx(record["tokens_per_second"] / num_ranks)
        assert record["packing_efficiency"] == pytest.approx(
            step_tokens / (budget * num_ranks * record["micro_batches"])
        )
        assert record["micro_batches"] >= -(-step_tokens // (budget * num_ranks))
        assert record["max_memory_gb"] > 0.01


@pytest.mark.parametrize("name", RUNS)
def test_run_config_says_what_was_run_and_that_parameters_were_partitioned(runs, tiny_llama, name):
    run = json.loads((runs(name).output_dir / "run_config.json").read_text())
    num_ranks, _, residency = RUNS[name]
    num_parameters = sum(p.numel() for p in reference.load(tiny_llama).parameters())
    assert run["config"]["learning_rate"] == 1e-2 and run["num_steps"] == NUM_STEPS and run["world_size"] == num_ranks
    assert run["zero"]["num_parameters"] == num_parameters
    held = run["zero"]["partitioned_parameters_per_rank"]
    assert len(held) == num_ranks
    assert all(num_parameters / num_ranks <= part < num_parameters / num_ranks + 100 for part in held)
    assert run["residency"] == residency.get("residency", "all")
    num_layers = len(reference.load(tiny_llama).model.layers)
    assert run["layers"] == {"number": num_layers, "recomputed": 0, "compiled": False}
    assert run["result"]["steps"] == NUM_STEPS and run["result"]["rank_agreement"] is True
    assert run["versions"]["torch"] == torch.__version__


def test_a_finished_run_is_not_run_again(runs, tiny_llama, sft_data, tmp_path):
    done = runs("1 rank")
    before = (done.output_dir / "metrics.jsonl").read_bytes()
    again = launch.launch(
        "train_sft",
        flags(tiny_llama, sft_data, tmp_path, **SETTINGS, max_train_steps=NUM_STEPS, output_dir=done.output_dir),
    ).succeeded()
    assert "nothing to do" in again.stdout
    assert (done.output_dir / "metrics.jsonl").read_bytes() == before


# ------------------------------------------------------------------ other shapes, other flags


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", {"gradient_checkpointing": 1, "lr_scheduler_type": "linear"}),
        ("olmo2", {"max_grad_norm": 0, "max_seq_length": 120}),
        ("qwen3", {"gradient_checkpointing": "full", "lr_scheduler_type": "polynomial"}),
    ],
)
def test_other_architectures_and_flags_equal_the_plain_loop(architecture, changes, sft_data, tmp_path):
    """Tied embeddings and biases; truncation; no clipping; recomputed activations."""
    folder = models.make_model(tmp_path / "model", architecture)
    tokenizer = reference.load_tokenizer(folder)
    samples = [
        reference.conversation_tokens(tokenizer, row["messages"], changes.get("max_seq_length", 512))
        for row in models.conversations(NUM_SAMPLES)
    ]
    settings = {**SETTINGS, "global_batch_size": 4, **changes}
    plain_settings = {
        name: value for name, value in settings.items() if name not in ("gradient_checkpointing", "max_seq_length")
    }
    expected = reference.train_sft(reference.load(folder), samples, num_steps=5, **plain_settings)
    run = launch.launch(
        "train_sft",
        flags(
            folder,
            sft_data,
            tmp_path,
            max_train_steps=5,
            max_tokens_per_micro_batch=max(len(ids) for ids, _ in samples),
            **settings,
        ),
        2,
    ).succeeded()
    for column in ("train_loss", "grad_norm"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column
    load_silently(run.output_dir)


def test_real_conversations_equal_the_plain_loop(shared, tmp_path):
    """Tokens and spans from the expected vectors, the Llama-3 tokenizer."""

    def rows(path):
        return [json.loads(line) for line in (shared / "data" / path).read_text().splitlines()][:4]

    samples = [expected_sample(row) for row in rows("expected/instructions.tulu.256.jsonl")]
    vocabulary = {"vocab_size": 128256, "hidden_size": 8, "intermediate_size": 16, "eos_token_id": 128001}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    folder = models.make_model(tmp_path / "model", **vocabulary, **heads)
    data = models.write_jsonl(tmp_path / "data.jsonl", rows("instructions.jsonl"))
    settings = {"learning_rate": 1e-3, "global_batch_size": 2, "max_grad_norm": 1.0}
    expected = reference.train_sft(reference.load(folder), samples, num_steps=2, **settings)
    tokenizer = {"tokenizer_name_or_path": shared / "tokenizers" / "llama3", "max_seq_length": 256}
    given = flags(folder, data, tmp_path, **settings, warmup_ratio=0, max_train_steps=2) | tokenizer
    run = launch.launch("train_sft", given, 2).succeeded()
    for column in ("train_loss", "grad_norm", "target_tokens"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column


def expected_sample(row: dict) -> tuple[list[int], list[int]]:
    ids = row["input_ids"]
    return ids, [t for start, end in row["trained_spans"] for t in range(max(start, 1), end)]


def test_bfloat16_trains_in_it_and_keeps_float32_masters(sft_data, tmp_path):
    """20 steps whose size is far below bfloat16's resolution still move the weights; the export is bfloat16."""
    folder = models.make_model(tmp_path / "model", dtype=torch.bfloat16)
    run = launch.launch(
        "train_sft",
        flags(
            folder,
            sft_data,
            tmp_path,
            dtype="bfloat16",
            learning_rate=4e-5,
            weight_decay=0,
            warmup_ratio=0,
            lr_scheduler_type="constant",
            global_batch_size=1,
            max_train_steps=20,
        ),
    ).succeeded()
    start, end = (load_silently(path).state_dict() for path in (folder, run.output_dir))
    assert all(tensor.dtype == torch.bfloat16 for tensor in end.values())
    moved = [
        (end[name] != start[name]).float().mean().item()
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    ]
    assert min(moved) > 0.2, "steps of 4e-5 were lost to rounding"


# ------------------------------------------------------------------ the exported folder


@pytest.fixture(scope="module")
def memorized(tiny_llama, tmp_path_factory):
    """(exported folder, its two conversations): trained until it knows them."""
    root = tmp_path_factory.mktemp("memorized")
    rng = random.Random(1)
    rows = [
        {
            "messages": [
                {"role": "user", "content": models.sentence(rng)},
                {"role": "assistant", "content": models.sentence(rng, 2, 4)},
            ]
        }
        for _ in range(2)
    ]
    data = models.write_jsonl(root / "data.jsonl", rows)
    run = launch.launch(
        "train_sft", flags(tiny_llama, data, root, learning_rate=1e-2, global_batch_size=2, num_train_epochs=60)
    ).succeeded()
    assert run.column("train_loss")[-1] < 0.1
    return run.output_dir, rows


def test_greedy_generation_answers_and_stops_at_eos(memorized):
    folder, rows = memorized
    model, tokenizer = load_silently(folder), reference.load_tokenizer(folder)
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out) == row["messages"][1]["content"] + "<eos>"


def test_exported_tokenizer_renders_what_was_trained(memorized):
    tokenizer = reference.load_tokenizer(memorized[0])
    for row in models.conversations(6):
        text, _ = reference.render_tulu(row["messages"], "<eos>")
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == text
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        assert ids == reference.conversation_tokens(tokenizer, row["messages"])[0]


def test_export_holds_every_file_of_the_contract(memorized):
    names = {path.name for path in memorized[0].iterdir()}
    assert {
        "config.json",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "run_config.json",
        "metrics.jsonl",
    } <= names
    assert not [name for name in names if name.startswith(".")]


# ------------------------------------------------------------------ ends


def test_weights_that_are_not_finite_are_not_written(tiny_llama, sft_data, tmp_path):
    """The last update made them, so that no loss and no gradient showed it."""
    run = launch.launch("train_sft", flags(tiny_llama, sft_data, tmp_path, weight_decay=1e300, max_train_steps=1), 2)
    assert run.exit_codes == [3, 3]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step 1: there are weights that are not finite" in errors[0]
    assert not list(run.output_dir.glob("*.safetensors*"))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_in_the_folder_are_named_before_the_first_step(sft_data, tmp_path, value):
    """In one row of the embedding whose token is in no sample, so that no loss shows it."""
    folder = models.make_model(tmp_path / "model")
    weights = reference.load(folder)
    with torch.no_grad():
        weights.get_input_embeddings().weight[models.VOCAB - 1, 3] = value
    weights.save_pretrained(folder)
    run = launch.launch("train_sft", flags(folder, sft_data, tmp_path, max_train_steps=1), 2)
    assert run.exit_codes == [2, 2]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].endswith("in float32, are NaN or infinite: in model.embed_tokens.weight")
    assert not (run.output_dir / "metrics.jsonl").exists() and "Traceback" not in run.stderr


def test_a_loss_that_is_not_finite_stops_with_3_and_keeps_the_last_checkpoint(tiny_llama, sft_data, tmp_path):
    """A first update so large that the second step's loss is not finite."""
    run = launch.launch(
        "train_sft",
        flags(
            tiny_llama,
            sft_data,
            tmp_path,
            learning_rate=1e30,
            warmup_ratio=0,
            global_batch_size=3,
            max_train_steps=4,
            checkpointing_steps=1,
        ),
        2,
    )
    assert run.exit_codes == [3, 3]
    assert run.column("step") == [1]
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert not list(run.output_dir.glob("*.safetensors")), "nothing is exported"
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert "step 2" in errors[0] and "--learning_rate" in errors[0]
    for i in order[3:6]:
        assert re.search(
            rf"rank [01], micro-batch 1 of \d+ tokens: [^;]*conversations.jsonl:[\d, ]*\b{i + 1}\b", errors[0]
        )


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_sample_that_makes_a_loss_not_finite_is_named_with_its_rank_and_tokens(tmp_path, method):
    """One row of the embedding is so large that attention without a norm before it overflows; one sample has that token."""
    rows = models.conversations(6) if method == "sft" else models.preferences(6)
    for messages in [rows[3]["messages"]] if method == "sft" else [rows[3]["chosen"], rows[3]["rejected"]]:
        messages[0]["content"] += " \u00df"
    data = models.write_jsonl(tmp_path / "data.jsonl", rows)
    folder = models.make_model(tmp_path / "model", "olmo2")
    tokenizer, weights = reference.load_tokenizer(folder), reference.load(folder)
    if method == "sft":
        tokens = [reference.conversation_tokens(tokenizer, row["messages"])[0] for row in rows]
    else:
        tokens = [reference.pair_tokens(tokenizer, row)[0][0] for row in rows]
    checked = torch.randint(weights.config.vocab_size, (24 + 17,), generator=torch.Generator().manual_seed(0)).tolist()
    alone = [
        (i, t)
        for i, ids in enumerate(tokens)
        for t in ids[:-2]
        if t not in checked and sum(t in other for other in tokens) == 1
    ]
    culprit, token = alone[0]
    with torch.no_grad():
        weights.get_input_embeddings().weight[token] = 3e38
    weights.save_pretrained(folder)
    run = launch.launch(
        f"train_{method}", flags(folder, data, tmp_path, global_batch_size=6, max_tokens_per_micro_batch=LONGEST), 2
    )
    assert run.exit_codes == [3, 3], run.stderr[-1000:]
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: step 1: the loss is"))
    found = re.findall(r"rank ([01]), micro-batch (\d) of ([\d,]+) tokens: ([^;)]*)", error)
    assert len(found) == 1, error
    named = [int(row) for row in found[0][3].rpartition("data.jsonl:")[2].split(", ")]
    assert culprit + 1 in named and len(named) < 6 and int(found[0][2].replace(",", "")) <= LONGEST


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_stops_with_3_and_updates_nothing(sft_data, tmp_path, dtype):
    """Finite log-probabilities whose derivative is too large: a norm of hidden states close to zero."""
    folder = models.make_model(tmp_path / "model", dtype=getattr(torch, dtype), rms_norm_eps=0.0)
    weights = reference.load(folder, getattr(torch, dtype))
    with torch.no_grad():
        weights.model.embed_tokens.weight.mul_(1e-20)
        for layer in weights.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    weights.save_pretrained(folder)
    run = launch.launch(
        "train_sft",
        flags(
            folder,
            sft_data,
            tmp_path,
            dtype=dtype,
            learning_rate=1e-3,
            warmup_ratio=0,
            global_batch_size=3,
            max_train_steps=2,
            checkpointing_steps=1,
        ),
        2,
    )
    assert run.exit_codes == [3, 3], run.stderr[-1000:]
    assert not run.metrics and not (run.output_dir / "checkpoints").exists()
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "step 1: the gradient norm" in errors[0]


def short_of_memory(engine, learning_rate: float) -> None:
    """set_learning_rate that leaves rank 1 no memory to speak of in the second step, as another program might."""
    short_of_memory.calls = getattr(short_of_memory, "calls", 0) + 1
    if short_of_memory.calls == 2 and os.environ["RANK"] == "1":
        in_use = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
        limit = int(in_use.split()[1]) * 1024 + 8 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    set_learning_rate(engine, learning_rate)


def test_running_out_of_memory_stops_with_3_says_what_to_change_and_keeps_the_last_checkpoint(tmp_path):
    model = models.make_model(tmp_path / "model", max_position_embeddings=8192)
    rows = [[{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f " * 700}] for _ in range(4)]
    data = models.write_jsonl(tmp_path / "long.jsonl", [{"messages": messages} for messages in rows])
    run = launch.launch(
        "train_sft",
        flags(
            model, data, tmp_path, max_seq_length=4096, global_batch_size=2, max_train_steps=4, checkpointing_steps=1
        ),
        2,
        patches={"train_sft.set_learning_rate": short_of_memory},
    )
    assert run.exit_codes[1] == 3 and run.exit_codes[0] != 0, run.stderr[-2000:]
    assert run.column("step") == [1]
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert not list(run.output_dir.glob("*.safetensors")), "nothing is exported"
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: step 2: out of memory"))
    length = len(reference.conversation_tokens(reference.load_tokenizer(model), rows[0])[0])
    assert f"micro-batch of {length:,} tokens (at most 4,096)" in error
    assert "Try --gradient_checkpointing full, a lower --max_seq_length, or more devices" in error, (
        "no smaller one holds it"
    )


def update_without_memory(engine, learning_rate: float) -> None:
    """set_learning_rate for an optimizer that needs more than there is."""
    engine.optimizer.step = lambda: torch.empty(2**46)


def no_memory(*_, **__) -> None:
    torch.empty(2**46)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"train_sft.set_learning_rate": update_without_memory}, ("error: step 1, update: out of memory", "offloads")),
        ({"train_sft.build_engine": no_memory}, ("error: rank 0: out of memory before or after", "offloads")),
    ],
)
def test_running_out_of_memory_elsewhere_is_one_line_and_3(tiny_llama, sft_data, tmp_path, patch, said):
    run = launch.launch("train_sft", flags(tiny_llama, sft_data, tmp_path, global_batch_size=2), 1, patch)
    assert run.exit_codes == [3] and "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith(said[0]) and line.endswith(said[1])]


# ------------------------------------------------------------------ through the real launchers


def test_deepspeed_runs_it_and_the_curves_are_drawn(tiny_llama, sft_data, plain, tmp_path):
    run = launch.launch_for_real(
        "train_sft", flags(tiny_llama, sft_data, tmp_path, **SETTINGS, max_train_steps=NUM_STEPS), 2
    ).succeeded()
    assert run.column("train_loss") == pytest.approx([record["train_loss"] for record in plain[0]], rel=1e-5)
    assert (run.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Steps: 6" in (run.output_dir / "README.md").read_text()


def test_deepspeed_passes_on_a_mistake_as_2_with_one_line(tmp_path):
    run = launch.launch_for_real("train_sft", {"learning_rat": "1e-5", "output_dir": tmp_path / "output"}, 2)
    assert run.exit_codes == [2]
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        "error: unknown flag --learning_rat; did you mean --learning_rate?"
    ]
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "output").exists()


# ------------------------------------------------------------------ mistakes: exit 2, one line, before the model loads


def without_weights(folder, model_type="llama", **changes):
    """A model folder that would fail if its weights were read: the mistake has to be found before."""
    config = (
        models.make_config(model_type, **changes)
        if model_type in models.ARCHITECTURES
        else models.AutoConfig.for_model(model_type, **changes)
    )
    config.save_pretrained(folder)
    models.make_tokenizer().save_pretrained(folder)
    return folder


def wrong_row(path):
    return models.write_jsonl(path, [*models.conversations(2), {"text": "no messages"}, *models.conversations(2)])


def ds_config(path, content):
    path.write_text(json.dumps(content))
    return path


MISTAKES = {  # name -> (folder -> the flags that differ, what the line must say)
    "a data file that is not there": (lambda t: {"dataset_mixer": t / "absent.jsonl"}, ["absent.jsonl"]),
    "a row without messages": (
        lambda t: {"dataset_mixer": wrong_row(t / "wrong.jsonl")},
        ["wrong.jsonl:3", "messages"],
    ),
    "a model folder that is not there": (lambda t: {"model_name_or_path": t / "absent"}, ["absent", "no such folder"]),
    "a tokenizer larger than the embedding": (
        lambda t: {"model_name_or_path": without_weights(t / "m", vocab_size=100)},
        ["100 rows"],
    ),
    "a sliding window": (
        lambda t: {"model_name_or_path": without_weights(t / "m", "mistral", sliding_window=64)},
        ["sliding window of 64"],
    ),
    "soft-capping": (lambda t: {"model_name_or_path": without_weights(t / "m", "gemma2")}, ["gemma2", "softcap"]),
    "experts": (lambda t: {"model_name_or_path": without_weights(t / "m", "mixtral")}, ["mixtral", "experts"]),
    "dropout": (
        lambda t: {"model_name_or_path": without_weights(t / "m", attention_dropout=0.1)},
        ["attention_dropout"],
    ),
    "logit scaling": (
        lambda t: {"model_name_or_path": without_weights(t / "m", "granite", logits_scaling=2.0)},
        ["logits_scaling"],
    ),
    "a stateful model": (lambda t: {"model_name_or_path": without_weights(t / "m", "mamba")}, ["mamba"]),
    "a ds_config with an owned value": (
        lambda t: {"ds_config": ds_config(t / "d.json", {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0})},
        ["gradient_clipping", "--max_grad_norm"],
    ),
    "a ds_config with auto": (
        lambda t: {
            "ds_config": ds_config(t / "d.json", {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
        },
        ["reduce_bucket_size", "auto"],
    ),
    "a budget below the longest sample": (lambda t: {"max_tokens_per_micro_batch": 100}, ["100", str(LONGEST)]),
    "weights that are not there": (lambda t: {}, ["model.safetensors"]),
    "a checkpoint that is none": (lambda t: {"resume": t}, ["--resume"]),
    "an output_dir that is a file": (lambda t: {"output_dir": wrong_row(t / "file")}, ["--output_dir"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_before_the_model_loads(name, sft_data, tmp_path):
    make, named = MISTAKES[name]
    given = flags(without_weights(tmp_path / "model"), sft_data, tmp_path) | make(tmp_path)
    run = launch.launch("train_sft", given, 2)
    assert run.exit_codes == [2, 2], run.stderr[-2000:]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert all(words in errors[0] for words in named), errors
