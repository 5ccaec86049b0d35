"""The memory plan: an estimate from the model's shape, a pure choice, and dry runs that confirm it.

pytest tests/test_memory.py
"""

from functools import partial
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import SFTConfig
from common.failures import UserError
from common.model.attention import attention_kwargs
from common.model.load import parameter_sizes
from common.step.packing import pack
from common.zero import memory
from common.zero.checkpoint import RunState
from common.zero.memory import available_host_memory, choose_micro_batch, choose_residency, shape_of, workload_of
from common.zero.plan import Card, Memory, Plan, Shape, Workload, choose, estimated, plan_run

GB = 1e9
NUMEL, LAYER_NUMEL = 8_030_261_248, 218_112_000
LLAMA_8B = models.make_config(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
ZERO = {
    "stage": 3,
    "reduce_bucket_size": 2 * 10**8,
    "stage3_prefetch_bucket_size": 2 * 10**8,
    "sub_group_size": 10**8,
}
ON_2 = Memory("nothing", 1.0, 8 * GB, 2 * GB, 18 * GB, 6 * NUMEL, 0, per_token=0.6e6, per_token_and_layer=1e5)
ANY = Workload(4096, tokens_per_rank=42_000, budget=16384, is_settled=False, residency="", longest_of_steps=(4096,))
SHAPE_8B = shape_of(LLAMA_8B, SFTConfig(), True)
CARD = Card(83.5 * GB, 120 * GB, host_link=45 * GB, flops=760e12)  # an 80 GB one
PLAN_ON_2 = Plan(0.0, 0, 0, ON_2, SHAPE_8B, CARD)


def estimate_8b(residency: str = "nothing", world_size: int = 2, share: float = 1.0, **zero) -> Memory:
    return estimated(SHAPE_8B, world_size, residency, share, DeepSpeedZeroConfig(**ZERO | zero))


def choose_8b(room: float, workload: Workload, given: int | None = None) -> tuple:
    return choose(ON_2, room, SHAPE_8B, CARD, workload, given)


# ------------------------------------------------------------------ the choice


def test_what_is_recomputed_and_how_large_micro_batches_are_follows_from_the_room():
    _, budget, recomputing = choose_8b(400 * GB, ANY)
    assert recomputing == 0 and 42_000 / budget <= 2
    _, budget, recomputing = choose_8b(34 * GB, ANY)  # smaller micro-batches come before recomputation
    assert recomputing == 0 and budget < 16384
    _, budget, recomputing = choose_8b(34 * GB, ANY._replace(is_settled=True))
    assert budget == 16384 and 0 < recomputing < 32
    assert ON_2.activations(budget, 32 - recomputing) <= 34 * GB < ON_2.activations(budget, 33 - recomputing)


@pytest.mark.parametrize("room", [4, 14, 24, 44, 64])
@pytest.mark.parametrize("longest", [500, 4096, 9000])
@pytest.mark.parametrize("given", [None, 0, 10, 32])
def test_what_is_chosen_fits_and_holds_the_longest_sample(room, longest, given):
    cost, budget, recomputing = choose_8b(room * GB, ANY._replace(longest=longest), given)
    assert budget >= longest and recomputing == (recomputing if given is None else given)
    if cost < np.inf:
        assert ON_2.activations(budget, 32 - recomputing) <= room * GB
    else:
        least, keeping = max(longest, 1024), 0 if given is None else 32 - given
        assert (budget, recomputing) == (least, 32 - keeping) and ON_2.activations(least, keeping) > room * GB


# ------------------------------------------------------------------ dry runs


def settled(
    monkeypatch, real, total, shape=LLAMA_8B, estimate=ON_2, allocated=None, device="cuda", workload=ANY, **flags
):
    """choose_micro_batch() on devices of `total` bytes, its dry runs played by real(tokens, keeping layers) -> bytes of
    activations. -> its budget; the layers that recompute at last; (tokens, recomputing) of each dry run; what was said;
    bytes that may be used for activations."""
    runs, said, recomputed, layers = [], [], [], shape.num_hidden_layers
    at_rest = estimate.fixed - estimate.gathered - estimate.optimizer * 2 / 3  # without the moments
    allocated = at_rest if allocated is None else allocated

    def dry_run(engine, kernel, tokens, longest, made_up, ranks):
        runs.append((tokens, recomputed[-1]))
        return allocated + estimate.gathered + real(tokens, layers - recomputed[-1])

    policy = SimpleNamespace(decoder_layers=lambda: [None] * layers, checkpoint_activations=recomputed.append)
    ranks = SimpleNamespace(device=torch.device(device), say=said.append, gather=lambda work: [work()])
    monkeypatch.setattr(memory, "_dry_run", dry_run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - allocated, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated)
    arguments = SFTConfig(**flags), estimate, "varlen", workload, memory.made_up_conversation, ranks
    budget = choose_micro_batch(SimpleNamespace(module=policy), *arguments)
    room = 0.94 * total - allocated - estimate.gathered - estimate.optimizer * 2 / 3
    return SimpleNamespace(budget=budget, layers=recomputed[-1], runs=runs, said=said[-1], room=room)


@pytest.mark.parametrize("factor", [0.7, 0.95, 1.0, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": "full"}, {"gradient_checkpointing": 5}])
@pytest.mark.parametrize("is_settled", [False, True])
def test_what_is_seen_corrects_the_choice_before_memory_runs_out(monkeypatch, factor, flags, is_settled):
    """Micro-batches that take `factor` times the estimate, and 1 GB more while the first one compiles, on a device that
    holds 6 GB besides."""
    num_runs, workload = 0, Workload(832, 45_000, 16384, is_settled, "")

    def real(tokens: int, keeping: int) -> float:
        nonlocal num_runs
        num_runs += 1
        return factor * ON_2.activations(tokens, keeping) + (1 * GB if num_runs == 1 else 0)

    allocated = 6 * GB + ON_2.fixed - ON_2.gathered - ON_2.optimizer * 2 / 3
    seen = settled(monkeypatch, real, 147 * GB, workload=workload, allocated=allocated, **flags)
    if is_settled and flags:
        assert not seen.runs and "nothing measured" in seen.said, "nothing is left to choose"
        return
    given = {"full": 32, 5: 5}.get(flags.get("gradient_checkpointing"))
    expected = choose(ON_2, seen.room / factor, 32, workload, given)
    assert (seen.budget, seen.layers) == expected[1:] == seen.runs[-1]
    assert f"micro-batches of {seen.budget:,} tokens, {seen.layers} of 32 layers recomputed" in seen.said
    assert len(seen.runs) <= 6
    used = [factor * ON_2.activations(tokens, 32 - recomputing) for tokens, recomputing in seen.runs]
    assert used[0] <= factor * seen.room / 4 and max(used) <= 1.06 * seen.room
    assert all(later <= 2.1 * max(used[:i]) for i, later in enumerate(used) if i)


@pytest.mark.parametrize("held", [0, 6 * GB])
def test_a_tiny_model_takes_one_dry_run_whatever_the_device_holds_besides(monkeypatch, held):
    """The workspaces of matrix products, 70 MB, are not taken for what grows with the tokens."""
    shape = models.make_config()
    estimate = estimated(shape, parameter_counts(shape), 2, 1, "all", DeepSpeedZeroConfig(**ZERO))

    def real(tokens: int, keeping: int) -> float:
        return 0.07 * GB + estimate.activations(tokens, keeping)

    seen = settled(monkeypatch, real, 10 * GB, shape, estimate, allocated=held + estimate.fixed)
    assert seen.runs == [(seen.budget, 0)] and seen.budget > 30_000


@pytest.mark.parametrize("total", [60, 80, 82])
def test_the_smallest_choice_is_taken_though_it_exceeds_what_may_be_used(monkeypatch, total):
    seen = settled(monkeypatch, lambda tokens, keeping: ON_2.activations(tokens, keeping), total * GB)
    assert seen.runs[-1] == (seen.budget, seen.layers) == (4096, 32)


def test_on_a_cpu_nothing_is_measured_and_the_plan_is_said_by_the_models_shape(monkeypatch):
    estimate = estimate_8b("all")
    seen = settled(monkeypatch, None, 0.0, estimate=estimate, device="cpu", gradient_checkpointing=3)
    assert seen.budget == 16384 and seen.layers == 3 and not seen.runs
    parts = estimate.parameters, estimate.gradients, estimate.optimizer, estimate.activations(16384, 29)
    names = ("parameters", "gradients", "optimizer", "activations")
    assert ", ".join(f"{part / GB:.1f} {name}" for part, name in zip(parts, names, strict=True)) in seen.said
    assert f"{sum(parts) / GB:.1f} by the model's shape, nothing measured" in seen.said


MADE_UP = {
    "conversation": (memory.made_up_conversation, 1, 1),
    "pair": (partial(memory.made_up_pair, share_prompt=False), 2, 2),
    "shared prompt": (partial(memory.made_up_pair, share_prompt=True), 1, 2),
}


@pytest.mark.parametrize("kind", MADE_UP)
@pytest.mark.parametrize("tokens", [16, 17, 18, 19, 300])
def test_a_dry_run_is_of_the_kind_that_the_run_trains_and_every_token_a_target(kind, tokens):
    made_up, num_documents, num_sequences = MADE_UP[kind]
    row = pack([made_up(np.arange(tokens)), made_up(np.arange(tokens))])
    assert row.num_tokens == 2 * tokens and row.document.max() + 1 == 2 * num_documents
    assert len(row.sequence_targets) == 2 * num_sequences
    assert len(row.target_rows) == 2 * (tokens - num_documents)
    index = attention_kwargs(row, "varlen", torch.device("cpu"))["packed_key_index"]
    assert (index is not None) == (kind == "shared prompt")


# ------------------------------------------------------------------ the estimate and the residency


def test_the_estimate_of_8b_is_what_was_measured():
    """On two H200: 73.1 GB without moments, 139.3 GB with them and 10,240 tokens, when each rank held its own shards of
    the whole parameters twice."""
    assert parameter_counts(LLAMA_8B) == (NUMEL, LAYER_NUMEL)
    estimate, twice = estimate_8b("all"), 2 * NUMEL / 2
    assert estimate.fixed - 4 * NUMEL + twice == pytest.approx(73.1e9, rel=0.03)
    assert estimate.fixed + estimate.activations(10_240, 32) + twice == pytest.approx(139.3e9, rel=0.03)


def test_what_counts_for_memory_is_the_ds_configs():
    offload = {"device": "cpu"}
    away = estimate_8b(offload_optimizer=offload, offload_param=offload)
    plain, none = estimate_8b(), estimate_8b(offload_optimizer={"device": "none"}, offload_param=None)
    small = estimate_8b(reduce_bucket_size=10**8, stage3_prefetch_bucket_size=10**7)
    assert plain.gathered == 2 * (3 * LAYER_NUMEL + 2e8) and plain == none
    assert plain.fixed - small.fixed == pytest.approx(2 * 19e7 + 4 * 2 * 1e8)
    assert plain.fixed - away.fixed == pytest.approx((2 + 4 + 12) * NUMEL / 2)
    assert estimate_8b("all", offload_optimizer=offload).optimizer == 0 == estimate_8b(world_size=1).gathered


def placed(monkeypatch, frees, kept="", budget=None, own=None, **flags) -> str:
    """The residency chosen for 8B and ranks with `frees` GB each, `own` being in the file."""
    said, free, given = [], iter(frees), {"zero_optimization": ZERO} | ({"residency": own} if own else {})
    gather = lambda work: [work() for _ in frees]  # noqa: E731
    ranks = SimpleNamespace(device=torch.device("cuda"), world_size=len(frees), say=said.append, gather=gather)
    monkeypatch.setattr(memory, "_free_bytes", lambda ranks: next(free) * GB)
    workload = ANY._replace(budget=budget or 0, is_settled=budget is not None, residency=kept)
    ds_config, estimate = choose_residency(given, SFTConfig(**flags), LLAMA_8B, workload, ranks)
    assert ds_config == {"zero_optimization": ZERO, "residency": estimate.residency}
    assert estimate == estimate_8b(estimate.residency, len(frees))
    assert said[0].startswith(f"residency: {estimate.residency} ")
    return estimate.residency


@pytest.mark.parametrize(
    ("frees", "options", "expected"),
    [
        ([150] * 2, {}, "all"),
        ([150] * 8, {}, "all"),
        ([95] * 2, {}, "nothing"),  # with all whole, the state takes 104 GB
        ([85] * 8, {}, "all"),
        ([40] * 8, {}, "nothing"),
        ([150], {}, "all"),  # nothing fits; and what is sharded over one rank is whole
        ([170], {}, "all"),
        ([1000, 1], {}, "nothing"),  # the ranks' least counts
        # 18,432 tokens that keep everything: 60 GB of activations
        ([150] * 2, {"budget": 10_240, "gradient_checkpointing": "none"}, "all"),
        ([150] * 2, {"budget": 18_432, "gradient_checkpointing": "none"}, "nothing"),
        # a checkpoint's gradients are summed on as they were, unless the file says otherwise
        ([1000] * 2, {"kept": "nothing"}, "nothing"),
        ([1] * 2, {"kept": "all"}, "gradients"),
        ([1000] * 2, {"kept": "gradients"}, "all"),
        ([1000] * 2, {"kept": "all", "own": "nothing"}, "nothing"),
        ([1] * 2, {"own": "all"}, "all"),
        ([1000] * 2, {"own": "gradients"}, "gradients"),
    ],
)
def test_what_stays_whole_is_what_memory_leaves_room_for_or_what_was_asked_for(monkeypatch, frees, options, expected):
    assert placed(monkeypatch, frees, **options) == expected


def test_a_resume_keeps_its_budget_at_the_same_number_of_ranks():
    def seen(longest, num_ranks, state, **flags):
        ranks = SimpleNamespace(device=torch.device("cpu"), world_size=num_ranks)
        lengths = np.array([longest // 2, longest, 10])
        return workload_of(SFTConfig(global_batch_size=8, **flags), lengths, "data.jsonl:2", state, ranks)

    state = RunState(micro_batch_budget=700, world_size=4, residency="nothing")
    assert seen(100, 4, state) == Workload(100, 8 * (160 / 3) / 4, 700, True, "nothing")
    assert seen(100, 2, state) == Workload(100, 8 * (160 / 3) / 2, 4096, False, "")
    assert seen(900, 4, state)[2:4] == (900, True)  # --share_prompt false: longer pairs
    assert seen(100, 4, state, max_tokens_per_micro_batch=300)[2:] == (300, True, "nothing")
    assert seen(100, 4, RunState())[2:] == (4096, False, "")
    with pytest.raises(UserError, match=r"--max_tokens_per_micro_batch 300 .* 900 .* data.jsonl:2"):
        seen(900, 4, state, max_tokens_per_micro_batch=300)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once(tied):
    sizes = dict(vocab_size=100, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    expected = (100 * 8 * (1 if tied else 2) + 2 * layer + 8, layer)
    assert parameter_counts(models.make_config(tie_word_embeddings=tied, **sizes)) == expected
