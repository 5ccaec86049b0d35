"""train_sft.py alone: real conversations, its export, and how it ends: pytest tests/test_train_sft.py

Its numbers, and mistakes, are in test_train.py.
"""

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
from safetensors.torch import load_file
from test_model import load_silently

from common.zero.engine import set_learning_rate

# ------------------------------------------------------------------ real conversations, bfloat16


def test_real_conversations_equal_the_plain_loop(shared, tmp_path):
    """Tokens and spans from the expected vectors, the Llama-3 tokenizer."""

    def rows(path):
        return [json.loads(line) for line in (shared / "data" / path).read_text().splitlines()][:4]

    samples = [
        (row["input_ids"], [t for start, end in row["trained_spans"] for t in range(max(start, 1), end)])
        for row in rows("expected/instructions.tulu.256.jsonl")
    ]
    folder = models.make_model(tmp_path / "model", **models.LLAMA3_VOCABULARY)
    data = models.write_jsonl(tmp_path / "data.jsonl", rows("instructions.jsonl"))
    settings = {"learning_rate": 1e-3, "global_batch_size": 2, "max_grad_norm": 1.0}
    expected = reference.train_sft(reference.load(folder), samples, num_steps=2, **settings)
    settings |= {"warmup_ratio": 0, "max_train_steps": 2, "max_seq_length": 256}
    settings["tokenizer_name_or_path"] = shared / "tokenizers" / "llama3"
    run = launch.launch("train_sft", launch.flags(folder, data, tmp_path, **settings), 2).succeeded()
    for column in ("train_loss", "grad_norm", "target_tokens"):
        assert run.column(column) == pytest.approx([record[column] for record in expected], rel=1e-5), column


def test_bfloat16_trains_in_it_and_keeps_float32_master_weights(sft_data, tmp_path):
    """20 steps whose size is far below bfloat16's resolution still move the weights; the export is bfloat16."""
    folder = models.make_model(tmp_path / "model", dtype=torch.bfloat16)
    settings = {"learning_rate": 4e-5, "warmup_ratio": 0, "lr_scheduler_type": "constant"}
    settings |= {"dtype": "bfloat16", "global_batch_size": 1, "max_train_steps": 20}
    run = launch.launch("train_sft", launch.flags(folder, sft_data, tmp_path, **settings)).succeeded()
    start, end = (load_silently(path).state_dict() for path in (folder, run.output_dir))
    assert all(tensor.dtype == torch.bfloat16 for tensor in end.values())
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert (end[name] != start[name]).float().mean() > 0.2, "steps of 4e-5 were lost to rounding"


# ------------------------------------------------------------------ the exported folder


@pytest.fixture(scope="module")
def memorized(tiny_llama, tmp_path_factory):
    """(exported folder, its two conversations): trained until it knows them."""
    root, rng = tmp_path_factory.mktemp("memorized"), random.Random(1)
    rows = []
    for _ in range(2):
        question, answer = models.sentence(rng), models.sentence(rng, 2, 4)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    data = models.write_jsonl(root / "data.jsonl", rows)
    settings = {"learning_rate": 1e-2, "global_batch_size": 2, "num_train_epochs": 60}
    run = launch.launch("train_sft", launch.flags(tiny_llama, data, root, **settings)).succeeded()
    assert run.column("train_loss")[-1] < 0.1
    return run.output_dir, rows


def test_greedy_generation_answers_and_stops_at_eos(memorized):
    folder, rows = memorized
    model, tokenizer = load_silently(folder), reference.load_tokenizer(folder)
    for row in rows:
        as_prompt = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        prompt = tokenizer.apply_chat_template(row["messages"][:1], **as_prompt)
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out) == row["messages"][1]["content"] + "<eos>"


def test_exported_tokenizer_renders_what_was_trained(memorized):
    tokenizer = reference.load_tokenizer(memorized[0])
    for row in models.conversations(6):
        text, _ = reference.render_tulu(row["messages"], "<eos>")
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == text
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        assert ids == reference.conversation_tokens(tokenizer, row["messages"])[0]


# ------------------------------------------------------------------ numbers that are not finite


def test_weights_that_are_not_finite_are_not_written(tiny_llama, sft_data, tmp_path):
    """The last update made them, so that no loss and no gradient showed it."""
    given = launch.flags(tiny_llama, sft_data, tmp_path, weight_decay=1e300, max_train_steps=1)
    run = launch.launch("train_sft", given, 2)
    assert "step 1: there are weights that are not finite" in run.refused(3)
    assert not list(run.output_dir.glob("*.safetensors*"))


def test_weights_that_are_not_finite_in_the_folder_are_named_before_the_first_step(sft_data, tmp_path):
    """In one row of the embedding whose token is in no sample, so that no loss shows it."""
    folder = models.make_model(tmp_path / "model")
    weights = reference.load(folder)
    with torch.no_grad():
        weights.get_input_embeddings().weight[models.VOCAB - 1, 3] = torch.nan
    weights.save_pretrained(folder)
    run = launch.launch("train_sft", launch.flags(folder, sft_data, tmp_path, max_train_steps=1), 2)
    assert "model.embed_tokens.weight" in run.refused(2)
    assert not (run.output_dir / "metrics.jsonl").exists()


def test_a_loss_that_is_not_finite_stops_with_3_and_keeps_the_last_checkpoint(tiny_llama, sft_data, tmp_path):
    """A first update so large that the second step's loss is not finite."""
    settings = {"learning_rate": 1e30, "warmup_ratio": 0, "global_batch_size": 3, "max_train_steps": 4}
    given = launch.flags(tiny_llama, sft_data, tmp_path, checkpointing_steps=1, **settings)
    run = launch.launch("train_sft", given, 2)
    error = run.refused(3)
    assert run.column("step") == [1]
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert not list(run.output_dir.glob("*.safetensors")), "nothing is exported"
    assert "step 2" in error and "--learning_rate" in error
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    for i in order[3:6]:
        assert re.search(rf"rank [01], micro-batch 1 of \d+ tokens: [^;]*conversations.jsonl:[\d, ]*\b{i + 1}\b", error)


def test_a_gradient_that_is_not_finite_stops_with_3_and_updates_nothing(sft_data, tmp_path):
    """Finite log-probabilities whose derivative is too large: a norm of hidden states close to zero."""
    folder = models.make_model(tmp_path / "model", dtype=torch.bfloat16, rms_norm_eps=0.0)
    weights = reference.load(folder, torch.bfloat16)
    with torch.no_grad():
        weights.model.embed_tokens.weight.mul_(1e-20)
        for layer in weights.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    weights.save_pretrained(folder)
    settings = {"dtype": "bfloat16", "learning_rate": 1e-3, "warmup_ratio": 0, "global_batch_size": 3}
    settings |= {"max_train_steps": 2, "checkpointing_steps": 1}
    run = launch.launch("train_sft", launch.flags(folder, sft_data, tmp_path, **settings), 2)
    assert "step 1: the gradient norm" in run.refused(3)
    assert not run.metrics and not list((run.output_dir / "checkpoints").iterdir())


def test_weight_decay_changes_all_but_what_transformers_does_not_train(sft_data, tmp_path):
    """A bias of the routers' choice, which no gradient reaches."""
    sizes = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    model = models.make_model(tmp_path / "model", "ernie4_5_moe", moe_layer_start_index=1, **sizes)
    given = launch.flags(model, sft_data, tmp_path, max_train_steps=2, weight_decay=0.5, learning_rate=1e-2)
    run = launch.launch("train_sft", given, 2).succeeded()
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run.output_dir))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith("e_score_correction_bias")} != set()


# ------------------------------------------------------------------ memory


def short_of_memory(engine, learning_rate: float) -> None:
    """set_learning_rate that leaves rank 1 no memory to speak of in the third step, as another program might."""
    short_of_memory.calls = getattr(short_of_memory, "calls", 0) + 1
    if short_of_memory.calls == 3 and os.environ["RANK"] == "1":
        in_use = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
        limit = int(in_use.split()[1]) * 1024 + 8 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    set_learning_rate(engine, learning_rate)


def test_running_out_of_memory_stops_with_3_says_what_to_change_and_keeps_the_last_checkpoint(tmp_path):
    model = models.make_model(tmp_path / "model", max_position_embeddings=8192)
    messages = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f " * 700}]
    data = models.write_jsonl(tmp_path / "long.jsonl", [{"messages": messages}] * 4)
    settings = {"max_seq_length": 4096, "global_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 1}
    given = launch.flags(model, data, tmp_path, **settings)
    run = launch.launch("train_sft", given, 2, {"train_sft.set_learning_rate": short_of_memory})
    assert run.exit_codes[1] == 3 and run.exit_codes[0] != 0, run
    assert run.column("step") == [1, 2]
    assert (run.output_dir / "checkpoints" / "step_00000001" / "COMPLETE").exists()  # step 2's may be in flight
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: step 3: out of memory"))
    length = len(reference.conversation_tokens(reference.load_tokenizer(model), messages)[0])
    assert f"{length:,} tokens" in error and "--gradient_checkpointing full, a lower --max_seq_length" in error


# ------------------------------------------------------------------ through the real launcher


def test_deepspeed_runs_it_and_the_curves_are_drawn(tiny_llama, sft_data, tmp_path):
    """Its numbers are those of `launch`'s processes, which test_train.py compares with a plain loop."""
    given = launch.flags(tiny_llama, sft_data, tmp_path, learning_rate=1e-2, global_batch_size=3, max_train_steps=3)
    run = launch.launch_for_real("train_sft", given, 2).succeeded()
    forked = launch.launch("train_sft", given | {"output_dir": tmp_path / "forked"}, 2).succeeded()
    assert run.column("train_loss") == forked.column("train_loss")
    assert (run.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "3 of 3 planned" in (run.output_dir / "README.md").read_text()


def test_deepspeed_passes_on_a_mistake_as_2_with_one_line(tmp_path):
    given = {"learning_rat": "1e-5", "output_dir": tmp_path / "output"}
    assert "--learning_rat" in launch.launch_for_real("train_sft", given, 1).refused(2)
    assert not (tmp_path / "output").exists()
